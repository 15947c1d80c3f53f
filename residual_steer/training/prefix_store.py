"""Where the streams that leave a frozen prefix are kept, row by row: in memory, or in a file that is mapped into it."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from residual_steer import files
from residual_steer.errors import SteerError
from residual_steer.files import make_folder, write_whole

__all__ = ["DiskStore", "MemoryStore"]

Row = list[Tensor]


class MemoryStore:
    """Keep rows in memory.

    Args:
        limit: bytes that are kept at most.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.bytes = limit, 0
        self._rows: dict[bytes, Row] = {}

    def __contains__(self, key: bytes) -> bool:
        return key in self._rows

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, key: bytes, row: Row) -> None:
        """Keep one row, unless that goes beyond the limit."""
        size = sum(tensor.nbytes for tensor in row)
        if self.bytes + size <= self.limit:
            self._rows[key] = [tensor.clone() for tensor in row]
            self.bytes += size

    def get(self, keys: Sequence[bytes]) -> list[Row]:
        """Return rows that are here."""
        return [self._rows[key] for key in keys]

    def flush(self) -> None:
        """Do nothing: memory needs no second writing."""

    def close(self) -> None:
        """Let go of the rows."""
        self._rows.clear()


class DiskStore:
    """Keep rows in `streams.bin` of a folder, and where each begins in `index.safetensors`.

    Rows are appended and the index is written whole, so that what a killed run leaves is as of its last `flush`.

    Args:
        folder: made if it is not there.
        limit: bytes that are kept at most.

    Raises:
        SteerError: the folder cannot be written, is in use by another run, or holds something else.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        make_folder(folder)
        self.limit = limit
        self._folder = folder
        self._rows: dict[bytes, tuple[int, int]] = {}  # key to the place of its bytes and its layout
        self._layouts: list[list[tuple[str, list[int]]]] = []
        self._dirty = False
        try:
            self._lock = _hold(folder / "lock")
            self._file = (folder / "streams.bin").open("a+b")
        except OSError as error:
            raise SteerError(
                f"could not open the cache of streams in {folder}: {error.strerror or error}. Choose a folder that can "
                "be written and that no other run uses."
            ) from error
        self.bytes = self._read_index()
        self._file.truncate(self.bytes)  # rows after the last flush are in no index
        self._map: np.ndarray[Any, Any] | None = None

    def __contains__(self, key: bytes) -> bool:
        return key in self._rows

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, key: bytes, row: Row) -> None:
        """Append one row, unless that goes beyond the limit.

        Raises:
            SteerError: the disk is full.
        """
        content = b"".join(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() for tensor in row)
        if self.bytes + len(content) > self.limit:
            return
        layout = [(str(tensor.dtype).removeprefix("torch."), list(tensor.shape)) for tensor in row]
        if layout not in self._layouts:
            self._layouts.append(layout)
        try:
            self._file.write(content)
        except OSError as error:
            raise SteerError(f"could not write the cache of streams in {self._folder}: {error.strerror}.") from error
        self._rows[key] = self.bytes, self._layouts.index(layout)
        self.bytes += len(content)
        self._dirty = True

    def get(self, keys: Sequence[bytes]) -> list[Row]:
        """Return rows that are here, read through the map of the file."""
        if self._map is None or len(self._map) < self.bytes:
            self._file.flush()
            self._map = np.memmap(self._folder / "streams.bin", dtype=np.uint8, mode="r")
        return [self._read(self._map, *self._rows[key]) for key in keys]

    def flush(self) -> None:
        """Put everything that was added in the index.

        Raises:
            SteerError: the disk is full; the index is as it was.
        """
        if not self._dirty:
            return
        self._file.flush()
        os.fsync(self._file.fileno())
        index = {
            "keys": torch.from_numpy(np.frombuffer(b"".join(self._rows), dtype=np.uint8).copy()),
            "places": torch.tensor(list(self._rows.values()), dtype=torch.int64),
        }
        text = json.dumps({"layouts": self._layouts, "bytes": self.bytes})
        write_whole({self._folder / "index.safetensors": safetensors.torch.save(index, {"streams": text})})
        self._dirty = False

    def close(self) -> None:
        """Flush, and let others use the folder."""
        with contextlib.suppress(SteerError, ValueError):  # ValueError: it is closed already
            self.flush()
        self._map = None
        self._file.close()
        self._lock.close()

    def _read(self, content: np.ndarray[Any, Any], place: int, layout: int) -> Row:
        row = []
        for name, shape in self._layouts[layout]:
            dtype: torch.dtype = getattr(torch, name)
            size = dtype.itemsize * int(np.prod(shape, dtype=np.int64))
            row.append(torch.from_numpy(np.array(content[place : place + size])).view(dtype).view(shape))
            place += size
        return row

    def _read_index(self) -> int:
        """Fill in what the index says; an index that is damaged or says more than is there counts as none."""
        try:
            content = (self._folder / "index.safetensors").read_bytes()
            header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
            told = json.loads(header["__metadata__"]["streams"])
            index = safetensors.torch.load(content)
            keys, places = index["keys"].numpy().tobytes(), index["places"].tolist()
            width = len(keys) // max(1, len(places))
            size = int(told["bytes"])
            if os.fstat(self._file.fileno()).st_size < size:
                return 0
            self._layouts = [[(str(name), list(shape)) for name, shape in layout] for layout in told["layouts"]]
            self._rows = {
                keys[width * i : width * (i + 1)]: (place, layout) for i, (place, layout) in enumerate(places)
            }
        except FileNotFoundError:
            return 0
        except Exception:  # damaged bytes can fail in any way, and cost no more than computing again
            self._rows, self._layouts = {}, []
            return 0
        return size


def _hold(path: Path) -> BinaryIO:
    """Hold a file that no other run holds; the system lets go of it however the run ends.

    Raises:
        OSError: another run holds it.
    """
    file = path.open("ab")
    if files.fcntl is not None and not files.lock(file, wait=False):
        file.close()
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
    return file
