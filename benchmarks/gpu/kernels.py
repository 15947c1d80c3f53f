"""Build `causal_conv1d` and `mamba_ssm` for this GPU alone, from what a caller laid into a folder.

Wheels are installed as they are. Source archives are compiled: their set-ups ask nvcc for every architecture, whatever
TORCH_CUDA_ARCH_LIST says, so a script stands in for nvcc (PYTORCH_NVCC) that leaves one of them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from .part import Job, run_part, why

PACKAGES = {"causal_conv1d": "causal_conv1d_cuda", "mamba_ssm": "selective_scan_cuda"}
NVCC = """\
#!{python}
import os, sys
kept, words = [], iter(sys.argv[1:])
for word in words:
    if word in ("-gencode", "--generate-code", "--threads"):
        next(words)
    elif word != "-lineinfo" and not word.startswith(("-gencode=", "--generate-code=", "--threads=")):
        kept.append(word)
os.execv({nvcc!r}, [{nvcc!r}, "-gencode", {code!r}, *kept])
"""


def work(job: Job) -> None:
    """Install what lies in one folder into another; the subjects are these two. Both packages are built at a time."""
    wheels, site = map(Path, job.subjects)
    os.nice(10)  # what is tested and compiled meanwhile goes first
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor() as pool:
        environment = compiler(Path(folder))
        tries = {name: pool.submit(tried, name, wheels, site, environment) for name in PACKAGES}
        found = {name: attempt.result() for name, attempt in tries.items()}
    wrong = [f"{file}: {text}" for told in found.values() for file, text in told.items() if not isinstance(text, float)]
    there = [name for name, told in found.items() if any(isinstance(took, float) for took in told.values())]
    job.save(tried=found, installed=there, wrong=wrong)
    if job.cuda and len(there) < len(PACKAGES):
        raise RuntimeError(f"of {', '.join(PACKAGES)} there is {', '.join(there) or 'none'}, of {os.listdir(wheels)}")


def tried(package: str, wheels: Path, site: Path, environment: dict[str, str]) -> dict[str, Any]:
    """Install a wheel, or build an archive, the first that can be imported; return the seconds or what went wrong."""
    found: dict[str, Any] = {}
    options = ["--no-index", "--no-deps", "--no-build-isolation", "--no-cache-dir", "--upgrade", "--target", str(site)]
    path = os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])])
    for file in [*sorted(wheels.glob(f"{package}-*.whl")), *sorted(wheels.glob(f"{package}-*.tar.gz"))]:
        started = time.perf_counter()
        try:
            command = [sys.executable, "-m", "pip", "install", *options, str(file)]
            subprocess.run(command, check=True, env={**os.environ, **environment})
            command = [sys.executable, "-c", f"import torch, {PACKAGES[package]}, {package}"]
            subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": path})
            return {**found, file.name: time.perf_counter() - started}
        except subprocess.CalledProcessError as error:  # a wheel for another release: the archive is next
            found[file.name] = why(error)
    return found


def compiler(folder: Path) -> dict[str, str]:
    """Return what the set-ups read, with a compiler of one architecture laid into a folder.

    torch takes the folder above nvcc's for that of the headers, which it is not where nvcc is a link.
    """
    own = [Path(found).resolve().parents[1]] if (found := shutil.which("nvcc")) else []
    homes = [*own, Path("/usr/local/cuda"), *sorted(Path("/usr/local").glob("cuda-*"))]
    home = next((h for h in homes if (h / "bin/nvcc").exists() and (h / "include/cuda_runtime.h").exists()), homes[0])
    major, minor = torch.cuda.get_device_capability() if torch.cuda.is_available() else (9, 0)
    nvcc, code = str(home / "bin" / "nvcc"), f"arch=compute_{major}{minor},code=sm_{major}{minor}"
    script = folder / "nvcc"
    script.write_text(NVCC.format(python=sys.executable, nvcc=nvcc, code=code))
    script.chmod(0o755)
    forced = {f"{name}_FORCE_BUILD": "TRUE" for name in ("MAMBA", "CAUSAL_CONV1D")}  # and no download is tried
    return {
        **forced,
        "CUDA_HOME": str(home),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),  # of ninja
        "PYTORCH_NVCC": str(script),  # which torch reads with ninja alone
        "TORCH_CUDA_ARCH_LIST": f"{major}.{minor}",
        "MAX_JOBS": str(os.cpu_count()),
    }


if __name__ == "__main__":
    sys.exit(run_part(work))
