"""The order of batches: without end, taken up again exactly, and shared among the processes of a run."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader, IterableDataset, RandomSampler

from residual_steer._batches import rows_of
from residual_steer._undisturbed import apart, seed
from residual_steer.errors import SteerError

# What the loader of one process's rows has as the given one does.
_LIKE = ["num_workers", "collate_fn", "pin_memory", "timeout", "worker_init_fn", "multiprocessing_context", "generator"]
_LIKE += ["prefetch_factor", "persistent_workers", "pin_memory_device"]


class Share:
    """The part of every batch that falls to one of several processes: neighbouring rows, no row twice.

    Every process gets a part of every batch, so that all take as many steps; where there are fewer rows than
    processes, it is a row that does not count. A plain DataLoader over a dataset with indices reads these rows only.
    """

    def __init__(self, loader: Any, index: int = 0, number: int = 1) -> None:
        self.loader, self._index, self._number = loader, index, number
        self._parts: _Parts | None = None
        if number == 1:
            return
        for holder in _holders(loader):
            if getattr(holder, "num_replicas", getattr(holder, "num_processes", 1)) != 1:
                raise SteerError(
                    "a loader gives the batches of all processes, which are split among them here; "
                    f"{type(holder).__name__} gives the part of one. Give the loader without it."
                )
        sampler = loader.batch_sampler if type(loader) is DataLoader else None
        if sampler is not None and not isinstance(loader.dataset, IterableDataset):
            self._parts = _Parts(sampler, self._part)
            same = {name: getattr(loader, name) for name in _LIKE}
            self.loader = DataLoader(loader.dataset, batch_sampler=self._parts, **same)

    def __iter__(self) -> Iterator[tuple[Any, bool]]:
        """Yield this process's part of every batch, and whether it counts."""
        for batch in self.loader:
            if self._number == 1:
                yield batch, True
            elif self._parts is not None:
                yield batch, self._parts.counts.popleft()
            else:
                rows = rows_of(batch)
                part, counts = self._part(rows)
                yield _rows(batch, rows, part), counts

    def _part(self, rows: int) -> tuple[slice, bool]:
        """Return which of so many rows are this process's, and whether they count."""
        begin, end = (rows * which // self._number for which in (self._index, self._index + 1))
        return (slice(begin, end), True) if begin < end else (slice(1), False)


class _Parts:
    """A batch sampler that gives this process's part of every batch; the loader takes some ahead."""

    def __init__(self, batch_sampler: Iterable[Any], part: Callable[[int], tuple[slice, bool]]) -> None:
        self.batch_sampler, self._part = batch_sampler, part
        self.counts: deque[bool] = deque()

    def __iter__(self) -> Iterator[list[Any]]:
        self.counts.clear()
        for indices in self.batch_sampler:
            part, counts = self._part(len(indices))
            self.counts.append(counts)
            yield list(indices)[part]


def _rows(batch: Any, rows: int, part: slice) -> Any:
    """Return some rows of a batch: of every tensor in it that has as many."""
    batch = dict(batch) if isinstance(batch, Mapping) else batch
    return tree_map(lambda x: x[part] if isinstance(x, Tensor) and x.dim() and len(x) == rows else x, batch)


def _holders(loader: Any) -> list[Any]:
    """Return a loader and its samplers, each once: what may shuffle, or split."""
    found: list[Any] = []
    pending = [loader]
    while pending:
        holder = pending.pop()
        if hasattr(holder, "__dict__") and not any(holder is other for other in found):
            found.append(holder)
            pending += [getattr(holder, name, None) for name in ("sampler", "batch_sampler")]
    return found


class BatchStream:
    """Yield batch after batch, epoch after epoch.

    What shuffles or augments draws from generators that begin every batch with a seed of its own, the same on all
    processes, and that the model's dropout cannot disturb. So a position in the data is an epoch and a count of its
    batches, and going back to it is replaying them. If it `shuffles`, the seed also sets the order of a RandomSampler
    with a generator of the user's own.
    """

    def __init__(self, share: Share, seed: int, *, shuffles: bool) -> None:
        self.epoch = 0  # how many times the data were read to their end
        self.seed, self._share, self._taken = seed, share, 0
        holders = _holders(share.loader)
        self._shuffling = [(one, one.generator) for one in holders if shuffles and type(one) is RandomSampler]
        for sampler, _ in self._shuffling:
            sampler.generator = torch.Generator()
        kept = [value for holder in holders for value in vars(holder).values() if isinstance(value, torch.Generator)]
        self._generators = list(dict.fromkeys(kept))
        self._begun_with = [generator.get_state() for generator in self._generators]
        self._iterator: Iterator[tuple[Any, bool]] | None = None

    def __next__(self) -> tuple[Any, bool]:
        """Return the next batch, and whether it counts."""
        with apart(devices=False):
            while True:
                seed(random.Random(f"{self.seed} {self.epoch} {self._taken}").getrandbits(32))
                self._iterator = self._iterator or self._begin_epoch()
                for batch in self._iterator:
                    self._taken += 1
                    return batch
                if not self._taken:
                    raise SteerError("the training loader gave no batch. Give it data; drop_last drops a small batch.")
                self.epoch, self._taken, self._iterator = self.epoch + 1, 0, None

    def _begin_epoch(self) -> Iterator[tuple[Any, bool]]:
        for sampler, _ in self._shuffling:
            sampler.generator.manual_seed(self.seed + self.epoch)
        self._begun_with = [generator.get_state() for generator in self._generators]
        return iter(self._share)

    def close(self) -> None:
        """Let go of the loader, and give its samplers their generators back."""
        self._iterator = None
        for sampler, generator in self._shuffling:
            sampler.generator = generator

    def state(self) -> dict[str, Any]:
        """Return the position in the data."""
        return {"seed": self.seed, "epoch": self.epoch, "taken": self._taken, "generators": self._begun_with}

    def restore(self, state: dict[str, Any]) -> None:
        """Return to a position, reading again the batches of its epoch that were taken."""
        if len(self._generators) != len(state["generators"]):
            raise SteerError(
                f"the run was started with {len(state['generators'])} generators in its loader, this loader has "
                f"{len(self._generators)}. Resume with a loader made as the first one was."
            )
        for generator, begun_with in zip(self._generators, state["generators"], strict=True):
            generator.set_state(begun_with)
        self.seed, self.epoch, self._taken, self._iterator = state["seed"], state["epoch"], 0, None
        for _ in range(state["taken"]):
            next(self)
