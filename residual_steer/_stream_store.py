"""Where the streams that leave a frozen prefix are kept, and by what a row of data and a prefix are known."""

from __future__ import annotations

import contextlib
import hashlib
import json
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from ._batches import rows_of
from ._checks import release_of
from ._files import make_folder
from ._undisturbed import apart
from .errors import SteerError
from .injector import Injector


class StreamStore:
    """Rows of tensors by their keys, up to a limit in bytes, in SQLite: in memory, or in `streams.sqlite` of a folder.

    What a killed run leaves is as of its last `flush`. A file that is damaged is begun anew.
    """

    def __init__(self, folder: Path | None, limit: int) -> None:
        self._place, self.limit = folder, limit
        if folder is not None:
            make_folder(folder)
        path = None if folder is None else folder / "streams.sqlite"
        try:
            try:
                self._sizes = self._open(path)
            except sqlite3.OperationalError:
                raise
            except sqlite3.DatabaseError:  # damaged, which costs no more than computing again
                self._rows.close()
                if path is not None:
                    path.unlink()
                self._sizes = self._open(path)
        except (OSError, sqlite3.Error) as error:
            raise SteerError(
                f"could not open the cache of streams in {folder}: {error}. Choose a folder that can be written and "
                "that no other run uses."
            ) from error
        self.bytes = sum(self._sizes.values())

    def _open(self, path: Path | None) -> dict[bytes, int]:
        """Return the sizes of the rows that are there by their keys, once this run alone has them."""
        self._rows = sqlite3.connect(":memory:" if path is None else path, timeout=0, isolation_level="IMMEDIATE")
        self._rows.execute("PRAGMA locking_mode = EXCLUSIVE")
        self._rows.execute("BEGIN EXCLUSIVE")
        self._rows.execute("CREATE TABLE IF NOT EXISTS rows (key BLOB PRIMARY KEY, size INTEGER, content BLOB)")
        self._rows.commit()
        if self._rows.execute("PRAGMA quick_check").fetchone() != ("ok",):
            raise sqlite3.DatabaseError("damaged")
        return dict(self._rows.execute("SELECT key, size FROM rows"))

    def __contains__(self, key: bytes) -> bool:
        return key in self._sizes

    def __len__(self) -> int:
        return len(self._sizes)

    def add(self, key: bytes, row: Sequence[Tensor]) -> None:
        """Keep one row, unless that goes beyond the limit."""
        size = sum(tensor.nbytes for tensor in row)
        if self.bytes + size > self.limit:
            return
        content = safetensors.torch.save({str(i): tensor.contiguous() for i, tensor in enumerate(row)})
        with self._writing():
            self._rows.execute("INSERT INTO rows VALUES (?, ?, ?)", (key, size, content))
        self._sizes[key] = size
        self.bytes += size

    def get(self, key: bytes) -> list[Tensor]:
        """Return a row that is here."""
        (content,) = self._rows.execute("SELECT content FROM rows WHERE key = ?", (key,)).fetchone()
        tensors = safetensors.torch.load(content)
        return [tensors[str(i)] for i in range(len(tensors))]

    def find(self, key: bytes) -> list[Tensor] | None:
        """Return a row if it is here."""
        return self.get(key) if key in self else None

    def flush(self) -> None:
        """Put everything that was added on the disk."""
        with self._writing():
            self._rows.commit()

    def close(self) -> None:
        """Flush, and let others use the folder."""
        with contextlib.suppress(SteerError):
            self.flush()
        self._rows.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise SteerError(f"could not write the cache of streams in {self._place}: {error}.") from error


def prefix_key(model: nn.Module, frozen: Sequence[nn.Module], above: nn.Module | None, precision: str) -> str:
    """Name what streams depend on beside the rows: the frozen weights, the code's versions, the precision.

    What the block `above` the frozen ones computes is kept too, unless it is None; the fields beside it do not matter.
    """
    modules = (model, *frozen, *(() if above is None else (above,)))
    packages = {"residual_steer", *(type(module).__module__.partition(".")[0] for module in modules)}
    config: Any = getattr(model, "config", None)
    own = [] if above is None else [part for part in above.named_children() if not isinstance(part[1], Injector)]
    facts = {
        "classes": [f"{type(module).__module__}.{type(module).__qualname__}" for module in modules],
        "blocks": [str(block) for block in frozen],  # with the fields that act there, frozen
        "above": None if above is None else [f"{name}: {part}" for name, part in own],
        "versions": {package: release_of(package) for package in sorted(packages)},
        "config": config.to_dict() if hasattr(config, "to_dict") else None,
        "depth": len(frozen),
        "precision": precision,
        "torch": torch.__version__,
        "device": next(model.parameters()).device.type,
    }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=repr).encode())
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if not tensor.requires_grad:
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(_bytes(tensor))
    return digest.hexdigest()[:32]


def digests(batch: Any) -> list[bytes]:
    """Return a digest of the content of every row; raise if the batch holds something without rows."""
    leaves, spec = tree_flatten(dict(batch) if isinstance(batch, Mapping) else batch)
    rows = rows_of(batch)
    found = [hashlib.blake2b(repr(spec).encode(), digest_size=16) for _ in range(rows)]
    for leaf in leaves:
        if not isinstance(leaf, Tensor) or leaf.dim() == 0 or leaf.shape[0] != rows:
            shape = tuple(leaf.shape) if isinstance(leaf, Tensor) else repr(leaf)
            raise SteerError(
                f"`cache_prefix` knows rows by their content: every tensor of a batch has them in its first dimension, "
                f"here {rows}; this batch has {shape}."
            )
        for row, digest in zip(leaf.detach().cpu(), found, strict=True):
            digest.update(f"{leaf.dtype} {tuple(row.shape)}".encode())
            digest.update(_bytes(row))
    return [digest.digest() for digest in found]


def _bytes(tensor: Tensor) -> bytes:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def number_of_rows(train: Any) -> int | None:
    """Return how many rows the training data have; None where they do not tell."""
    dataset: Any = getattr(train, "dataset", None)
    if hasattr(dataset, "__len__"):
        return len(dataset)
    return sum(rows_of(batch) for batch in train) if isinstance(train, (list, tuple)) else None


def refuse_augmentation(train: Any) -> None:
    """Raise if a few examples that are read twice come out differently."""
    dataset: Any = getattr(train, "dataset", None)
    collate = getattr(train, "collate_fn", None)
    if collate is None or not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__") or not len(dataset):
        return
    chosen = sorted({i * (len(dataset) - 1) // 7 for i in range(8)})
    with apart():
        try:
            one, other = (digests(collate([dataset[i] for i in chosen])) for _ in range(2))
        except SteerError:  # raised again for the first batch
            return
    if one != other:
        raise SteerError(
            "`cache_prefix` would change the result: the training data are augmented, an example read twice came out "
            "differently. Train without augmentation, or without the cache."
        )
