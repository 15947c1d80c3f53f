"""The order of batches: without end, taken up again exactly, and shared among the processes of a run."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader, IterableDataset, RandomSampler

from residual_steer.errors import SteerError

from . import undisturbed
from .losses import rows_of

__all__ = ["BatchStream", "Share"]


class Share:
    """The part of every batch that falls to one of several processes: neighbouring rows, no row twice.

    Every process gets a part of every batch, so that all take as many steps; where there are fewer rows than
    processes, it is a row that does not count.

    Args:
        loader: batches that are the same on every process. A DataLoader reads this process's rows only, unless its
            dataset is iterable.
        index: which process this is.
        number: how many there are.
    """

    def __init__(self, loader: Iterable[Any], index: int = 0, number: int = 1) -> None:
        self.loader, self._index, self._number = loader, index, number
        self._counts: deque[bool] | None = None
        sampled = isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset)
        sampler = getattr(loader, "batch_sampler", None) if sampled else None
        if number > 1 and sampler is not None:
            self._counts = deque()
            self.loader = _with_batches(loader, _Parts(self, sampler))

    def __iter__(self) -> Iterator[tuple[Any, bool]]:
        """Yield this process's part of every batch, and whether it counts."""
        if self._counts is not None:
            self._counts.clear()
        for batch in self.loader:
            if self._counts is not None:
                yield batch, self._counts.popleft()
            elif self._number == 1:
                yield batch, True
            else:
                rows = rows_of(batch)
                part = self.part(rows)
                yield _rows(batch, rows, part or slice(1)), part is not None

    def part(self, rows: int) -> slice | None:
        """Return which of so many rows are this process's; None for none."""
        begin, end = (rows * which // self._number for which in (self._index, self._index + 1))
        return slice(begin, end) if begin < end else None

    def note(self, counts: bool) -> None:
        """Take note of whether the next batch counts."""
        if self._counts is not None:
            self._counts.append(counts)


class _Parts:
    """A batch sampler that gives this process's part of every batch; the loader takes some ahead."""

    def __init__(self, share: Share, batch_sampler: Iterable[Any]) -> None:
        self.share, self.batch_sampler = share, batch_sampler

    def __iter__(self) -> Iterator[list[Any]]:
        for indices in self.batch_sampler:
            part = self.share.part(len(indices))
            self.share.note(part is not None)
            yield list(indices)[part or slice(1)]

    def __len__(self) -> int:
        return len(self.batch_sampler)  # type: ignore[arg-type]


def _with_batches(loader: Any, batch_sampler: Any) -> DataLoader[Any]:
    """Return a loader as another one is, with other batches."""
    names = ["num_workers", "collate_fn", "pin_memory", "timeout", "worker_init_fn", "multiprocessing_context"]
    names += ["generator", "prefetch_factor", "persistent_workers", "pin_memory_device"]
    return DataLoader(loader.dataset, batch_sampler=batch_sampler, **{name: getattr(loader, name) for name in names})


def _rows(batch: Any, rows: int, part: slice) -> Any:
    """Return some rows of a batch: of every tensor in it that has as many."""
    batch = dict(batch) if isinstance(batch, Mapping) else batch
    return tree_map(lambda x: x[part] if isinstance(x, Tensor) and x.dim() and len(x) == rows else x, batch)


class BatchStream:
    """Yield batch after batch, epoch after epoch.

    Shuffling and augmentation draw from a stream of randomness of their own, which the model's dropout cannot disturb.
    So a position in the data is an epoch, the state at its start and a count of batches; going back to it is replaying
    them. Where there is a seed and the loader shuffles, the order is a function of the seed and the epoch alone.

    Args:
        share: this process's part of the batches.
        seed: of their order; None leaves it to the loader.
    """

    def __init__(self, share: Share, seed: int | None) -> None:
        self._share, self._seed = share, seed
        shuffling = [holder for holder in self._holders() if type(holder) is RandomSampler]
        self._shuffling = [] if seed is None else [(sampler, sampler.generator) for sampler in shuffling]
        for sampler, _ in self._shuffling:
            sampler.generator = torch.Generator()
        self._random = undisturbed.get_state(devices=False)
        self._iterator: Iterator[Any] | None = None
        self._epoch, self._taken = 0, 0
        self._start = self._capture()

    @property
    def epoch(self) -> int:
        """How many times the data were read to their end."""
        return self._epoch

    def __next__(self) -> tuple[Any, bool]:
        """Return the next batch, and whether it counts.

        Raises:
            SteerError: the loader is empty.
        """
        outside = undisturbed.get_state(devices=False)
        undisturbed.set_state(self._random)
        try:
            return self._take()
        finally:
            self._random = undisturbed.get_state(devices=False)
            undisturbed.set_state(outside)

    def _take(self) -> tuple[Any, bool]:
        if self._iterator is None:
            for sampler, _ in self._shuffling:
                sampler.generator.manual_seed((self._seed or 0) + self._epoch)
            self._start = self._capture()
            self._iterator = iter(self._share)
        for batch in self._iterator:
            self._taken += 1
            return batch
        if not self._taken:
            raise SteerError("the training loader gave no batch. Give it data; drop_last drops a lone small batch.")
        self._epoch, self._taken, self._iterator = self._epoch + 1, 0, None
        return self._take()

    def close(self) -> None:
        """Let go of the loader, and give its samplers their generators back."""
        self._iterator = None
        for sampler, generator in self._shuffling:
            sampler.generator = generator

    def state(self) -> dict[str, Any]:
        """Return the position in the data."""
        return {"epoch": self._epoch, "taken": self._taken, **self._start}

    def restore(self, state: dict[str, Any]) -> None:
        """Return to a position, reading again the batches of its epoch that were taken.

        Raises:
            SteerError: the loader is not made as the one that the position belongs to.
        """
        self._epoch, self._taken, self._iterator = state["epoch"], 0, None
        self._random = state["random"]
        generators = self._generators()
        if len(generators) != len(state["generators"]):
            raise SteerError(
                f"the run was started with {len(state['generators'])} generators in its loader, this loader has "
                f"{len(generators)}. Resume with a loader made as the first one was."
            )
        for generator, tensor in zip(generators, state["generators"], strict=True):
            generator.set_state(tensor)
        for _ in range(state["taken"]):
            next(self)

    def _capture(self) -> dict[str, Any]:
        return {
            "random": undisturbed.get_state(devices=False),
            "generators": [generator.get_state() for generator in self._generators()],
        }

    def _generators(self) -> list[torch.Generator]:
        """Return the generators that the loader and its samplers keep to themselves."""
        kept = (value for holder in self._holders() for value in vars(holder).values())
        return list({id(value): value for value in kept if isinstance(value, torch.Generator)}.values())

    def _holders(self) -> list[Any]:
        """Return the loader and its samplers, each once."""
        found: dict[int, Any] = {}
        pending: list[Any] = [self._share.loader]
        while pending:
            holder = pending.pop()
            if holder is not None and id(holder) not in found:
                found[id(holder)] = holder
                pending += [getattr(holder, name, None) for name in ("sampler", "batch_sampler")]
        return [holder for holder in found.values() if hasattr(holder, "__dict__")]
