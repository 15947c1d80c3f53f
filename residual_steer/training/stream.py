"""Batches without end, in an order that can be taken up again exactly."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from residual_steer.errors import SteerError

from . import randomness
from .environment import is_seeded

__all__ = ["BatchStream"]


class BatchStream:
    """Yield batch after batch, epoch after epoch, from a loader that accelerate has prepared.

    Shuffling and augmentation draw from a stream of randomness of their own, which the model's dropout cannot disturb.
    So a position in the data is an epoch, the state at its start and a count of batches; going back to it is replaying
    them.

    Args:
        loader: a prepared DataLoader.
    """

    def __init__(self, loader: Any) -> None:
        self._loader = loader
        self._random = randomness.get_state(devices=False)
        self._iterator: Iterator[Any] | None = None
        self._epoch, self._taken = 0, 0
        self._start = self._capture()

    @property
    def epoch(self) -> int:
        """How many times the data were read to their end."""
        return self._epoch

    def __next__(self) -> Any:
        """Return the next batch.

        Raises:
            SteerError: the loader is empty.
        """
        outside = randomness.get_state(devices=False)
        randomness.set_state(self._random)
        try:
            return self._take()
        finally:
            self._random = randomness.get_state(devices=False)
            randomness.set_state(outside)

    def _take(self) -> Any:
        if self._iterator is None:
            self._begin_epoch()
        for batch in self._iterator or ():
            self._taken += 1
            return batch
        if not self._taken:
            raise SteerError("the training loader gave no batch. Give it data; drop_last drops a lone small batch.")
        self._epoch, self._taken, self._iterator = self._epoch + 1, 0, None
        return self._take()

    def _begin_epoch(self) -> None:
        if hasattr(self._loader, "set_epoch"):
            self._loader.set_epoch(self._epoch)
        self._start = self._capture()
        self._iterator = iter(self._loader)

    def close(self) -> None:
        """Let go of the loader: accelerate keeps a reference to one that was left in the middle of an epoch."""
        self._iterator = None
        if hasattr(self._loader, "end"):
            self._loader.end()

    def state(self) -> dict[str, Any]:
        """Return the position in the data."""
        seeds = [sampler.initial_seed for sampler in self._seeded()]
        return {"epoch": self._epoch, "taken": self._taken, "seeds": seeds, **self._start}

    def restore(self, state: dict[str, Any]) -> None:
        """Return to a position, reading again the batches of its epoch that were taken.

        Raises:
            SteerError: the loader is not made as the one that the position belongs to.
        """
        self._epoch, self._taken, self._iterator = state["epoch"], 0, None
        self._random = state["random"]
        for sampler, seed in zip(self._seeded(), state["seeds"], strict=False):
            sampler.initial_seed = seed
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
            "random": randomness.get_state(devices=False),
            "generators": [generator.get_state() for generator in self._generators()],
        }

    def _generators(self) -> list[torch.Generator]:
        """Return the generators that the loader and its samplers keep to themselves.

        Accelerate's own sampler is none of them: it seeds its generator anew in every epoch.
        """
        found: dict[int, torch.Generator] = {}
        for holder in self._holders():
            if not is_seeded(holder):
                held = (value for value in vars(holder).values() if isinstance(value, torch.Generator))
                found.update((id(generator), generator) for generator in held)
        for sampler in self._seeded():
            found.pop(id(sampler.generator), None)
        return list(found.values())

    def _seeded(self) -> list[Any]:
        return [holder for holder in self._holders() if is_seeded(holder)]

    def _holders(self) -> list[Any]:
        """Return the loader, what it wraps, and their samplers, each once."""
        found: dict[int, Any] = {}
        pending: list[Any] = [self._loader]
        while pending:
            holder = pending.pop()
            if holder is not None and id(holder) not in found:
                found[id(holder)] = holder
                pending += [getattr(holder, name, None) for name in ("sampler", "batch_sampler", "base_dataloader")]
        return [holder for holder in found.values() if hasattr(holder, "__dict__")]
