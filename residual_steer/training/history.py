"""What a run shows of itself: records in memory and as JSON lines beside its checkpoints, and a bar."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import auto, std

from residual_steer._files import write_whole
from residual_steer.errors import SteerError

EVERY = 5.0  # seconds between two lines of a log

Record = dict[str, Any]


@dataclass
class History:
    """What a run did.

    Attributes:
        train: records with `step`, `loss` (of that step's batch), `lr`, `grad_norm`, `samples_per_s` and
            `seconds_per_step`.
        valid: records with `step`, `loss` and, for `(x, y)` pairs, `accuracy` from 0 to 1.
        cache: with `cache_prefix`, how many `blocks` it spared, how many `rows` and `bytes` it holds, and the batches
            it knew (`hits`) and did not know (`misses`); else None.
    """

    train: list[Record] = field(default_factory=list)
    valid: list[Record] = field(default_factory=list)
    cache: Record | None = None

    @property
    def seconds_per_step(self) -> float:
        """Median over the records of the wall-clock seconds of a step, without evaluation and checkpoints."""
        return statistics.median(record["seconds_per_step"] for record in self.train) if self.train else 0.0

    def __str__(self) -> str:
        """Print the last record of each kind."""
        parts = []
        for name, records in (("train", self.train), ("valid", self.valid)):
            if records:
                shown = ", ".join(f"{k} {v:.4g}" for k, v in records[-1].items() if k in ("loss", "accuracy"))
                parts.append(f"{name}: {shown} at step {records[-1]['step']}")
        return "; ".join(parts) or "no records"


class Journal:
    """Keep a history, and append it to `metrics.jsonl` if there is a folder.

    Of what an earlier run wrote there, the records until a step are taken up, and the later ones forgotten.
    """

    def __init__(self, folder: Path | None, until: int) -> None:
        self.history = History()
        self._path = None if folder is None else folder / "metrics.jsonl"
        if self._path is not None:
            lines = self._path.read_text(errors="replace").splitlines() if until and self._path.exists() else []
            write_whole({self._path: "".join(f"{line}\n" for line in lines if self._recall(line, until)).encode()})

    def add(self, kind: str, record: Record) -> None:
        """Add a record of `kind`, train or valid."""
        self._remember(kind, **record)
        if self._path is not None:
            try:
                with self._path.open("a") as file:
                    file.write(json.dumps({"kind": kind, **record}) + "\n")
            except OSError as error:
                raise SteerError(f"could not write {self._path}: {error.strerror or error}.") from error

    def _remember(self, kind: str, **record: Any) -> None:
        (self.history.train if kind == "train" else self.history.valid).append(record)

    def _recall(self, line: str, until: int) -> bool:
        """Take up a line of an earlier run, unless it was being written when that was killed, or is of a later step."""
        try:
            record = json.loads(line)
            if record["step"] > until:
                return False
            self._remember(**record)
        except (ValueError, KeyError, TypeError):
            return False
        return True


def progress(iterable: Iterable[Any] | None = None, **options: Any) -> Any:
    """Return a bar of tqdm, whose arguments it takes; in what is no terminal, one that writes a line every 5 seconds.

    It stays on the screen for as long as it runs, if `leave` is not given.
    """
    options = {"leave": False, **options}
    watched = sys.stderr.isatty() or "ipykernel" in sys.modules
    return auto.tqdm(iterable, **options) if watched else _Lines(iterable, **options)


class _Lines(std.tqdm):  # type: ignore[misc]  # tqdm has no types
    """A bar whose every showing is a line of its own."""

    def __init__(self, iterable: Iterable[Any] | None = None, **options: Any) -> None:
        options = {**options, "mininterval": EVERY, "maxinterval": EVERY, "delay": EVERY, "leave": False}
        super().__init__(iterable, **options)

    def set_postfix_str(self, s: str = "", refresh: bool = True) -> None:
        """Keep what stands behind the bar for the next line."""
        super().set_postfix_str(s, refresh=False)

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Write a line; to clear the bar, write nothing."""
        if msg != "":
            self.fp.write(f"{self}\n")
            self.fp.flush()
