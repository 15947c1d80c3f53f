"""How the numbers of one scale are written, and where its ticks are.

Numbers that belong together have one power of ten, which stands beside their name, and as many digits as tell them
apart. Where that cannot be, since they are of many sizes, each has three digits that count.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .axis import Axis

__all__ = ["Scale", "levels_of", "plain", "power_of", "ticks_of"]

_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_MOST = 6  # digits behind the point


@dataclass(frozen=True)
class Scale:
    """How numbers are written.

    Attributes:
        exponent: of the power of ten that they are in units of.
        decimals: digits behind the point; None for three digits that count.
    """

    exponent: int
    decimals: int | None

    @classmethod
    def of(cls, numbers: Sequence[float], log: bool = False) -> Scale:
        """Return the scale of numbers that stand beside each other."""
        largest = max(map(abs, numbers), default=0.0)
        if log or not largest:
            return cls(0, None if largest else 0)
        exponent = power_of(largest)
        scaled = [number / 10.0**exponent for number in numbers]
        if all(number == round(number) for number in scaled):
            return cls(exponent, 0)
        spread = max(scaled) - min(scaled)
        decimals = max(0, 2 - _order(largest / 10.0**exponent), 1 - _order(spread) if spread else 0)
        smallest = min(abs(number) for number in scaled if number)
        if decimals > _MOST or (exponent and smallest < 0.5 * 10.0**-decimals):
            return cls(0, None)
        return cls(exponent, decimals)

    def text(self, number: float) -> str:
        """Write a number."""
        if self.decimals is None:
            return plain(number)
        scaled = number / 10.0**self.exponent
        text = f"{abs(scaled):,.{self.decimals}f}"
        if scaled and not float(text.replace(",", "")):
            return _powered(scaled, 0)
        return f"−{text}" if scaled < 0 else text

    def label(self, axis: Axis) -> str:
        """Return the label of an axis, with the power of ten."""
        if not self.exponent:
            return str(axis)
        power = f"10{str(self.exponent).translate(_RAISED)}"
        return f"{axis.label} (in {power}{' ' if axis.unit else ''}{axis.unit})"


def power_of(largest: float) -> int:
    """Return the power of ten that numbers up to `largest` are written in units of: a multiple of three, mostly 0."""
    return 0 if not largest or 1e-3 <= largest < 1e6 else max(-300, 3 * math.floor(math.log10(largest) / 3))


def plain(number: float) -> str:
    """Write a number with three digits that count: 1,500, 0.012, 3.2e9."""
    if number and not 1e-3 <= abs(number) < 1e6:
        return _powered(number, 2)
    digits = max(0, 2 - _order(number)) if number else 0
    text = f"{abs(number):,.{digits}f}"
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return f"−{text}" if number < 0 else text


def ticks_of(low: float, high: float, scale: Scale, log: bool) -> tuple[list[float], list[str]]:
    """Return ticks between two numbers, and their texts in the power of ten of a scale."""
    if not low < high:
        return [low], [scale.text(low)]
    steps = [tick for tick in _steps(low, high, 7) if low <= tick <= high] if log else []
    ticks = steps if len(steps) > 1 else [tick for tick in _even(low, high, 6) if low <= tick <= high]
    if scale.decimals is None:
        return ticks, [plain(tick) for tick in ticks]
    scaled = [tick / 10.0**scale.exponent for tick in ticks]
    step = (scaled[1] - scaled[0]) if len(scaled) > 1 else abs(scaled[0])
    decimals = max(0, -_order(1.001 * step))
    if any(abs(round(tick, decimals) - tick) > 0.01 * step for tick in scaled):  # 2.5
        decimals += 1
    texts = [Scale(scale.exponent, decimals).text(tick) for tick in ticks]
    return ticks, ["0" if abs(tick) < 1e-6 * step else text for tick, text in zip(scaled, texts, strict=True)]


def levels_of(low: float, high: float, log: bool) -> list[float]:
    """Return the edges of bands that cover everything between two numbers, both included."""
    if not low < high:
        half = abs(low) / 20 or 1.0
        return [low - half, low + half]
    levels = _steps(low, high, 14) if log else []
    if len(levels) > 4:
        return levels
    levels = [level for level in _even(low, high, 16) if level > 0 or not log]
    return [min(low, levels[0]), *levels[1:-1], max(high, levels[-1])]  # which rounding may have moved


def _even(low: float, high: float, most: int) -> list[float]:
    from matplotlib.ticker import MaxNLocator

    return [float(tick) for tick in MaxNLocator(nbins=most, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)]


def _steps(low: float, high: float, most: int) -> list[float]:
    """Return 1, 2, 5, 10, … around two positive numbers; or powers of ten, or of a thousand, if these were too many."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    first, last = first - (10.0**first > low), last + (10.0**last < high)  # which log10 may have rounded away
    for factors in ((1, 2, 5), (1, 3), (1,)):
        every = [factor * 10.0**power for power in range(first - 1, last + 2) for factor in factors]
        below, above = max(x for x in every if x <= low), min(x for x in every if x >= high)
        found = [x for x in every if below <= x <= above]
        if len(found) <= most:
            return found
    stride = math.ceil((last - first) / (most - 1))
    return [10.0**power for power in range(first, last + stride, stride)]


def _order(number: float) -> int:
    return math.floor(math.log10(abs(number)))


def _powered(number: float, digits: int) -> str:
    """Write a number with an exponent: 3.2e9."""
    base, _, power = f"{abs(number):.{digits}e}".partition("e")
    base = base.rstrip("0").rstrip(".") if "." in base else base
    return f"{'−' if number < 0 else ''}{base}e{int(power)}".replace("e-", "e−")
