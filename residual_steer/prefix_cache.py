"""The frozen prefix, computed once: everything under the first block that trains is a constant of the data.

In the first epoch the output of the last frozen block is kept for every row; from then on the blocks below hand that
output through instead of computing it. Where something else than the next block stands behind one, a change of width or
the decoder behind an encoder, its output is kept too. Where all that trains in the first block above is a field beside
it, what the block itself computes is a constant as well, M(z) of eq. 1, and is kept besides, if there is room. A row is
known by its content, so that shuffling does not matter.

The model itself runs on from there. A module of the upper blocks alone, trained on a dataset of streams, would have to
repeat what every model does around its blocks: masks, positions, a decoder's reading of its encoder, head and loss.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map, tree_unflatten

from ._stream_store import StreamStore, digests, number_of_rows, prefix_key, refuse_augmentation
from .errors import SteerError
from .injector import Injector
from .registry import find_backbone
from .training.losses import rows_of
from .training.options import FitOptions, cache_makers
from .training.undisturbed import apart

__all__ = ["PrefixCache"]

GIB = 2**30


class PrefixCache:
    """Keep what leaves the frozen blocks of a model, and hand it through.

    Args:
        model: its backbone has to be a known one.
        train: the training data, looked at for its size and for augmentation.
        run: from a batch to its loss, by the model.
        options: `cache_prefix`, True for memory or a folder, and `cache_limit`, in GiB.
        precision: of the run.

    Raises:
        SteerError: nothing is frozen below, or the cache would change the result or grow beyond its limit.
    """

    def __init__(
        self, model: nn.Module, train: Any, run: Callable[[Any], Tensor], options: FitOptions, precision: str
    ) -> None:
        if any(type(module).__name__ == "OptimizedModule" for module in model.modules()):
            raise SteerError("`cache_prefix` stands in for blocks, which a compiled model does not ask any more.")
        refuse_augmentation(train)
        self._model, self._train, self._run, self._options, self._precision = model, train, run, options, precision
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
        self._seats = [_Seat(block) for block in self._frozen]
        self._places = _places(model, self._frozen)
        self._above = _steered_beside(blocks[self.depth]) if training else None
        self._hands_above = self._above is not None
        self._ends = [self.depth - 1]  # the last block of every run of frozen blocks that read one from another
        self._store: StreamStore | None = None
        self._spec: TreeSpec | None = None
        self._random: set[nn.Module] = set()  # blocks that drew random numbers
        self._proved = False
        self.hits = self.misses = self._epochs = 0

    @contextlib.contextmanager
    def over(self, batch: Any) -> Iterator[None]:
        """Run a batch through the cache: its frozen blocks are handed through if all its rows are known.

        Raises:
            SteerError: what leaves the frozen blocks is no constant of the batch, or cannot be told apart by row.
        """
        keys = digests(batch)
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
                store.add(key, [leaf[row].detach().cpu() for leaf in leaves])

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

    def report(self) -> dict[str, int]:
        """Return the blocks that are spared, rows and bytes that are kept, batches that were known and were not."""
        rows, size = (0, 0) if self._store is None else (len(self._store), self._store.bytes)
        return {"blocks": self.depth, "rows": rows, "bytes": size, "hits": self.hits, "misses": self.misses}

    def _begin(self, batch: Any) -> StreamStore:
        """Check on a first batch that the prefix is constant, estimate the size of all, and open the store."""
        rows = rows_of(batch)
        self._ends = self._find_ends(batch)
        runs = [self._run_below(batch, seed) for seed in (0, 1)]
        leaves, others = (self._leaves(calls[: len(self._ends)], rows, len(self._ends)) for calls in runs)
        if not _equal(leaves, others) or self._random.intersection(self._frozen):
            raise SteerError(
                "`cache_prefix` would change the result: what leaves the frozen blocks is random. Switch off the "
                f"dropout below block {self.depth}{self._dropouts()}, in the model's config or by its `p = 0`."
            )
        each = sum(leaf[0].nbytes for leaf in leaves)
        limit = int(self._options.cache_limit * GIB)
        number = number_of_rows(self._train)
        more = self._constant_above(runs, rows)
        if more is None or number is None or number * (each + more) > limit:
            self._above, self._hands_above = None, False
        self._leaves(runs[0][: self._kept], rows, self._kept)  # which notes their layout
        if number is not None and number * each > limit:
            raise SteerError(
                f"the streams of {number:,} rows, {each:,} bytes each, would take {number * each / GIB:.2g} GiB, and "
                f"`cache_limit` is {self._options.cache_limit:g}. Raise it, or steer fewer or lower blocks."
            )
        place, folder = self._options.cache_prefix, None
        if not isinstance(place, bool):
            folder = Path(place) / prefix_key(self._model, self._frozen, self._above, self._precision)
        self._store = StreamStore(folder, limit)
        return self._store

    def _constant_above(self, runs: Sequence[list[Any]], rows: int) -> int | None:
        """Return the bytes of a row of what the first block that is steered computes; None if that is no constant."""
        if self._above is None or self._above in self._random:
            return None
        if any(len(calls) != len(self._ends) + 1 for calls in runs):
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

        def below(index: int, args: Any, kwargs: Any) -> Any:
            if index - 1 in left and torch.equal(self._backbone.read(args, kwargs), left.pop(index - 1)):
                joined.add(index - 1)
            output = self._frozen[index](*args, **kwargs)
            left[index] = self._backbone.left(output)
            if index == self.depth - 1:
                raise _ReachedError
            return output

        self._run_apart(batch, 0, below, None)
        return [index for index in range(self.depth) if index not in joined]

    def _run_below(self, batch: Any, seed: int) -> list[Any]:
        """Run the model until what is kept has been computed; return what the ends of runs returned, and that."""
        calls: list[Any] = []

        def noting(block: nn.Module, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
            states = self._generators()
            output = call(*args, **kwargs)
            if not all(map(torch.equal, states, self._generators())):  # two runs may give the same by chance
                self._random.add(block)
            return output

        def below(index: int, args: Any, kwargs: Any) -> Any:
            output = noting(self._frozen[index], self._frozen[index], args, kwargs)
            if index in self._ends:
                calls.append(self._copied(output))
            if index == self.depth - 1 and self._above is None:
                raise _ReachedError
            return output

        def above(block: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
            calls.append(self._copied(noting(block, forward, args, kwargs)))
            raise _ReachedError

        self._run_apart(batch, seed, below, above)
        if not calls:
            raise SteerError("`cache_prefix` needs a loss that calls the model; this one did not reach its blocks.")
        return calls

    def _run_apart(self, batch: Any, seed: int, below: Any, above: Any) -> None:
        """Run a batch for its first blocks alone, with random numbers of its own."""
        with self._undisturbed(), contextlib.suppress(_ReachedError), self._standing_in(below, above):
            torch.manual_seed(seed)
            self._run(batch)

    def _prove(self, batch: Any, keys: Sequence[bytes]) -> None:
        """Compare one batch that is handed through with the same batch computed from the start, to rounding."""
        calls: list[Any] = []
        with torch.no_grad(), self._undisturbed(), self._watching(calls):
            expected = float(self._run(batch))
        half = self._precision != "no" or next(self._model.parameters()).dtype != torch.float32
        fresh, kept = self._leaves(calls, len(keys), self._kept), self._stored(keys)
        below = len(tree_flatten(calls[: len(self._ends)])[0])
        precision = 3e-2 if half else 1e-4

        def matches(actual: float) -> bool:
            return abs(actual - expected) <= precision * max(1.0, abs(expected))

        actual = math.nan
        if self._hands_above:
            with contextlib.suppress(Exception):  # whatever the model did with what the block did not compute
                actual = self._measured(batch, keys)
            self._hands_above = matches(actual) and _equal(kept[below:], fresh[below:], precision)
        if not self._hands_above:  # the first steered block is computed from now on
            actual = self._measured(batch, keys)
        if not matches(actual):
            raise SteerError(
                f"`cache_prefix` would change the result: a batch's loss is {expected:.6g}, and {actual:.6g} with its "
                "frozen blocks handed through. The model uses more of them than the stream, or hooks change it there."
            )
        if not _equal(kept[:below], fresh[:below], precision):
            raise SteerError(
                "`cache_prefix` would change the result: what leaves the frozen blocks for a row is not what it was "
                "in another batch. Rows depend on each other there."
            )
        self._proved = True

    def _measured(self, batch: Any, keys: Sequence[bytes]) -> float:
        with torch.no_grad(), self._undisturbed(), self._handing_through(keys):
            return float(self._run(batch))

    def _watching(self, calls: list[Any]) -> contextlib.AbstractContextManager[None]:
        """Note what the ends of runs return, and what the block above computes before its field adds to it."""

        def below(index: int, args: Any, kwargs: Any) -> Any:
            output = self._frozen[index](*args, **kwargs)
            if index in self._ends:
                calls.append(self._copied(output))
            return output

        def above(block: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            calls.append(self._copied(output))
            return output

        return self._standing_in(below, above)

    def _handing_through(self, keys: Sequence[bytes]) -> contextlib.AbstractContextManager[None]:
        """Let every frozen block return what the last one of its run returned for these rows.

        What was kept is what its hooks had made of it, those of frozen fields among them; so they do not run again. Of
        the block above it is what they begin with.
        """
        outputs = [] if self._spec is None else tree_unflatten(self._stored(keys), self._spec)
        which = [sum(end < index for end in self._ends) for index in range(self.depth)]
        above = (lambda *_: outputs[-1]) if self._hands_above else None
        return self._standing_in(lambda index, *_: outputs[which[index]], above)

    @contextlib.contextmanager
    def _standing_in(self, below: Any, above: Any) -> Iterator[None]:
        """Let a seat stand in the place of every frozen block, and call `below` with its index, args and kwargs.

        The block above keeps its place and its hooks; `above` is called in place of its forward, with both.
        """
        block = self._above if above is not None else None
        own = None if block is None else vars(block).get("forward")
        for index, seat in enumerate(self._seats):
            seat.call = partial(below, index)
        try:
            for parent, name, index in self._places:
                setattr(parent, name, self._seats[index])
            if block is not None:
                forward = block.forward
                vars(block)["forward"] = lambda *args, **kwargs: above(block, forward, args, kwargs)
            yield
        finally:
            for parent, name, index in self._places:
                setattr(parent, name, self._frozen[index])
            if block is not None:
                vars(block).pop("forward", None)
                vars(block).update({} if own is None else {"forward": own})

    def _stored(self, keys: Sequence[bytes]) -> list[Any]:
        """Return what is kept of these rows, as one batch, on the model's device."""
        device = next(self._model.parameters()).device
        rows = [] if self._store is None else [self._store.get(key) for key in keys]
        return [torch.stack(parts).to(device) for parts in zip(*rows, strict=True)]

    def _copied(self, output: Any) -> Any:
        """Return what a block returned, safe from a block behind it that works in place."""
        if not self._backbone.inplace:
            return output
        return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, output)

    def _generators(self) -> list[Tensor]:
        """Return the states of the generators that a block may draw from."""
        device = next(self._model.parameters()).device
        return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]

    @contextlib.contextmanager
    def _undisturbed(self) -> Iterator[None]:
        """Leave random generators and buffers, such as running statistics, as they were."""
        buffers = [(buffer, buffer.clone()) for buffer in self._model.buffers()]
        with apart():
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
        """Return the tensors in what as many blocks returned as expected; raise if they are no constants of rows."""
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
                above = self._above_frozen()
                names = [n for n, p in self._model.named_parameters() if p.requires_grad and id(p) not in above]
                raise SteerError(
                    f"`cache_prefix` would change the result: {', '.join(names[:6]) or 'something'} trains, and the "
                    "frozen blocks depend on it. Leave it out of `train`."
                )
        return list(leaves)

    def _above_frozen(self) -> set[int]:
        """Return the ids of the modules and parameters of the blocks that are not handed through."""
        blocks = self._backbone.blocks[self.depth :]
        return {id(part) for block in blocks for part in (*block.modules(), *block.parameters())}

    def _dropouts(self) -> str:
        above = self._above_frozen()
        names = [
            name
            for name, module in self._model.named_modules()
            if "drop" in type(module).__name__.lower()
            and id(module) not in above
            and any(getattr(module, rate, None) for rate in ("p", "drop_prob"))
        ]
        return f" ({', '.join(names[:4])}{', …' if len(names) > 4 else ''})" if names else ""


cache_makers.append(PrefixCache)


class _Seat(nn.Module):
    """What stands in a block's place: to a model that asks about it, it is that block."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        vars(self)["block"] = block  # no child: it has another place
        self.call: Callable[[Any, Any], Any] = lambda args, kwargs: block(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(args, kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["block"], name)

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        return type(vars(self)["block"])


class _ReachedError(Exception):
    """The last frozen block is done."""


def _places(model: nn.Module, blocks: Sequence[nn.Module]) -> list[tuple[nn.Module, str, int]]:
    """Return every place where one of these blocks stands: the module around it, its name there, and which it is."""
    index = {id(block): i for i, block in enumerate(blocks)}
    found = []
    for path, module in model.named_modules(remove_duplicate=False):
        if id(module) in index:
            parent, _, name = path.rpartition(".")
            found.append((model.get_submodule(parent), name, index[id(module)]))
    return found


def _steered_beside(block: nn.Module) -> nn.Module | None:
    """Return a block if all that trains in it, or is put into it, is beside the whole block."""
    outside = [part for part in block.children() if isinstance(part, Injector)]
    apart_from_it = {id(module) for part in outside for module in part.modules()}
    for module in block.modules():
        if id(module) in apart_from_it:
            continue
        if isinstance(module, Injector) or any(p.requires_grad for p in module.parameters(recurse=False)):
            return None
    return block


def _equal(leaves: Sequence[Tensor], others: Sequence[Tensor], precision: float = 1e-5) -> bool:
    """Return whether two runs gave the same, to a precision of the largest number."""
    return all(
        torch.allclose(leaf, other, rtol=10 * precision, atol=precision * float(leaf.abs().max()))
        for leaf, other in zip(leaves, others, strict=True)
    )
