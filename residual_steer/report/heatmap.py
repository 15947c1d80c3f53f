"""Heat maps: a matrix as colours, with its numbers where they can be read."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .canvas import WIDTH, blank, color_bar, headline, settle, shades
from .pictures import Matrix
from .scales import Scale
from .styles import PAPER, QUIET, Style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["describe", "figure", "names", "remarks"]

_BLACK, _WHITE = "#000000", "#ffffff"  # on colours that stay what they are on a dark page, and not INK and PAPER
_SIZES = (9.5, 8.5, 7.5, 6.8)  # points of the type in cells
_HIGH, _WIDE = 0.36, 1.1  # inches: of a cell
_LEAST, _TALLEST = 1.35, 6.5  # inches: of all cells, beside which a colour bar has room
_SHAPES = 2500  # cells; more become an image within an SVG
_NAME = 26  # letters of a row's name in a line
_LETTER = 0.6  # of the type's size: the width of a letter


def names(matrix: Matrix) -> list[str]:
    """Return the methods that are drawn: none has a style here."""
    return []


def describe(matrix: Matrix) -> str:
    """Say what the matrix is of, and what it reaches from and to."""
    numbers = _numbers(matrix)
    size = f"{len(matrix.rows)} × {len(matrix.columns)}"
    scale = Scale.of(numbers, matrix.z.log)
    reach = f", from {scale.text(min(numbers))} to {scale.text(max(numbers))}" if numbers else ""
    return f"Heat map of {size} cells: {scale.label(matrix.z)} by {matrix.y} (rows) and {matrix.x} (columns){reach}."


def remarks(matrix: Matrix) -> list[str]:
    """Return a note on hatched cells, if there are any."""
    return ["A hatched cell has no number."] if any(None in row for row in matrix.values) else []


def figure(matrix: Matrix, styles: Mapping[str, Style]) -> Figure:
    """Draw a matrix."""
    rows, columns = len(matrix.rows), len(matrix.columns)
    body = min(_TALLEST, max(_LEAST, _HIGH * rows))  # inches
    page = blank(body + 4)  # more than will be needed, until it is known
    axes = page.add_subplot()
    headline(page, matrix.title)
    drawn = _cells(axes, matrix)
    room = round(14 * body)  # letters
    axes.set_ylabel("\n".join(textwrap.wrap(str(matrix.y), room)))
    axes.set_xlabel("\n".join(textwrap.wrap(str(matrix.x), 60)))
    _row_names(axes, matrix.rows, body / rows)
    numbers = _numbers(matrix)
    if numbers:
        color_bar(axes, drawn, matrix.z, numbers, room)
    wide = _narrowed(page, axes, _WIDE * columns) / columns
    _column_names(axes, matrix.columns, wide)
    settle(page, axes, body)
    _write(axes, matrix, drawn, (wide, body / rows))
    return page


def _cells(axes: Axes, matrix: Matrix) -> Any:
    """Colour the cells."""
    import numpy as np
    from matplotlib.colors import LogNorm, Normalize

    numbers = _numbers(matrix)
    low, high = min(numbers, default=0.0), max(numbers, default=0.0)
    if not low < high:  # a colour in the middle
        half = abs(low) / 2 or 0.5
        low, high = low - half, high + half
    grid = np.array([[math.nan if value is None else value for value in row] for row in matrix.values])
    few = grid.size <= 400
    edges = [np.arange(count + 1) - 0.5 for count in (grid.shape[1], grid.shape[0])]
    drawn = axes.pcolormesh(
        *edges,
        np.ma.masked_invalid(grid),
        norm=LogNorm(low, high) if matrix.z.log else Normalize(low, high),
        cmap=shades("viridis"),
        edgecolors=PAPER if few else "face",
        linewidth=1.2 if few else 0.2,
        rasterized=grid.size > _SHAPES,
    )
    axes.patch.set(hatch="////", edgecolor=QUIET, linewidth=0)  # which is seen where a cell is empty
    axes.invert_yaxis()
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return drawn


def _row_names(axes: Axes, rows: Sequence[str], high: float) -> None:
    size = 9.0
    lines = max(1, int(high * 72 / (1.25 * size)))
    step = max(1, math.ceil(1.15 * size / (high * 72)))
    shown = range(0, len(rows), step)
    axes.set_yticks(shown, [_folded(rows[index], _NAME, lines) for index in shown], fontsize=size)


def _column_names(axes: Axes, columns: Sequence[str], wide: float) -> None:
    """Name the columns: straight where the names have room, maybe in lines, and at an angle where they have none."""
    size = 9.0
    room = int(wide * 72 / (_LETTER * size)) - 1
    longest = max((len(word) for name in columns for word in name.split()), default=0)
    if longest <= room and max(map(len, columns)) <= 3 * room:
        axes.set_xticks(range(len(columns)), ["\n".join(textwrap.wrap(name, room)) for name in columns], fontsize=size)
        return
    short = max(map(len, columns)) <= 4  # numbers, of which some may be left out
    step = max(1, math.ceil((4 * _LETTER if short else 1.5) * size / (wide * 72)))
    shown = range(0, len(columns), step)
    turned: dict[str, Any] = {} if short else {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}
    axes.set_xticks(shown, [_folded(columns[index], _NAME, 1) for index in shown], fontsize=size, **turned)


def _folded(name: str, room: int, lines: int) -> str:
    """Return a name in so many lines; its end is cut where it is longer."""
    parts = textwrap.wrap(name, room)
    if len(parts) > lines:
        last = " ".join(parts[lines - 1 :])
        parts = [*parts[: lines - 1], f"{last[: room - 1].rstrip()}…"]
    return "\n".join(parts)


def _narrowed(page: Figure, axes: Axes, widest: float) -> float:
    """Keep axes within a width, for cells that are no banners; return the width that they have."""
    engine: Any = page.get_layout_engine()
    page.draw_without_rendering()
    found = axes.get_window_extent().width / page.dpi
    if found > widest:
        engine.set(rect=(0, 0, 1 - (found - widest) / WIDTH, 1))
    return min(found, widest)


def _write(axes: Axes, matrix: Matrix, drawn: Any, cell: tuple[float, float]) -> None:
    """Write the numbers into cells of a size, in the largest type that fits all of them; not at all where none does."""
    numbers = _numbers(matrix)
    scale = Scale.of(numbers, matrix.z.log)
    longest = max((len(scale.text(number)) for number in numbers), default=0)
    fitting = [
        size
        for size in _SIZES
        if (0.62 * longest + 0.4) * size <= cell[0] * 72 and 1.3 * size <= cell[1] * 72
    ]  # fmt: skip
    if not fitting:
        return
    for row, values in enumerate(matrix.values):
        for column, value in enumerate(values):
            if value is not None:
                color = _legible(drawn.to_rgba(value))
                place: Any = {"ha": "center", "va": "center_baseline"}
                axes.text(column, row, scale.text(value), fontsize=fitting[0], color=color, **place)


def _legible(color: Sequence[float]) -> str:
    """Return black or white, whichever has more contrast on a colour, as WCAG 2 defines it."""
    parts = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in color[:3]]
    light = sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), parts, strict=True))
    return _BLACK if (light + 0.05) / 0.05 >= 1.05 / (light + 0.05) else _WHITE


def _numbers(matrix: Matrix) -> list[float]:
    return [value for row in matrix.values for value in row if value is not None]
