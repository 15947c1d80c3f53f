"""Whether one method is better than another, judged by differences on the same seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from scipy import stats

from residual_steer import SteerError

__all__ = ["Difference", "difference"]


@dataclass(frozen=True)
class Difference:
    """The mean of paired differences, with its 95 % interval (Student's t)."""

    mean: float  # of one minus other
    margin: float  # half the width of the interval; infinite for a single pair
    count: int  # number of pairs

    @property
    def sign(self) -> int:
        """1 if the interval lies above zero, -1 if below, 0 if it holds zero: no difference could be seen."""
        return 0 if abs(self.mean) <= self.margin else int(math.copysign(1, self.mean))

    def __str__(self) -> str:
        """Write `+2.77 (95 % interval 1.90 to 3.64, 10 seeds)`."""
        if math.isinf(self.margin):
            return f"{self.mean:+.3g} (one seed)"
        low, high = self.mean - self.margin, self.mean + self.margin
        return f"{self.mean:+.3g} (95 % interval {low:.3g} to {high:.3g}, {self.count} seeds)"


def difference(one: Sequence[float], other: Sequence[float]) -> Difference:
    """Compare two methods, seed by seed.

    Args:
        one: a number for every seed.
        other: numbers for the same seeds in the same order.

    Raises:
        SteerError: there are none, or not as many; or one is NaN or infinite, as that of a run that diverged.
    """
    if not one or len(one) != len(other):
        raise SteerError(
            f"paired numbers are one or more, as many of one as of the other; received {len(one)} and {len(other)}."
        )
    differences = [a - b for a, b in zip(one, other, strict=True)]
    if not all(map(math.isfinite, differences)):
        raise SteerError(
            "paired numbers are finite, and a run that diverged has none to compare; received "
            f"{', '.join(f'{a:g} and {b:g}' for a, b in zip(one, other, strict=True) if not math.isfinite(a - b))}."
        )
    mean, count = statistics.fmean(differences), len(differences)
    if count == 1:
        return Difference(mean, math.inf, 1)
    error = statistics.stdev(differences) / math.sqrt(count)
    return Difference(mean, float(stats.t.ppf(0.975, count - 1)) * error, count)
