"""What is finished is not done again: a file of results, one line each, found by what they are results of."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Mapping
from io import FileIO
from pathlib import Path
from typing import Any

from residual_steer._files import as_path, lock, make_folder, sync_folder
from residual_steer.errors import SteerError

__all__ = ["Ledger"]

Key = Mapping[str, Any]
Value = dict[str, Any]

_START = b'{"key": {'  # of every line


class Ledger:
    """Results by key, in memory and, if there is a path, in a file of JSON lines.

    A result is on disk before `get_or` returns it. A run that is killed loses the result it was working on and no
    other: a last line that was being written is not whole, and is left out. Several processes may write to one file at
    once: each adds to what the others wrote, under a lock, and the first result for a key stays. (Where there are no
    such locks, on Windows and some network drives, give each a file of its own.)

    Keys are equal if their JSON is, names in any order: a tuple is a list, but 1 is not 1.0. NaN and infinities are
    kept, as Python writes them.

    Args:
        path: the file, made with the first result; None keeps the results in memory.

    Raises:
        SteerError: the file cannot be read, its folder cannot be made, or it holds something else; it is untouched.

    >>> ledger = Ledger()
    >>> ledger.get_or({"seed": 0}, lambda: {"loss": 0.5}), ledger.get_or({"seed": 0}, lambda: {"loss": 0.7})
    ({'loss': 0.5}, {'loss': 0.5})
    """

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        self.path = None if path is None else as_path(path)
        self._known: dict[str, str] = {}  # both as JSON, so that nobody changes them from outside
        if self.path is not None:
            make_folder(self.path.parent)
            try:
                content = self.path.read_bytes() if self.path.exists() else b""
            except OSError as error:
                raise SteerError(f"could not read {self.path}: {error.strerror or error}.") from error
            self._known, _ = _parse(content, self.path)

    def __len__(self) -> int:
        """Return the number of results."""
        return len(self._known)

    def __contains__(self, key: Key) -> bool:
        """Return whether there is a result for `key`."""
        return _canonical(key) in self._known

    def get_or(self, key: Key, make: Callable[[], Value]) -> Value:
        """Return the result for `key`, made now if there is none; a copy, the same whether it was made or read.

        Args:
            key: plain values by name.
            make: gives the result, plain values by name.

        Raises:
            SteerError: key or result are no plain values by name, or the file cannot be written or is damaged.
        """
        text = _canonical(key)
        if text not in self._known:
            made = {**self._known, text: _canonical(make())}
            self._known = made if self.path is None else _merge(self.path, made)
        value: Value = json.loads(self._known[text])
        return value


def _merge(path: Path, known: dict[str, str]) -> dict[str, str]:
    """Write the results that a file lacks to its end; return all that it then has."""
    try:
        new = not path.exists()
        with path.open("a+b", buffering=0) as file:
            lock(file, wait=True)  # until it is closed
            file.seek(0)
            there, whole = _parse(file.readall(), path)
            lines = "".join(f'{{"key": {key}, "value": {known[key]}}}\n' for key in known if key not in there)
            _append(file, whole, lines.encode())
        if new:
            sync_folder(path.parent)
    except OSError as error:
        raise SteerError(f"could not write {path}: {error.strerror or error}.") from error
    return {**known, **there}


def _append(file: FileIO, whole: int, lines: bytes) -> None:
    """Write lines behind the whole ones."""
    file.truncate(whole)  # a line that a killed process began
    try:
        while lines:
            lines = lines[file.write(lines) :]
        os.fsync(file.fileno())
    except OSError:
        with contextlib.suppress(OSError):
            file.truncate(whole)
        raise


def _parse(content: bytes, path: Path) -> tuple[dict[str, str], int]:
    """Return the results in a file's content, the first for each key, and how many bytes of it are whole lines."""
    *lines, rest = content.split(b"\n")
    records = [_record(line) for line in lines]
    if None in records or not rest.startswith(_START[: len(rest)]):
        number = records.index(None) if None in records else len(lines)
        raise SteerError(
            f"line {number + 1} of {path} is no result of a study. Choose another file, or remove that line; what it "
            "was the result of is then done again."
        )
    known: dict[str, str] = {}
    for key, value in filter(None, records):
        known.setdefault(key, value)
    return known, len(content) - len(rest)


def _record(line: bytes) -> tuple[str, str] | None:
    """Return the key and the result of a line; None if it holds something else."""
    try:
        record = json.loads(line)
        if line.startswith(_START) and record.keys() == {"key", "value"}:
            return _canonical(record["key"]), _canonical(record["value"])
    except (ValueError, RecursionError):  # SteerError is a ValueError
        pass
    return None


def _canonical(value: Mapping[str, Any]) -> str:
    """Return the one text, in ASCII, of plain values by name."""
    if not isinstance(value, Mapping):
        raise SteerError(f"a result and its key are plain values by name; received {type(value).__name__}.")
    try:
        return json.dumps(value if isinstance(value, dict) else dict(value), sort_keys=True)
    except (TypeError, ValueError, RecursionError) as error:
        raise SteerError(f"a result and its key are plain numbers, texts and lists of them: {error}.") from error
