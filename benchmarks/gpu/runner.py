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
from typing import Any

__all__ = ["main"]

ROOT = Path(__file__).parents[2]
READY = 20  # seconds that a part which prepares itself ahead is waited for, once it is its turn
LAST = 20  # seconds that are kept for the summary
EXACT = {"NVIDIA_TF32_OVERRIDE": "0", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}  # fp32 is fp32, and products repeat
QUIET = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
QUIET["TORCHINDUCTOR_COMPILE_THREADS"] = "4"  # of each part
FEW = {"OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2"}  # of a part beside others: the GPU does the work


@dataclass(frozen=True)
class Part:
    """A process.

    Attributes:
        name: of its JSON file.
        seconds: that it has, from its turn on, or from its start where it runs beside others.
        module: what is run; named as the part if left out.
        subjects: for the module.
        ahead: whether it starts at once and prepares itself, and measures only once it is its turn.
        beside: whether it starts at once: it times nothing, so that others may run beside it.
        exact: whether fp32 products are to be exact and repeatable.
        kernels: whether it needs the compiled kernels.
    """

    name: str
    seconds: float
    module: str = ""
    subjects: tuple[str, ...] = ()
    ahead: bool = False
    beside: bool = False
    exact: bool = False
    kernels: bool = False


CHECKS = [Part(name, 170, beside=True, exact=True) for name in ("training", "contract", "marked", "examples")]
SUBJECTS = {"gpt2": 50, "llama": 50, "vit": 30, "mamba": 60}  # and seconds
COSTS = [Part(f"costs-{name}", seconds, "costs", (name,), ahead=True) for name, seconds in SUBJECTS.items()]
KERNELS = [
    Part("contract-kernels", 170, "contract", ("mamba", "mamba2"), beside=True, exact=True, kernels=True),
    Part("marked-kernels", 170, "marked", ("mamba",), beside=True, exact=True, kernels=True),
    Part("costs-kernels", 90, "costs", ("mamba-kernels", "mamba_ssm"), kernels=True),
]


def main(arguments: list[str] | None = None) -> int:
    """Run the parts; the status is 1 if one failed, is unfinished, or found something wrong."""
    parser = argparse.ArgumentParser(description="What holds on a CUDA device, in nine minutes.")
    parser.add_argument("--out", type=Path, help="folder of the results; by default one named after the card")
    parser.add_argument("--device", default="cuda", help="as PyTorch names it")
    parser.add_argument("--quick", action="store_true", help="tiny shapes: a rehearsal, no result")
    parser.add_argument("--resume", action="store_true", help="go on: leave out what is done")
    parser.add_argument("--wheels", type=Path, help="folder of the kernels' wheels, or of archives to build")
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
        self.since: dict[str, float] = {}  # when a part that runs was started
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
        left = self.left()
        if not self.run(Part("machine", 60)):
            return 1
        first = left[: bool(left) and left[0].name == "kernels"]  # wheels, which take seconds
        failed = [part.name for part in first if not self.run(part)]
        for part in (rest := left[len(first) :]):
            if part.ahead or (part.beside and not self.options.quick and (first or not part.kernels)):
                self.start(part)
        failed += [part.name for part in rest if not self.run(part)]
        failed += [] if self.run(Part("summary", LAST, subjects=(str(self.folder),))) else ["summary"]
        print(f"{len(left)} parts were run; not well: {', '.join(failed) or 'none'}", flush=True)
        return int(bool(failed))

    def left(self) -> list[Part]:
        """Return the parts that are to be run; end where a name is no part's."""
        parts = [*CHECKS, *([Part("costs", 50)] if self.options.quick else COSTS), Part("many", 60)]
        if self.options.wheels:
            subjects = (str(self.options.wheels.resolve()), str(self.site))
            slow = any(self.options.wheels.glob("*.tar.gz"))
            built = Part("kernels", 300, subjects=subjects, ahead=slow)
            need = [] if self.options.quick else KERNELS
            parts = [*parts, built, *need] if slow else [built, *need[:-1], *parts, *need[-1:]]
        names = [part.name for part in parts]
        if unknown := [name for name in self.options.only or () if name not in names]:
            sys.exit(f"--only takes {', '.join(names)}; received {', '.join(unknown)}")
        left = [part for part in parts if not self.options.only or part.name in self.options.only]
        if self.options.resume:
            left = [part for part in left if part.name == "kernels" or self.record(part).get("status") != "done"]
        if self.options.quick:  # one process runs them: to import libraries takes longer than what is rehearsed
            rehearsed = tuple(part.name for part in left if part.name != "kernels")
            left = [part for part in left if part.name == "kernels"]
            left[:0] = [Part("rehearsal", 200, subjects=rehearsed, ahead=True)] * bool(rehearsed)
        return left

    def record(self, part: Part) -> dict[str, Any]:
        """Return what stands in a part's JSON file; nothing where there is none."""
        with contextlib.suppress(OSError, ValueError):
            return dict(json.loads((self.folder / f"{part.name}.json").read_text()))
        return {}

    def start(self, part: Part) -> None:
        """Start a part, as the first process of a group of its own; from the root it would import the bare package."""
        self.since[part.name] = time.monotonic()
        path = [self.site] * part.kernels + [self.links, ROOT / "benchmarks", ROOT]
        paths = os.pathsep.join([*map(str, path), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {**os.environ, **QUIET, **(EXACT if part.exact else {}), "PYTHONPATH": paths}
        environment |= FEW if part.beside else {}
        out = self.folder / f"{part.name}.json"
        out.unlink(missing_ok=True)  # or a part that ends before it writes would show what an earlier run found
        command = [sys.executable, "-m", f"gpu.{part.module or part.name}", *part.subjects, "--out", str(out)]
        command += ["--device", self.options.device, *(["--quick"] * self.options.quick)]
        command += ["--turn", str(self.scratch / f"{part.name}.turn")] if part.ahead else []
        with out.with_suffix(".log").open("wb") as log:
            self.running[part.name] = subprocess.Popen(
                command, env=environment, stdout=log, stderr=log, cwd=self.links, start_new_session=True
            )

    def run(self, part: Part) -> bool:
        """Give a part its turn, end it when its time or that of all is up; return whether it found nothing wrong."""
        began = time.monotonic()
        until = self.deadline if part.name == "summary" else self.deadline - LAST
        left = max(until - began, LAST if part.name == "summary" else 0)
        if left < 5:
            print(f"{part.name}: no time left", flush=True)
            return False
        if part.name not in self.running:
            self.start(part)
        process, turn = self.running[part.name], self.scratch / f"{part.name}.turn"
        if part.ahead and part.name != "kernels":
            (self.scratch / "any.turn").touch()  # from now on nobody prepares
            patience = began + (5 * part.seconds if self.options.quick else min(READY, left))
            while process.poll() is None and not turn.with_suffix(".ready").exists() and time.monotonic() < patience:
                time.sleep(0.1)
            turn.touch()
            left -= time.monotonic() - began
        own = part.seconds - (time.monotonic() - self.since[part.name] if part.beside else 0)
        with contextlib.suppress(subprocess.TimeoutExpired):  # a rehearsal is no race
            process.wait(timeout=5 * part.seconds if self.options.quick else max(min(own, left), 0))
        end(self.running.pop(part.name))
        record = self.record(part)
        done, wrong = process.returncode == 0 and record.get("status") == "done", record.get("wrong", [])
        word = f"done{f', {len(wrong)} wrong' * bool(wrong)}" if done else f"not done, status {process.returncode}"
        print(f"{part.name}: {word}, {time.monotonic() - began:.0f} seconds", flush=True)
        if part.name == "summary" or not done:
            print((self.folder / f"{part.name}.log").read_text(errors="replace")[-6000:], flush=True)
        return done and not wrong


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
