"""Timing in interleaved rounds, so that ratios hold on a machine that is not quiet.

Every round runs every variant once. What slows the machine down for a while slows all variants of a round alike; so a
ratio is taken within each round, and the median of these ratios is reported with its quartiles. What a variant leaves
behind, such as memory that the next one has to be given again, slows its neighbour: so every other round draws a new
order, always the same draw, and the round after it goes through that order backwards.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from residual_steer.errors import SteerError
from residual_steer.training import progress as progress_bar

__all__ = ["Rounds", "Spread", "Variant", "play", "spread"]


def _nothing() -> None:
    return None


@dataclass(frozen=True)
class Variant:
    """One of the things that are held against each other.

    Attributes:
        name: as in the table.
        run: what is timed; it receives what `before` returned.
        before: what is done first and not timed, such as selecting a field and copying a cache.
    """

    name: str
    run: Callable[[Any], object]
    before: Callable[[], Any] = _nothing


@dataclass(frozen=True)
class Spread:
    """A median with its quartiles."""

    median: float
    low: float
    high: float

    def __format__(self, spec: str) -> str:
        """Write `median (low – high)`, each number as `spec` says."""
        return f"{self.median:{spec}} ({self.low:{spec}}–{self.high:{spec}})"


@dataclass(frozen=True)
class Rounds:
    """What `play` measured.

    Attributes:
        seconds: of each variant, one number for every round.
    """

    seconds: Mapping[str, Sequence[float]]

    def time(self, name: str) -> Spread:
        """Return a variant's seconds.

        Raises:
            SteerError: there is no such variant.
        """
        return spread(self._of(name))

    def ratio(self, name: str, reference: str) -> Spread:
        """Return how many times as long as `reference` a variant takes, from the ratios of each round.

        Raises:
            SteerError: there is no such variant.
        """
        return spread(self.ratios(name, reference))

    def ratios(self, name: str, reference: str) -> list[float]:
        """Return the ratio of each round.

        Raises:
            SteerError: there is no such variant.
        """
        return [one / other for one, other in zip(self._of(name), self._of(reference), strict=True)]

    def record(self, reference: str) -> dict[str, Any]:
        """Return everything for a JSON file, ratios against `reference`.

        Raises:
            SteerError: there is no such variant.
        """
        return {
            name: {
                "seconds": vars(self.time(name)),
                "ratio": vars(self.ratio(name, reference)),
                "reference": reference,
                "rounds": list(values),
            }
            for name, values in self.seconds.items()
        }

    def _of(self, name: str) -> Sequence[float]:
        if name not in self.seconds:
            raise SteerError(f"a variant is one of {', '.join(self.seconds)}; received {name!r}.")
        return self.seconds[name]


def play(
    variants: Sequence[Variant],
    rounds: int,
    *,
    warmup: int = 1,
    repeats: int = 1,
    device: torch.device | str = "cpu",
    clock: Callable[[], float] = time.perf_counter,
    progress: str = "",
) -> Rounds:
    """Time variants in interleaved rounds.

    Args:
        variants: what to time, with different names.
        rounds: how often each is measured.
        warmup: rounds before those, which are not measured.
        repeats: how often `run` is called in one measurement, whose time is divided by it; for what takes microseconds.
        device: where the work is done; a CUDA device is synchronised before each reading of the clock.
        clock: gives seconds.
        progress: the name of a bar that counts measurements and shows the time left; "" for none.

    Raises:
        SteerError: no variant, two of the same name, or no round.
    """
    names = [variant.name for variant in variants]
    if not names or len(set(names)) < len(names):
        raise SteerError(f"variants are one or more of different names; received {names}.")
    if rounds < 1 or repeats < 1 or warmup < 0:
        raise SteerError(
            f"`rounds` and `repeats` are 1 or more, `warmup` 0 or more; received {rounds}, {repeats} and {warmup}."
        )
    cuda = torch.device(device).type == "cuda"
    seconds: dict[str, list[float]] = {name: [] for name in names}
    total = (warmup + rounds) * len(variants)
    with progress_bar(total=total, desc=progress, disable=not progress) as bar:
        draw, order = random.Random(0), list(variants)
        for turn in range(-warmup, rounds):
            order = order[::-1] if turn % 2 else draw.sample(order, len(order))
            for variant in order:
                given = variant.before()
                if cuda:
                    torch.cuda.synchronize(device)
                started = clock()
                for _ in range(repeats):
                    variant.run(given)
                if cuda:
                    torch.cuda.synchronize(device)
                if turn >= 0:
                    seconds[variant.name].append((clock() - started) / repeats)
                bar.update()
    return Rounds(seconds)


def spread(values: Sequence[float]) -> Spread:
    """Return the median and the quartiles of one or more numbers, interpolated between neighbours."""
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, low, high)
