"""What is finished is not done again: a file of results, one line each, found by what they are results of."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from residual_steer.errors import SteerError
from residual_steer.files import make_folder

__all__ = ["Ledger"]

Key = Mapping[str, Any]
Value = dict[str, Any]


class Ledger:
    """Results by key, in memory and, if there is a path, in a file of JSON lines.

    A line is on disk before `add` returns. A run that is killed loses the result it was working on and no other: the
    line that was being written is not whole, and is left out when the file is read.

    Args:
        path: the file, made with its folder if it is not there; None keeps the results in memory.

    Raises:
        SteerError: the file cannot be read or made, or holds something else.

    >>> ledger = Ledger()
    >>> ledger.get_or({"seed": 0}, lambda: {"loss": 0.5}), ledger.get_or({"seed": 0}, lambda: {"loss": 0.7})
    ({'loss': 0.5}, {'loss': 0.5})
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self._known: dict[str, Value] = {}
        self._whole = 0  # bytes of whole lines
        if path is not None:
            make_folder(path.parent)
            self._read(path)

    def __len__(self) -> int:
        """Return the number of results."""
        return len(self._known)

    def __contains__(self, key: Key) -> bool:
        """Say whether there is a result for `key`."""
        return _canonical(key) in self._known

    def get_or(self, key: Key, make: Callable[[], Value]) -> Value:
        """Return the result for `key`, made now if there is none.

        Args:
            key: plain values by name.
            make: gives the result, plain values by name.

        Raises:
            SteerError: key or result hold something that JSON does not, or the file cannot be written.
        """
        text = _canonical(key)
        if text not in self._known:
            value = json.loads(_canonical(make()))  # as it will be read back
            if self.path is not None:
                self._append(self.path, {"key": json.loads(text), "value": value})
            self._known[text] = value
        return self._known[text]

    def _append(self, path: Path, line: Value) -> None:
        try:
            with path.open("r+b" if path.exists() else "w+b") as file:
                file.truncate(self._whole)
                file.seek(self._whole)
                file.write((_canonical(line) + "\n").encode())
                file.flush()
                os.fsync(file.fileno())
                self._whole = file.tell()
        except OSError as error:
            raise SteerError(f"could not write {path}: {error.strerror or error}.") from error

    def _read(self, path: Path) -> None:
        try:
            content = path.read_bytes() if path.exists() else b""
        except OSError as error:
            raise SteerError(f"could not read {path}: {error.strerror or error}.") from error
        lines = content.splitlines(keepends=True)
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line)
                self._known[_canonical(record["key"])] = dict(record["value"])
            except (ValueError, KeyError, TypeError) as error:
                if number == len(lines) and not line.endswith(b"\n"):  # it was being written when the run was killed
                    return
                raise SteerError(f"line {number} of {path} is no result. Remove the file to begin anew.") from error
            if not line.endswith(b"\n"):
                return
            self._whole += len(line)


def _canonical(value: Key) -> str:
    """Return the one text of plain values.

    Raises:
        SteerError: JSON has no such values.
    """
    try:
        return json.dumps(value, sort_keys=True, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise SteerError(f"a result and its key are plain numbers, texts and lists of them: {error}.") from error
