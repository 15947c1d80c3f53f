"""How a result is shown: a table that prints, and pictures by plain matplotlib, which is imported when one is drawn."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from residual_steer._checks import import_optional
from residual_steer.errors import SteerError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
else:
    Axes = Figure = Any

__all__ = ["Axes", "Figure", "Table", "bars", "layer_table", "lines", "panels", "table_of"]

Values = Tensor | Iterable[Any]
Columns = Mapping[str, tuple[str, Any]]  # the head and the values of each column by its key


@dataclass(frozen=True, repr=False)
class Table:
    """Numbers by row and column; `pandas.DataFrame(table.rows)` takes its rows.

    Attributes:
        title: above it.
        columns: the head of each column by its key, units included, in the order of printing.
        rows: the values of each row by key: numbers, texts, or None where there is none.
        notes: lines below it.
        digits: significant digits of printed floats; `rows` keep all of them.

    >>> print(table_of("Drift", {"block": ("block", (0, 1)), "task": ("drift", (0.123456, None))}))
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

    def __str__(self) -> str:
        """Write title, rows and notes as Markdown that reads as text; numbers stand to the right."""
        printed = []
        for key, head in self.columns.items():
            cells = [head, *(self._text(row[key]) for row in self.rows)]
            width = max(3, *map(len, cells))
            word = any(isinstance(row[key], str) for row in self.rows)
            first, *others = [f" {cell:{'<' if word else '>'}{width}} " for cell in cells]
            printed.append([first, "-" * (width + 2) if word else "-" * (width + 1) + ":", *others])
        grid = "\n".join(f"|{'|'.join(row)}|" for row in zip(*printed, strict=True))
        notes = "\n".join(f"- {note}" for note in self.notes)
        return "\n\n".join(filter(None, (self.title, grid, notes)))

    __repr__ = __str__

    def _text(self, value: Any) -> str:
        """Return a cell; a dash where there is no number."""
        if value is None or (isinstance(value, float) and not math.isfinite(value)):
            return "–"
        if isinstance(value, float):
            return f"{value:.{self.digits}g}"
        return f"{value:,}" if isinstance(value, int) else str(value)


def table_of(title: str, columns: Columns, *notes: str, digits: int = 4) -> Table:
    """Return a table, given the head and the values of each column."""
    values = zip(*(_listed(each) for _, each in columns.values()), strict=True)
    rows = tuple(dict(zip(columns, row, strict=True)) for row in values)
    return Table(title, {key: head for key, (head, _) in columns.items()}, rows, notes, digits)


def layer_table(title: str, blocks: Sequence[int], columns: Columns, *notes: str) -> Table:
    """Return a table with a row for every layer, behind its index that of its block."""
    first = {"layer": ("layer", range(len(blocks))), "block": ("block", blocks)}
    return table_of(title, {**first, **columns}, *notes)


def panels(ax: Axes | None, count: int = 1) -> tuple[Figure, list[Axes]]:
    """Return axes side by side in a new figure, to which no window belongs; or the ones that are given, with theirs."""
    why = "plots need matplotlib"
    axes, figure = (import_optional(f"matplotlib.{part}", why, "plots") for part in ("axes", "figure"))
    if ax is None:
        made = figure.Figure(figsize=(6.4 if count == 1 else 4.0 * count, 4.2), layout="constrained")
        return made, list(made.subplots(1, count, squeeze=False, sharex=True, sharey=True)[0])
    if not isinstance(ax, axes.Axes):
        raise SteerError(f"`ax` is a matplotlib Axes or None; received {type(ax).__name__}.")
    if count > 1:
        raise SteerError(f"`ax` has room for one panel, and there are {count} to draw. Name one, or leave `ax` out.")
    found: Any = ax.get_figure()
    return found, [ax]


def lines(
    ax: Axes | None,
    title: str,
    x: str,
    y: str,
    series: Mapping[str, Values],
    *,
    at: Sequence[float] | None = None,
    spread: Mapping[str, Values] | None = None,
    log: bool = False,
) -> Figure:
    """Draw lines by name over layers or steps, `at`; None leaves a gap, as does what has no logarithm."""
    figure, (axes,) = panels(ax)
    for name, values in series.items():
        numbers = [math.nan if one is None or (log and one <= 0) else float(one) for one in _listed(values)]
        place = range(len(numbers)) if at is None else at
        if spread is None:
            axes.plot(place, numbers, marker="o", markersize=4, label=name)
        else:
            axes.errorbar(place, numbers, yerr=_listed(spread[name]), marker="o", markersize=4, capsize=3, label=name)
    axes.set(title=title, xlabel=x, ylabel=y, yscale="log" if log else "linear")
    axes.locator_params(axis="x", integer=True)
    if len(series) > 1:
        axes.legend()
    return figure


def bars(ax: Axes | None, title: str, y: str, values: Mapping[str, float | None]) -> Figure:
    """Draw one bar for each name; None leaves a gap."""
    figure, (axes,) = panels(ax)
    axes.bar(list(values), [math.nan if one is None else one for one in values.values()])
    axes.set(title=title, ylabel=y)
    axes.tick_params(axis="x", rotation=30)
    return figure


def _listed(values: Values) -> list[Any]:
    return values.tolist() if isinstance(values, Tensor) else list(values)
