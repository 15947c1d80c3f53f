"""Tables of numbers, with their spread over seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from residual_steer.errors import SteerError

from .schema import check_fields

__all__ = ["Cell", "Column", "Measured", "Table"]


@dataclass(frozen=True)
class Measured:
    """A number that was measured with several seeds; in a text, `82.14 ± 0.31`.

    Attributes:
        mean: over the seeds; NaN where any of them gave no finite number.
        spread: sample standard deviation (divided by count - 1); 0 for one seed, which has none.
        count: how many seeds.
    """

    mean: float
    spread: float
    count: int

    def __post_init__(self) -> None:
        check_fields(self)
        if self.count < 1 or self.spread < 0 or (self.count == 1 and self.spread > 0):
            raise SteerError(
                "a measured number has a count of 1 or more and a spread of 0 or more, which is 0 for a single seed; "
                f"received a count of {self.count} and a spread of {self.spread:g}."
            )
        if math.isnan(self.mean) or math.isnan(self.spread):
            object.__setattr__(self, "mean", math.nan)
            object.__setattr__(self, "spread", math.nan)

    @classmethod
    def of(cls, values: Sequence[float]) -> Measured:
        """Return mean and spread of one value per seed; a seed that diverged is not left out, but makes them NaN.

        Raises:
            SteerError: there is no value.
        """
        if not len(values):
            raise SteerError("a measured number needs the value of at least one seed; received none.")
        numbers = [float(value) for value in values]
        if not all(map(math.isfinite, numbers)):
            return cls(math.nan, math.nan, len(numbers))
        return cls(statistics.fmean(numbers), statistics.stdev(numbers) if len(numbers) > 1 else 0.0, len(numbers))

    def __str__(self) -> str:
        """Write the spread with two digits that count, and the mean as far as the spread goes."""
        if math.isnan(self.mean):
            return "–"
        if not self.spread:
            return f"{self.mean:.6g}"
        decimals = max(0, 1 - math.floor(math.log10(self.spread)))
        return f"{self.mean:.{decimals}f} ± {self.spread:.{decimals}f}"


Cell = str | int | float | Measured | None


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        key: of its cells in the rows.
        label: its head.
        unit: shown behind the label; "" for none.
        better: whether larger ("up") or smaller ("down") numbers are better, whose best is marked; None for neither.
        digits: behind the decimal point, of all its numbers but integers.
    """

    key: str
    label: str
    unit: str = ""
    better: Literal["up", "down"] | None = None
    digits: int = 3

    def __post_init__(self) -> None:
        check_fields(self)
        if not 0 <= self.digits <= 12:
            raise SteerError(f"a column has 0 to 12 digits behind the decimal point; received {self.digits}.")


@dataclass(frozen=True)
class Table:
    """A table; its first column names the rows.

    Attributes:
        title: above it.
        columns: with different keys.
        rows: cells by the key of their column; one that is left out is None.
        notes: lines below it.
    """

    title: str
    columns: tuple[Column, ...]
    rows: tuple[Mapping[str, Cell], ...]
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_fields(self)
        keys = [column.key for column in self.columns]
        if not keys or len(set(keys)) < len(keys):
            raise SteerError(f"a table has columns of different keys; received {keys}.")
        for row in self.rows:
            if row.keys() - set(keys):
                raise SteerError(f"a row has cells for {', '.join(keys)}; received {', '.join(row)}.")

    def __str__(self) -> str:
        """Write the table as Markdown, which can be read as it stands.

        The writer is imported here: it needs this class.
        """
        from .markdown import table_markdown

        return "\n\n".join(table_markdown(self))
