"""A part: a process that leaves a JSON file as it goes, and ends when whoever started it is gone."""

from __future__ import annotations

import argparse
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from options import DTYPES
from output import save_json

__all__ = ["Job", "run_part", "why"]


@dataclass
class Job:
    """What a part was asked for, and what it has found.

    Attributes:
        subjects: names of models; the part says which it knows.
        out: its JSON file.
        device: as PyTorch names it.
        quick: whether shapes are tiny: a rehearsal, no result.
        turn: a file; once it exists, the machine is this part's alone. None: it is.
        dtype: of frozen weights.
        record: what was found.
    """

    subjects: list[str]
    out: Path
    device: str
    quick: bool
    turn: Path | None
    dtype: torch.dtype = torch.bfloat16
    record: dict[str, Any] = field(default_factory=dict)

    @property
    def cuda(self) -> bool:
        """Whether the device is a GPU."""
        return torch.device(self.device).type == "cuda"

    def save(self, status: str = "unfinished", **found: Any) -> None:
        """Add to the record and write it, whole or not at all."""
        self.record.update(found)
        about = {"status": status, "quick": self.quick, "dtype": str(self.dtype)}
        save_json({**about, **self.record}, self.out, self.device)

    def may_prepare(self) -> bool:
        """Return whether nobody measures yet; a rehearsal prepares all the same."""
        return self.quick or (self.turn is not None and not any(self.turn.parent.glob("*.turn")))

    def wait(self) -> None:
        """Show that all is prepared, and wait for the turn."""
        if self.turn is not None:
            self.turn.with_suffix(".ready").touch()
            while not self.turn.exists():
                time.sleep(0.1)


def run_part(work: Callable[[Job], None], arguments: list[str] | None = None) -> int:
    """Read the command line and run a part; what goes wrong stands in its JSON file, and the status is 1."""
    parser = argparse.ArgumentParser()
    parser.add_argument("subjects", nargs="*")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", type=DTYPES.__getitem__, default="bf16")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--turn", type=Path)
    job = Job(**vars(parser.parse_args(arguments)))
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    started = time.perf_counter()
    try:
        work(job)
    except Exception as error:
        traceback.print_exc()
        job.save("failed", error=why(error), seconds=time.perf_counter() - started)
        return 1
    job.save("done", seconds=time.perf_counter() - started)
    return 0


def why(error: BaseException) -> str:
    """Return an error and the lines that it came through, in one line."""
    places = ", ".join(f"{Path(f.filename).name}:{f.lineno}" for f in traceback.extract_tb(error.__traceback__)[-3:])
    return f"{type(error).__name__} at {places}: {' '.join(str(error).split())[:600]}"


def _end_with(parent: int) -> None:
    """End this process and its group once its parent is gone, so that nothing keeps the GPU busy."""
    while os.getppid() == parent:
        time.sleep(0.5)
    if os.getpgid(0) == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(1)
