"""The table that every diagnostic returns: it prints, and `pandas.DataFrame(table.rows)` takes its rows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from residual_steer.errors import SteerError

__all__ = ["Table"]


@dataclass(frozen=True, repr=False)
class Table:
    """Numbers by row and column.

    Attributes:
        title: above it.
        columns: the head of each column by its key, units included, in the order in which they are printed.
        rows: the values of each row by key: numbers, texts, or None where there is none; a missing key is None.
        notes: lines below it.
        digits: significant digits of its floats when it is printed; `rows` keep all of them.

    Raises:
        SteerError: there is no column, or a row has a key that no column has.

    >>> print(Table("Drift", {"block": "block", "task": "drift"}, ({"block": 0, "task": 0.123456}, {"block": 1})))
    Drift
    <BLANKLINE>
    | block |  drift |
    |------:|-------:|
    |     0 | 0.1235 |
    |     1 |      – |
    """

    title: str
    columns: Mapping[str, str]
    rows: tuple[Mapping[str, Any], ...]
    notes: tuple[str, ...] = ()
    digits: int = 4

    def __post_init__(self) -> None:
        object.__setattr__(self, "columns", dict(self.columns))
        object.__setattr__(self, "rows", tuple(map(dict, self.rows)))
        object.__setattr__(self, "notes", tuple(self.notes))
        unknown = sorted({str(key) for row in self.rows for key in row if key not in self.columns})
        if not self.columns or unknown:
            known = ", ".join(self.columns) or "no column"
            raise SteerError(f"a row has values for the columns of its table ({known}); received {', '.join(unknown)}.")

    def __str__(self) -> str:
        """Write title, rows and notes as Markdown that reads as text; numbers stand to the right."""
        cells = [list(self.columns.values())]
        cells += [[self._text(row.get(key)) for key in self.columns] for row in self.rows]
        words = [any(isinstance(row.get(key), str) for row in self.rows) for key in self.columns]
        widths = [max(3, *map(len, column)) for column in zip(*cells, strict=True)]
        aligned = [
            [c.ljust(w) if word else c.rjust(w) for c, w, word in zip(row, widths, words, strict=True)] for row in cells
        ]
        rule = ["-" * (w + 2) if word else "-" * (w + 1) + ":" for w, word in zip(widths, words, strict=True)]
        head, *lines = [f"| {' | '.join(row)} |" for row in aligned]
        notes = ["\n".join(f"- {note}" for note in self.notes)] if self.notes else []
        return "\n\n".join([self.title, "\n".join([head, f"|{'|'.join(rule)}|", *lines]), *notes])

    def __repr__(self) -> str:
        return str(self)

    def _text(self, value: Any) -> str:
        """Return a cell; a dash where there is no number."""
        if value is None or (isinstance(value, float) and not math.isfinite(value)):
            return "–"
        if isinstance(value, float):
            return f"{value:.{self.digits}g}"
        return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
