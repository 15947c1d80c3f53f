"""The frozen prefix, computed once: everything under the first block that trains is a constant of the data.

Where all that trains in that block is a field beside it, M(z) of eq. 1 is a constant too. The model itself runs on from
there: a module of the upper blocks alone would have to repeat masks, positions, head and loss.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map, tree_unflatten

from ._batches import rows_of
from ._internals import answering, is_compiled
from ._stream_store import StreamStore, digests, number_of_rows, prefix_key, refuse_augmentation
from ._undisturbed import apart, buffers_as_before
from .errors import SteerError
from .injector import Injector
from .registry import find_backbone
from .training.options import FitOptions, cache_makers
from .training.processes import Processes

GIB = 2**30


class PrefixCache:
    """Keep what leaves the frozen blocks of a model, row by row, and hand it through.

    That is what leaves the last one, and each behind which something else than the next block stands, such as a change
    of width or a decoder. A row is known by its content, so that shuffling does not matter. `run` goes from a batch to
    its loss by the model. Whatever would change the result, or grow beyond `cache_limit`, raises a SteerError.
    """

    def __init__(
        self, model: nn.Module, train: Any, run: Callable[[Any], Tensor], options: FitOptions, processes: Processes
    ) -> None:
        if any(is_compiled(module) for module in model.modules()):
            raise SteerError("`cache_prefix` stands in for blocks, which a compiled model does not ask any more.")
        refuse_augmentation(train)
        self._model, self._train, self._run, self._options = model, train, run, options
        self._processes, self._precision = processes, processes.precision
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
        self._kept: tuple[int, ...] = ()  # the blocks whose outputs are kept; `depth` is the one above
        self._below = 0  # how many tensors are kept of those below it
        self._spec: TreeSpec | None = None
        self._store: StreamStore | None = None
        self._lent: Mapping[bytes, list[Tensor]] = {}  # rows of this batch that other processes keep
        self._hands_above = self._proved = False
        self.hits = self.misses = self._epochs = 0

    @contextlib.contextmanager
    def over(self, batch: Any) -> Iterator[None]:
        """Run a batch through the cache: its frozen blocks are handed through if all its rows are known."""
        keys = digests(batch)
        store = self._begin(batch) if self._store is None else self._store
        self._lent = self._processes.lend([key for key in keys if key not in store], store.find)
        if self._processes.every(all(key in store or key in self._lent for key in keys)):
            self.hits += 1
            if not self._proved:
                self._prove(batch, keys)
            with self._handing_through(keys):
                yield
            return
        self.misses += 1
        with self._watching(len(keys)) as leaves:
            yield
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
        """Check on a first batch what is constant, estimate the size of all, and open the store."""
        rows = rows_of(batch)
        (one, drew), (other, drew_too) = (self._run_below(batch, seed) for seed in (0, 1))
        random, above = drew | drew_too, [run.pop(self.depth, None) for run in (one, other)]
        if not one:
            raise SteerError("`cache_prefix` needs a loss that calls the model; this one did not reach its blocks.")
        leaves, again = self._leaves([*one.values()], rows), tree_flatten([*other.values()])[0]
        if random - {self.depth} or one.keys() != other.keys() or not _equal(leaves, again):
            raise SteerError(
                "`cache_prefix` would change the result: what leaves the frozen blocks is random. Switch off the "
                f"dropout below block {self.depth}{self._dropouts()}, in the model's config or by its `p = 0`."
            )
        limit, number = int(self._options.cache_limit * GIB), number_of_rows(self._train)
        room = limit * self._processes.number
        each = _bytes_of_row(leaves)
        if number is not None and number * each > room:
            raise SteerError(
                f"the streams of {number:,} rows, {each:,} bytes each, would take {number * each / GIB:.2g} GiB, and "
                f"`cache_limit` is {self._options.cache_limit:g}. Raise it, or steer fewer or lower blocks."
            )
        self._below, kept = len(leaves), one
        holds = number and self.depth not in random and self._is_constant(above, rows, room // number - each)
        if self._processes.every(bool(holds)):
            self._hands_above, kept = True, {**one, self.depth: above[0]}
        else:
            self._above = None
        self._kept, self._spec = tuple(kept), tree_flatten([*kept.values()])[1]
        place, folder = self._options.cache_prefix, None
        if not isinstance(place, bool):
            folder = Path(place) / prefix_key(self._model, self._frozen, self._above, self._precision)
            folder = folder / f"process-{self._processes.index}" if self._processes.index else folder
        self._store = StreamStore(folder, limit)
        return self._store

    def _is_constant(self, outputs: Sequence[Any], rows: int, room: int) -> bool:
        """Return whether what the first steered block computed in two runs is the same, and a row of it has room."""
        try:
            one, other = (self._leaves([output], rows) for output in outputs)
        except SteerError:
            return False
        return _equal(one, other) and _bytes_of_row(one) <= room

    def _run_below(self, batch: Any, seed: int) -> tuple[dict[int, Any], set[int]]:
        """Run a batch for its first blocks alone; return what may be kept, and which blocks drew random numbers."""
        outputs: dict[int, Any] = {}
        random: set[int] = set()
        last = self.depth - (self._above is None)
        read, left = self._backbone.read, self._backbone.left

        def call(index: int, run: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
            before = outputs.get(index - 1)
            # what the next block reads needs not be kept
            if before is not None and index < self.depth and torch.equal(read(args, kwargs), left(before)):
                del outputs[index - 1]
            states = self._generators()
            output = run(*args, **kwargs)
            outputs[index] = self._copied(output)
            if not all(map(torch.equal, states, self._generators())):  # two runs may give the same by chance
                random.add(index)
            if index == last:
                raise _ReachedError
            return output

        with self._undisturbed(), contextlib.suppress(_ReachedError), self._standing_in(call):
            torch.manual_seed(seed)
            self._run(batch)
        return outputs, random

    def _prove(self, batch: Any, keys: Sequence[bytes]) -> None:
        """Compare one batch that is handed through with the same batch computed from the start, to rounding."""
        with torch.no_grad(), self._undisturbed(), self._watching(len(keys)) as fresh:
            expected = float(self._run(batch))
        half = self._precision != "no" or next(self._model.parameters()).dtype != torch.float32
        precision, kept, below = 3e-2 if half else 1e-4, self._stored(keys), self._below

        def measured() -> float:
            with torch.no_grad(), self._undisturbed(), self._handing_through(keys):
                return float(self._run(batch))

        def matches(actual: float) -> bool:
            return abs(actual - expected) <= precision * max(1.0, abs(expected))

        actual = math.nan
        if self._hands_above:
            with contextlib.suppress(Exception):  # whatever the model did with what the block did not compute
                actual = measured()
            holds = matches(actual) and _equal(kept[below:], fresh[below:], precision)
            self._hands_above = self._processes.every(holds)
        if not self._hands_above:  # the first steered block is computed from now on
            actual = measured()
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

    @contextlib.contextmanager
    def _watching(self, rows: int) -> Iterator[list[Tensor]]:
        """Let the model compute all, and fill a list with what is kept of it, before fields add to the block above."""
        calls: list[Any] = []
        leaves: list[Tensor] = []

        def call(index: int, run: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
            output = run(*args, **kwargs)
            if index in self._kept:
                calls.append(self._copied(output))
            return output

        with self._standing_in(call):
            yield leaves
        if len(calls) != len(self._kept):
            raise SteerError(
                "`cache_prefix` needs a loss that calls the model once for a batch; this one called it, or the model "
                f"its frozen blocks, {len(calls) / len(self._kept):g} times."
            )
        leaves += self._leaves(calls, rows)

    def _handing_through(self, keys: Sequence[bytes]) -> contextlib.AbstractContextManager[None]:
        """Let every frozen block return what was kept of it or of the next, with what its hooks had made of that."""
        outputs = [] if self._spec is None else tree_unflatten(self._stored(keys), self._spec)

        def call(index: int, run: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
            computes = index == self.depth and not self._hands_above
            return run(*args, **kwargs) if computes else outputs[bisect_left(self._kept, index)]

        return self._standing_in(call)

    @contextlib.contextmanager
    def _standing_in(self, call: Callable[..., Any]) -> Iterator[None]:
        """Let `call` answer, by index, for frozen blocks, and for the forward of the block above, within its hooks."""
        with contextlib.ExitStack() as stack:
            for index, block in enumerate(self._frozen):
                stack.enter_context(answering(block, partial(call, index)))
            if self._above is not None:
                own, forward = vars(self._above), self._above.forward
                stack.callback(own.update, {"forward": own["forward"]} if "forward" in own else {})
                stack.callback(own.pop, "forward")
                own["forward"] = partial(call, self.depth, forward)
            yield

    def _stored(self, keys: Sequence[bytes]) -> list[Tensor]:
        """Return what is kept of these rows, as one batch, on the model's device."""
        device = next(self._model.parameters()).device
        store = self._store
        rows = [] if store is None else [self._lent[key] if key in self._lent else store.get(key) for key in keys]
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
        with apart(), buffers_as_before(self._model):
            yield

    def _leaves(self, outputs: list[Any], rows: int) -> list[Tensor]:
        """Return the tensors in what blocks returned; raise if they are no constants of rows."""
        leaves: list[Any] = tree_flatten(outputs)[0]
        for leaf in leaves:
            if not isinstance(leaf, Tensor) or leaf.dim() == 0 or leaf.shape[0] != rows:
                shape = tuple(leaf.shape) if isinstance(leaf, Tensor) else type(leaf).__name__
                raise SteerError(
                    f"`cache_prefix` keeps tensors whose first dimension is the batch's, here {rows}; a frozen block "
                    f"returned {shape}."
                )
            if leaf.requires_grad:
                above = self._ids_above()
                names = [n for n, p in self._model.named_parameters() if p.requires_grad and id(p) not in above]
                raise SteerError(
                    f"`cache_prefix` would change the result: {', '.join(names[:6]) or 'something'} trains, and the "
                    "frozen blocks depend on it. Leave it out of `train`."
                )
        return leaves

    def _ids_above(self) -> set[int]:
        """Return the ids of the modules and parameters of the blocks that are not frozen."""
        blocks = self._backbone.blocks[self.depth :]
        return {id(part) for block in blocks for part in (*block.modules(), *block.parameters())}

    def _dropouts(self) -> str:
        above = self._ids_above()
        names = [
            name
            for name, module in self._model.named_modules()
            if "drop" in type(module).__name__.lower()
            and id(module) not in above
            and any(getattr(module, rate, None) for rate in ("p", "drop_prob"))
        ]
        return f" ({', '.join(names[:4])}{', …' if len(names) > 4 else ''})" if names else ""


cache_makers.append(PrefixCache)


class _ReachedError(Exception):
    """The last block of a check is done."""


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


def _bytes_of_row(leaves: Sequence[Tensor]) -> int:
    return sum(leaf[0].nbytes for leaf in leaves)


def _equal(leaves: Sequence[Tensor], others: Sequence[Tensor], precision: float = 1e-5) -> bool:
    """Return whether two runs gave the same, to a precision of the largest number."""
    return len(leaves) == len(others) and all(
        torch.allclose(leaf, other, rtol=10 * precision, atol=precision * float(leaf.abs().max()))
        for leaf, other in zip(leaves, others, strict=True)
    )
