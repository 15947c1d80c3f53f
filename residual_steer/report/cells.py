"""The numbers of a table as texts, which of them are marked as the best, and what has to be said below.

A column with a direction marks its best number, together with every number whose difference from it is no larger than
both spreads added up, or that reads the same: nobody can tell those apart from the best. Where that is all of them,
none is marked. A single run has no spread, and is compared as it stands.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .table import Cell, Column, Measured, Table

__all__ = ["NOTHING", "Shown", "best_of", "head_of", "is_numeric", "notes_of", "shown", "text_of"]

NOTHING = "–"
_ARROWS = {"up": " ↑", "down": " ↓", None: ""}


@dataclass(frozen=True)
class Shown:
    """A cell as it is printed, and whether it is marked as the best."""

    text: str
    best: bool


def shown(table: Table) -> list[list[Shown]]:
    """Return the rows of a table, cell by cell."""
    columns = []
    for column in table.columns:
        cells = [row.get(column.key) for row in table.rows]
        best = best_of(column, cells)
        columns.append([Shown(text_of(cell, column.digits), index in best) for index, cell in enumerate(cells)])
    return [list(row) for row in zip(*columns, strict=True)]


def head_of(column: Column) -> str:
    """Return the head of a column: label, unit, and an arrow to where it is better."""
    unit = f" ({column.unit})" if column.unit else ""
    return column.label + unit + _ARROWS[column.better]


def is_numeric(table: Table, column: Column) -> bool:
    """Say whether a column holds numbers and nothing else, and goes to the right."""
    cells = [row.get(column.key) for row in table.rows]
    return any(_value(cell) is not None for cell in cells) and not any(isinstance(cell, str) for cell in cells)


def text_of(cell: Cell, digits: int) -> str:
    """Return a cell as text, with `digits` behind the decimal point; a dash where there is nothing.

    A number that this would round to zero is written with an exponent instead.
    """
    if isinstance(cell, str):
        return cell or NOTHING
    if _value(cell) is None or cell is None:
        return NOTHING
    if isinstance(cell, int):
        return f"{cell:,}"
    if isinstance(cell, Measured):
        mean = _rounded(cell.mean, digits)
        return f"{mean} ± {_rounded(cell.spread, digits)}" if cell.count > 1 else mean
    return _rounded(cell, digits)


def best_of(column: Column, cells: Sequence[Cell]) -> set[int]:
    """Return the positions of the cells to be marked."""
    values = {index: value for index, cell in enumerate(cells) if (value := _value(cell)) is not None}
    if column.better is None or len(values) < 2:
        return set()
    choose = max if column.better == "up" else min
    best = choose(values, key=values.__getitem__)
    found = {
        index
        for index, value in values.items()
        if abs(value - values[best]) <= _spread(cells[index]) + _spread(cells[best])
        or text_of(cells[index], column.digits) == text_of(cells[best], column.digits)
    }
    return set() if len(found) == len(values) else found


def notes_of(table: Table) -> list[str]:
    """Return the table's notes, behind what explains its numbers."""
    cells = [(column, row.get(column.key)) for column in table.columns for row in table.rows]
    counts = sorted({cell.count for _, cell in cells if isinstance(cell, Measured)})
    lines = []
    if counts and counts[-1] > 1:
        several = [count for count in counts if count > 1]
        seeds = str(several[0]) if len(several) == 1 else f"{several[0]} to {several[-1]}"
        single = " A number without ± is of a single seed." if counts[0] == 1 else ""
        lines.append(f"Mean ± sample standard deviation over {seeds} seeds.{single}")
    elif counts:
        lines.append("One seed, which has no spread.")
    judged = [cell for column, cell in cells if column.better and _value(cell) is not None]
    if len(judged) > 1:
        spread = any(_spread(cell) for cell in judged)
        more = ", with those that differ from it by no more than both spreads" if spread else ""
        lines.append(f"Bold: the best of a column{more}; nothing is bold where that is every row.")
    return [*lines, *table.notes]


def _value(cell: Cell) -> float | None:
    """Return what a cell is compared by; None where it is no finite number."""
    if isinstance(cell, Measured):
        cell = cell.mean
    if cell is None or isinstance(cell, str):
        return None
    return cell if isinstance(cell, int) or math.isfinite(cell) else None


def _spread(cell: Cell) -> float:
    return cell.spread if isinstance(cell, Measured) and math.isfinite(cell.spread) else 0.0


def _rounded(number: float, digits: int) -> str:
    """Write a number with `digits` behind the point; with an exponent where that is nothing, or endless."""
    text = f"{number:,.{digits}f}"
    vanished = number != 0 and float(text.replace(",", "")) == 0
    return f"{number:.1e}" if vanished or abs(number) >= 1e12 else text.replace("-", "−", 1)
