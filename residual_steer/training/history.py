"""The records of a run: in memory, and as JSON lines beside its checkpoints."""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from residual_steer._files import write_whole
from residual_steer.errors import SteerError

__all__ = ["History", "Journal"]

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

    Args:
        folder: the run's folder, or None; only the first process is given one.
        until: forget the records of later steps, which a resumed run will make again.
    """

    def __init__(self, folder: Path | None, until: int) -> None:
        self.history = History()
        self._path = None if folder is None else folder / "metrics.jsonl"
        if self._path is not None:
            kept = [record for record in self._read() if record["step"] <= until] if until else []
            for record in kept:
                self._remember(dict(record))
            write_whole({self._path: "".join(json.dumps(record) + "\n" for record in kept).encode()})

    def add(self, kind: str, record: Record) -> None:
        """Add a record of `kind`, train or valid.

        Raises:
            SteerError: it cannot be written.
        """
        self._remember({"kind": kind, **record})
        if self._path is not None:
            try:
                with self._path.open("a") as file:
                    file.write(json.dumps({"kind": kind, **record}) + "\n")
            except OSError as error:
                raise SteerError(f"could not write {self._path}: {error.strerror or error}.") from error

    def _remember(self, record: Record) -> None:
        (self.history.train if record.pop("kind") == "train" else self.history.valid).append(record)

    def _read(self) -> list[Record]:
        if self._path is None or not self._path.exists():
            return []
        records = []
        for line in self._path.read_bytes().splitlines():
            try:
                record = json.loads(line)
                records.append({"kind": str(record["kind"]), "step": int(record["step"]), **record})
            except (ValueError, KeyError, TypeError):  # the line that was being written when the run was killed
                break
        return records
