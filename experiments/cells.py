"""The numbers of a table as texts, which of them are marked as the best, and a table as Markdown.

A column with a direction marks its best number, together with every number whose difference from it is no larger than
both spreads added up, or that reads the same: nobody can tell those apart from the best. Where that is all of them,
none is marked. A single run has no spread, and is compared as it stands.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

from tabulate import tabulate

from .results import Column, Measured, Table

__all__ = ["best_of", "escaped", "head_of", "is_numeric", "markdown", "notes_of", "table_markdown", "text_of", "texts"]

NOTHING = "–"


def text_of(cell: Any, digits: int) -> str:
    """Return a cell as text; a dash where there is nothing, an exponent where `digits` would round it to zero."""
    if isinstance(cell, str):
        return cell or NOTHING
    if _value(cell) is None:
        return NOTHING
    if isinstance(cell, Measured):
        mean = _rounded(cell.mean, digits)
        return f"{mean} ± {_rounded(cell.spread, digits)}" if cell.count > 1 else mean
    return f"{cell:,}" if isinstance(cell, int) else _rounded(cell, digits)


def best_of(column: Column, cells: Sequence[Any]) -> set[int]:
    """Return the positions of the cells to be marked."""
    values = {index: value for index, cell in enumerate(cells) if (value := _value(cell)) is not None}
    if column.better is None or len(values) < 2:
        return set()
    best = (max if column.better == "up" else min)(values, key=values.__getitem__)
    found = {
        index
        for index, value in values.items()
        if abs(value - values[best]) <= _spread(cells[index]) + _spread(cells[best])
        or text_of(cells[index], column.digits) == text_of(cells[best], column.digits)
    }
    return set() if len(found) == len(values) else found


def texts(table: Table) -> list[list[tuple[str, bool]]]:
    """Return the rows of a table: the text of each cell, and whether it is one of the best of its column."""
    columns = []
    for column in table.columns:
        cells = [row.get(column.key) for row in table.rows]
        best = best_of(column, cells)
        columns.append([(text_of(cell, column.digits), index in best) for index, cell in enumerate(cells)])
    return [list(row) for row in zip(*columns, strict=True)]


def head_of(column: Column) -> str:
    """Return the head of a column: label, unit, and an arrow to where it is better."""
    unit = f" ({column.unit})" if column.unit else ""
    return column.label + unit + {"up": " ↑", "down": " ↓", None: ""}[column.better]


def is_numeric(table: Table, column: Column) -> bool:
    """Return whether a column holds numbers and nothing else, and goes to the right."""
    cells = [row.get(column.key) for row in table.rows]
    return any(_value(cell) is not None for cell in cells) and not any(isinstance(cell, str) for cell in cells)


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
        more = ", with those that differ from it by no more than both spreads" if any(map(_spread, judged)) else ""
        lines.append(f"Bold: the best of a column{more}; nothing is bold where that is every row.")
    return [*lines, *table.notes]


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]], numeric: Sequence[bool]) -> str:
    """Return a Markdown table of texts, those of numeric columns to the right."""
    align = ["right" if right else "left" for right in numeric]
    return tabulate(rows, heads, tablefmt="pipe", colalign=align, disable_numparse=True)


def table_markdown(table: Table) -> str:
    """Return a table in Markdown, with its notes below it."""
    rows = [[f"**{escaped(text)}**" if best else escaped(text) for text, best in row] for row in texts(table)]
    heads = [escaped(head_of(column)) for column in table.columns]
    lines = markdown(heads, rows, [is_numeric(table, column) for column in table.columns])
    notes = "\n".join(f"- {escaped(note)}" for note in notes_of(table))
    return f"{lines}\n\n{notes}" if notes else lines


def escaped(text: str) -> str:
    """Return text that Markdown shows as it is, in one line, also in a cell of a table."""
    line = " ".join(text.split())
    line = re.sub(r"([\\`*\[\]|$~])", r"\\\1", line)
    line = re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", line)  # inside a word it means itself
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    line = re.sub(r"^([-+](?=[-+ ]|$)|[#=])", r"\\\1", line)  # else a heading, a rule or a list
    return re.sub(r"^(\d+)([.)](?: |$))", r"\1\\\2", line)


def _value(cell: Any) -> float | None:
    """Return what a cell is compared by; None where it is no finite number."""
    value = cell.mean if isinstance(cell, Measured) else cell
    return value if isinstance(value, (int, float)) and math.isfinite(value) else None


def _spread(cell: Any) -> float:
    return cell.spread if isinstance(cell, Measured) and math.isfinite(cell.spread) else 0.0


def _rounded(number: float, digits: int) -> str:
    """Write a number with `digits` behind the point; with an exponent where that is nothing, or endless."""
    text = f"{number:,.{digits}f}"
    vanished = number != 0 and float(text.replace(",", "")) == 0
    return f"{number:.1e}" if vanished or abs(number) >= 1e12 else text.replace("-", "−", 1)
