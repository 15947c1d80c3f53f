"""Start the parts in order of worth, each under a time limit, and end them with all that they started.

This module needs nothing but Python: what is missing or broken on a machine fails one part, and not all.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

__all__ = ["main"]

ROOT = Path(__file__).parents[2]
READY = 20  # seconds that a part which prepares itself ahead is waited for, once it is its turn
EXACT = {"NVIDIA_TF32_OVERRIDE": "0", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}  # fp32 is fp32, and products repeat
QUIET = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
QUIET["TORCHINDUCTOR_COMPILE_THREADS"] = "4"  # of each part


@dataclass(frozen=True)
class Part:
    """A process.

    Attributes:
        name: of its JSON file.
        seconds: that it has, from its turn on.
        module: what is run; named as the part if left out.
        subjects: for the module.
        ahead: whether it starts at once and prepares itself, and measures only once it is its turn.
        exact: whether fp32 products are to be exact and repeatable.
        kernels: whether it needs the compiled kernels.
    """

    name: str
    seconds: float
    module: str = ""
    subjects: tuple[str, ...] = ()
    ahead: bool = False
    exact: bool = False
    kernels: bool = False


CHECKS = [Part("contract", 80, exact=True), Part("training", 60, exact=True), Part("marked", 70, exact=True)]
COSTS = [Part(f"costs-{name}", 50, "costs", (name,), ahead=True) for name in ("gpt2", "llama", "mamba", "vit")]
REHEARSED = [Part("costs", 50, subjects=("gpt2", "llama", "mamba", "vit"), ahead=True)]  # in one process, to save time
KERNELS = [
    Part("contract-kernels", 50, "contract", ("mamba", "mamba2"), exact=True, kernels=True),
    Part("marked-kernels", 60, "marked", ("mamba",), exact=True, kernels=True),
    Part("costs-kernels", 90, "costs", ("mamba-kernels", "mamba_ssm"), kernels=True),
]


def main(arguments: list[str] | None = None) -> int:
    """Run what is not done yet; the status is 1 if a part failed or is unfinished."""
    parser = argparse.ArgumentParser(description="What holds on a CUDA device, in nine minutes.")
    parser.add_argument("--out", type=Path, help="folder of the results; by default one named after the card")
    parser.add_argument("--device", default="cuda", help="as PyTorch names it")
    parser.add_argument("--quick", action="store_true", help="tiny shapes: a rehearsal, no result")
    parser.add_argument("--resume", action="store_true", help="go on: leave out what is done")
    parser.add_argument("--wheels", type=Path, help="folder of wheels, and of archives of the kernels to be built")
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything")
    parser.add_argument("--only", nargs="+", help="names of parts")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the parts are ended, too
    with tempfile.TemporaryDirectory(prefix="residual-steer-") as folder, Run(options, Path(folder)) as run:
        return run.go()


class Run:
    """One call of the script; on leaving it, whatever still runs is ended."""

    def __init__(self, options: argparse.Namespace, scratch: Path) -> None:
        self.options, self.scratch = options, scratch
        self.links, self.site = scratch / "links", scratch / "site"
        self.deadline = time.monotonic() + 60 * options.minutes
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        own = ROOT / ("runs" if options.quick else "benchmarks/results") / "gpu"
        self.folder = options.out.resolve() if options.out else own / card(options)

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.running.values():
            end(process)

    def go(self) -> int:
        """Run the parts, then sum them up."""
        self.folder.mkdir(parents=True, exist_ok=True)
        link(self.links / "residual_steer")
        if not self.run(Part("machine", 60)):
            return 1
        parts = [*CHECKS, *(REHEARSED if self.options.quick else COSTS), Part("many", 60)]
        if self.options.wheels:
            subjects = (str(self.options.wheels.resolve()), str(self.site))
            parts += [Part("kernels", 300, subjects=subjects, ahead=True), *(KERNELS if not self.options.quick else [])]
        left = [part for part in parts if not self.options.only or part.name in self.options.only]
        if self.options.resume:
            left = [part for part in left if not self.is_done(part) or part.name == "kernels"]
        for part in left:
            if part.ahead:
                self.start(part)
        failed = [part.name for part in left if not self.run(part)]
        self.run(Part("summary", 60, subjects=(str(self.folder),)))
        print(f"{len(left)} parts were run; not well: {', '.join(failed) or 'none'}", flush=True)
        return int(bool(failed))

    def is_done(self, part: Part) -> bool:
        """Return whether a part's JSON file says that it came to its end."""
        with contextlib.suppress(OSError, ValueError):
            return bool(json.loads((self.folder / f"{part.name}.json").read_text())["status"] == "done")
        return False

    def start(self, part: Part) -> None:
        """Start a part, as the first process of a group of its own; from the root it would import the bare package."""
        path = [self.site] * part.kernels + [self.links, ROOT / "benchmarks", ROOT]
        paths = os.pathsep.join([*map(str, path), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {**os.environ, **QUIET, **(EXACT if part.exact else {}), "PYTHONPATH": paths}
        out = self.folder / f"{part.name}.json"
        command = [sys.executable, "-m", f"gpu.{part.module or part.name}", *part.subjects, "--out", str(out)]
        command += ["--device", self.options.device, *(["--quick"] * self.options.quick)]
        command += ["--turn", str(self.scratch / f"{part.name}.turn")] if part.ahead else []
        with out.with_suffix(".log").open("wb") as log:
            self.running[part.name] = subprocess.Popen(
                command, env=environment, stdout=log, stderr=log, cwd=self.links, start_new_session=True
            )

    def run(self, part: Part) -> bool:
        """Give a part its turn, and end it when its time or that of all is up; return whether it ended well."""
        began, left = time.monotonic(), self.deadline - time.monotonic()
        if left < 5 and part.name != "summary":
            print(f"{part.name}: no time left", flush=True)
            return False
        if part.name not in self.running:
            self.start(part)
        process, turn = self.running[part.name], self.scratch / f"{part.name}.turn"
        limit = max(5 * part.seconds if self.options.quick else min(part.seconds, left), 20)  # a rehearsal is no race
        if part.ahead and part.name != "kernels":
            (self.scratch / "any.turn").touch()  # from now on nobody prepares
            until = time.monotonic() + (limit if self.options.quick else READY)
            while process.poll() is None and not turn.with_suffix(".ready").exists() and time.monotonic() < until:
                time.sleep(0.1)
            turn.touch()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=limit)
        end(self.running.pop(part.name))
        done = process.returncode == 0 and self.is_done(part)
        word = "done" if done else f"not done, status {process.returncode}"
        print(f"{part.name}: {word}, {time.monotonic() - began:.0f} seconds", flush=True)
        if part.name == "summary" or not done:
            print((self.folder / f"{part.name}.log").read_text(errors="replace")[-6000:], flush=True)
        return done


def end(process: subprocess.Popen[bytes]) -> None:
    """End a part and every process of its group."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=3)


def card(options: argparse.Namespace) -> str:
    """Return the name of a folder for the device, as torch names it."""
    if options.device == "cpu":
        return "cpu"
    command = [sys.executable, "-c", "import torch; print(torch.cuda.get_device_name())"]
    shown = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False).stdout
    return re.sub(r"[^a-z0-9]+", "-", shown.lower()).strip("-") or "none"


def link(package: Path) -> None:
    """Lay the package into a folder as an installation would: `backbones` is `residual_steer.backbones`."""
    package.mkdir(parents=True)
    for path in (ROOT / "residual_steer").iterdir():
        (package / path.name).symlink_to(path)
    (package / "backbones").symlink_to(ROOT / "backbones")
