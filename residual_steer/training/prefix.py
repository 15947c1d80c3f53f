"""The frozen prefix, computed once: everything under the first block that trains is a constant of the data.

In the first epoch the output of the last frozen block is kept for every row; from then on the blocks below hand that
output through instead of computing it. Where something else than the next block stands behind one, a change of width or
the decoder behind an encoder, its output is kept too. Where all that trains in the first block above is a field beside
it, what the block itself computes is a constant as well, M(z) of eq. 1, and is kept besides, if there is room. A row is
known by its content, so that shuffling does not matter.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from residual_steer.errors import SteerError
from residual_steer.injector import Injector
from residual_steer.registry import find_backbone

from . import randomness
from .losses import Loss, measure, rows_of
from .options import FitOptions
from .prefix_store import DiskStore, MemoryStore

__all__ = ["Prefix"]

GIB = 2**30


class Prefix:
    """Keep what leaves the frozen blocks of a model, and hand it through.

    Args:
        model: its backbone has to be a known one.
        train: the training data, looked at for its size and for augmentation.
        loss: as in `fit`.
        options: `cache_prefix`, True for memory or a folder, and `cache_limit`, in GiB.

    Raises:
        SteerError: nothing is frozen below, or the cache would change the result or grow beyond its limit.
    """

    def __init__(self, model: nn.Module, train: Any, loss: Loss | None, options: FitOptions) -> None:
        _refuse_compiled(model)
        _refuse_augmentation(train)
        self._model, self._train, self._loss, self._options = model, train, loss, options
        self._backbone = find_backbone(model)
        blocks = self._backbone.blocks
        training = [i for i, block in enumerate(blocks) if any(p.requires_grad for p in block.parameters())]
        self.depth = training[0] if training else len(blocks)
        if self.depth == 0:
            raise SteerError(
                "`cache_prefix` keeps what leaves the blocks below the first one that trains; here the first block "
                "trains. Steer the upper blocks only, with `layers`."
            )
        self._frozen = list(blocks[: self.depth])
        self._above = _steered_beside(blocks[self.depth]) if training else None
        self._ends = [self.depth - 1]  # the last block of every run of frozen blocks that read one from another
        self._store: MemoryStore | DiskStore | None = None
        self._spec: TreeSpec | None = None
        self._proved = False
        self.hits = self.misses = self._epochs = 0

    @contextlib.contextmanager
    def over(self, batch: Any) -> Iterator[None]:
        """Run a batch through the cache: its frozen blocks are handed through if all its rows are known.

        Raises:
            SteerError: what leaves the frozen blocks is no constant of the batch, or cannot be told apart by row.
        """
        keys = _digests(batch)
        store = self._begin(batch) if self._store is None else self._store
        if self._spec is not None and all(key in store for key in keys):
            self.hits += 1
            if not self._proved:
                self._prove(batch, keys)
            with self._handing_through(keys):
                yield
            return
        self.misses += 1
        calls: list[Any] = []
        with self._watching(calls):
            yield
        leaves = self._leaves(calls, len(keys), self._kept)
        for row, key in enumerate(keys):
            if key not in store:
                store.add(key, [leaf[row].cpu() for leaf in leaves])

    def end_epoch(self) -> None:
        """Write what is kept; warn if a second epoch found none of it."""
        if self._store is not None:
            self._store.flush()
        self._epochs += 1
        if self._epochs == 2 and not self.hits:
            warnings.warn(
                "`cache_prefix` found no batch of the second epoch among the rows of the first: the data change from "
                "epoch to epoch (augmentation, padding to the longest row of a batch), so that nothing is saved.",
                stacklevel=2,
            )

    def close(self) -> None:
        """Let go of what is kept in memory, and of the folder."""
        if self._store is not None:
            self._store.close()

    def told(self) -> dict[str, int]:
        """Return what `History.cache` tells."""
        rows, size = (0, 0) if self._store is None else (len(self._store), self._store.bytes)
        return {"blocks": self.depth, "rows": rows, "bytes": size, "hits": self.hits, "misses": self.misses}

    def _begin(self, batch: Any) -> MemoryStore | DiskStore:
        """Check on a first batch that the prefix is constant, estimate the size of all, and open the store.

        Raises:
            SteerError: it is not, or the streams of all rows would take more than the limit.
        """
        rows = rows_of(batch)
        self._ends = self._find_ends(batch)
        runs = [self._run_below(batch, seed) for seed in (0, 1)]
        leaves, others = (self._leaves(calls[: len(self._ends)], rows, len(self._ends)) for calls in runs)
        if not _equal(leaves, others):
            raise SteerError(
                "`cache_prefix` would change the result: what leaves the frozen blocks is random. Switch off the "
                f"dropout below block {self.depth}{self._dropouts()}, in the model's config or by its `p = 0`."
            )
        each = sum(leaf[0].nbytes for leaf in leaves)
        limit = int(self._options.cache_limit * GIB)
        number = _number_of_rows(self._train)
        more = self._constant_above(runs, rows)
        if more is None or (number is not None and number * (each + more) > limit):
            self._above = None
        self._leaves(runs[0][: self._kept], rows, self._kept)  # which notes their layout
        if number is not None and number * each > limit:
            raise SteerError(
                f"the streams of {number:,} rows, {each:,} bytes each, would take {number * each / GIB:.2g} GiB, and "
                f"`cache_limit` is {self._options.cache_limit:g}. Raise it, or steer fewer or lower blocks."
            )
        place = self._options.cache_prefix
        if isinstance(place, bool):
            self._store = MemoryStore(limit)
        else:
            self._store = DiskStore(Path(place) / self._key(), limit)
        return self._store

    def _constant_above(self, runs: Sequence[list[Any]], rows: int) -> int | None:
        """Return the bytes of a row of what the first block that is steered computes; None if that is no constant."""
        if self._above is None or any(len(calls) != len(self._ends) + 1 for calls in runs):
            return None
        leaves, others = (tree_flatten(calls[-1])[0] for calls in runs)
        for leaf in leaves:
            if not isinstance(leaf, Tensor) or leaf.dim() == 0 or leaf.shape[0] != rows or leaf.requires_grad:
                return None
        return sum(leaf[0].nbytes for leaf in leaves) if _equal(leaves, others) else None

    def _find_ends(self, batch: Any) -> list[int]:
        """Return the frozen blocks behind which something else than the next one stands, and the last one."""
        joined: set[int] = set()
        left: dict[int, Tensor] = {}
        handles = []
        for index, block in enumerate(self._frozen):

            def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], index: int = index) -> None:
                if index - 1 in left and torch.equal(self._backbone.read(args, kwargs), left.pop(index - 1)):
                    joined.add(index - 1)

            def leave(_: nn.Module, args: tuple[Any, ...], output: Any, index: int = index) -> None:
                left[index] = self._backbone.left(output)

            handles += [block.register_forward_pre_hook(enter, with_kwargs=True), block.register_forward_hook(leave)]
        try:
            self._run_below(batch, 0)
        finally:
            for handle in handles:
                handle.remove()
        return [index for index in range(self.depth) if index not in joined]

    def _run_below(self, batch: Any, seed: int) -> list[Any]:
        """Run the model until what is kept has been computed, and return what the ends of runs returned, and that.

        Raises:
            SteerError: the loss does not get there.
        """
        calls: list[Any] = []

        def stop(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if self._above is not None:
                calls.append(output)
            raise _ReachedError

        with self._undisturbed(), self._watching(calls, above=False), contextlib.suppress(_ReachedError):
            torch.manual_seed(seed)
            if self._above is None:
                handle = self._frozen[-1].register_forward_hook(stop)
            else:
                handle = self._above.register_forward_hook(stop, prepend=True)
            try:
                measure(self._model, batch, self._loss)
            finally:
                handle.remove()
        if not calls:
            raise SteerError("`cache_prefix` needs a loss that calls the model; this one did not reach its blocks.")
        return calls

    def _prove(self, batch: Any, keys: Sequence[bytes]) -> None:
        """Compare one batch that is handed through with the same batch computed from the start.

        Raises:
            SteerError: the losses differ by more than rounding.
        """
        with torch.no_grad(), self._undisturbed():
            expected = float(measure(self._model, batch, self._loss).loss)
        with torch.no_grad(), self._undisturbed(), self._handing_through(keys):
            actual = float(measure(self._model, batch, self._loss).loss)
        half = self._options.precision in ("bf16", "fp16") or next(self._model.parameters()).dtype != torch.float32
        if abs(actual - expected) > (3e-2 if half else 1e-4) * max(1.0, abs(expected)):
            raise SteerError(
                f"`cache_prefix` would change the result: a batch's loss is {expected:.6g}, and {actual:.6g} with its "
                "frozen blocks handed through. The model uses more of them than the stream, or hooks change it there."
            )
        self._proved = True

    @contextlib.contextmanager
    def _watching(self, calls: list[Any], above: bool = True) -> Iterator[None]:
        def note(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            calls.append(output)

        handles = [self._frozen[end].register_forward_hook(note) for end in self._ends]
        if above and self._above is not None:
            handles.append(self._above.register_forward_hook(note, prepend=True))  # before what its field adds
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextlib.contextmanager
    def _handing_through(self, keys: Sequence[bytes]) -> Iterator[None]:
        """Let every frozen block return what the last one of its run returned for these rows.

        What was kept is what its hooks had made of it, those of frozen fields among them; so they do not run again. Of
        the block above it is what they begin with.
        """
        device = next(self._model.parameters()).device
        rows = [] if self._store is None else self._store.get(keys)
        leaves: list[Any] = [torch.stack(parts).to(device) for parts in zip(*rows, strict=True)]
        outputs = [] if self._spec is None else tree_unflatten(leaves, self._spec)
        names = ("forward", "_forward_hooks", "_forward_pre_hooks")
        replaced = self._frozen if self._above is None else [*self._frozen, self._above]
        own = [(block, {name: block.__dict__[name] for name in names if name in block.__dict__}) for block in replaced]
        for index, block in enumerate(self._frozen):
            output = outputs[sum(end < index for end in self._ends)]
            block.__dict__.update(
                forward=lambda *_, output=output, **__: output,
                _forward_hooks=OrderedDict(),
                _forward_pre_hooks=OrderedDict(),
            )
        if self._above is not None:
            self._above.__dict__["forward"] = lambda *_, **__: outputs[-1]
        try:
            yield
        finally:
            for block, kept in own:
                block.__dict__.pop("forward")
                block.__dict__.update(kept)

    @contextlib.contextmanager
    def _undisturbed(self) -> Iterator[None]:
        """Leave random generators and buffers, such as running statistics, as they were."""
        buffers = [(buffer, buffer.clone()) for buffer in self._model.buffers()]
        with randomness.apart():
            try:
                yield
            finally:
                with torch.no_grad():
                    for buffer, value in buffers:
                        buffer.copy_(value)

    @property
    def _kept(self) -> int:
        """How many blocks' outputs are kept."""
        return len(self._ends) + (self._above is not None)

    def _leaves(self, calls: list[Any], rows: int, expected: int) -> list[Tensor]:
        """Return the tensors in what as many blocks returned as expected.

        Raises:
            SteerError: there is more than one call, something trains below, or a tensor is not told apart by row.
        """
        if len(calls) != expected:
            raise SteerError(
                "`cache_prefix` needs a loss that calls the model once for a batch; this one called it, or the model "
                f"its frozen blocks, {len(calls) / expected:g} times."
            )
        leaves, self._spec = tree_flatten(calls)
        for leaf in leaves:
            if not isinstance(leaf, Tensor) or leaf.dim() == 0 or leaf.shape[0] != rows:
                shape = tuple(leaf.shape) if isinstance(leaf, Tensor) else type(leaf).__name__
                raise SteerError(
                    f"`cache_prefix` keeps tensors whose first dimension is the batch's, here {rows}; a frozen block "
                    f"returned {shape}."
                )
            if leaf.requires_grad:
                raise SteerError(
                    f"`cache_prefix` would change the result: {self._trained_below()} trains, and the frozen blocks "
                    "depend on it. Leave it out of `train`."
                )
        return list(leaves)

    def _trained_below(self) -> str:
        above = {id(p) for block in find_backbone(self._model).blocks[self.depth :] for p in block.parameters()}
        names = [name for name, p in self._model.named_parameters() if p.requires_grad and id(p) not in above]
        return ", ".join(names[:6]) or "something"

    def _dropouts(self) -> str:
        above = {id(m) for block in find_backbone(self._model).blocks[self.depth :] for m in block.modules()}
        names = [
            name
            for name, module in self._model.named_modules()
            if "drop" in type(module).__name__.lower()
            and id(module) not in above
            and any(getattr(module, rate, None) for rate in ("p", "drop_prob"))
        ]
        return f" ({', '.join(names[:4])}{', …' if len(names) > 4 else ''})" if names else ""

    def _key(self) -> str:
        """Name what the streams depend on beside the rows: the frozen weights, the code's versions, the precision."""
        digest = hashlib.sha256()
        modules = (self._model, *self._frozen)
        packages = {type(module).__module__.partition(".")[0] for module in modules}
        config: Any = getattr(self._model, "config", None)
        told = {
            "classes": [f"{type(module).__module__}.{type(module).__qualname__}" for module in modules],
            "blocks": [str(block) for block in self._frozen],  # which tells of fields that act there, frozen
            "versions": {package: _version(package) for package in sorted(packages)},
            "config": config.to_dict() if hasattr(config, "to_dict") else None,
            "depth": self.depth,
            "above": self._above is not None,
            "precision": self._options.precision,
            "torch": torch.__version__,
            "device": next(self._model.parameters()).device.type,
        }
        digest.update(json.dumps(told, sort_keys=True, default=repr).encode())
        for name, tensor in (*self._model.named_parameters(), *self._model.named_buffers()):
            if not tensor.requires_grad:
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(_bytes(tensor))
        return digest.hexdigest()[:32]


def _steered_beside(block: nn.Module) -> nn.Module | None:
    """Return a block if all that trains in it, or is put into it, is beside the whole block."""
    outside = [part for part in block.children() if isinstance(part, Injector)]
    apart = {id(module) for part in outside for module in part.modules()}
    for module in block.modules():
        if id(module) in apart:
            continue
        if isinstance(module, Injector) or any(p is not None and p.requires_grad for p in module._parameters.values()):
            return None
    return block


def _equal(leaves: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    """Say whether two runs gave the same, to rounding."""
    return all(
        torch.allclose(leaf, other, rtol=1e-4, atol=1e-5 * float(leaf.abs().max()))
        for leaf, other in zip(leaves, others, strict=True)
    )


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


class _ReachedError(Exception):
    """The last frozen block is done."""


def _digests(batch: Any) -> list[bytes]:
    """Return a digest of the content of every row.

    Raises:
        SteerError: the batch holds something without rows.
    """
    leaves, spec = tree_flatten(dict(batch) if isinstance(batch, Mapping) else batch)
    rows = rows_of(batch)
    shared = hashlib.blake2b(repr(spec).encode(), digest_size=16)
    found = [shared.copy() for _ in range(rows)]
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


def _number_of_rows(train: Any) -> int | None:
    dataset: Any = getattr(train, "dataset", None)
    if hasattr(dataset, "__len__"):
        return len(dataset)
    return sum(rows_of(batch) for batch in train) if isinstance(train, (list, tuple)) else None


def _refuse_augmentation(train: Any) -> None:
    """Read a few examples twice.

    Raises:
        SteerError: they came out differently.
    """
    dataset: Any = getattr(train, "dataset", None)
    collate = getattr(train, "collate_fn", None)
    if collate is None or not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__") or not len(dataset):
        return
    chosen = sorted({i * (len(dataset) - 1) // 7 for i in range(8)})
    with randomness.apart():
        try:
            one, other = (_digests(collate([dataset[i] for i in chosen])) for _ in range(2))
        except SteerError:  # said again, with the real batch
            return
    if one != other:
        raise SteerError(
            "`cache_prefix` would change the result: the training data are augmented, an example read twice came out "
            "differently. Train without augmentation, or without the cache."
        )


def _refuse_compiled(model: nn.Module) -> None:
    if any(type(module).__name__ == "OptimizedModule" for module in model.modules()):
        raise SteerError("`cache_prefix` hands blocks through by their `forward`, which a compiled model does not ask.")
