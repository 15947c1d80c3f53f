"""Heat maps: a matrix as colours, with its numbers where they can be read."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .canvas import WIDTH, blank, color_bar, headline, shades
from .pictures import Matrix
from .scales import Scale
from .styles import PAPER, QUIET, Style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["describe", "figure", "names", "remarks"]

_BLACK, _WHITE = "#000000", "#ffffff"  # on colours that stay what they are on a dark page, and not INK and PAPER
_SIZES = (9.5, 8.5, 7.5, 6.8)  # points of the type in cells
_HIGH, _LOW, _WIDE = 0.36, 0.1, 1.1  # inches: of a cell with a number, the lowest cell, the widest one
_TALLEST = 6.5  # inches of all cells
_SHAPES = 4096  # cells; more become an image within an SVG
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
    high = min(_HIGH, max(_LOW, _TALLEST / rows))
    body = min(_TALLEST, max(1.1, high * rows))  # inches, with room for a colour bar beside a single row
    page = blank(body + 1.2)
    axes = page.add_subplot()
    headline(page, matrix.title)
    drawn, limits = _cells(axes, matrix)
    room = max(14, round(13 * body))
    axes.set_ylabel("\n".join(textwrap.wrap(str(matrix.y), room)))
    axes.set_xlabel("\n".join(textwrap.wrap(str(matrix.x), 60)))
    _row_names(axes, matrix.rows, body / rows)
    if limits is not None:
        color_bar(axes, drawn, matrix.z, limits, room)
    _settle(page, axes, _WIDE * columns, body)
    _column_names(axes, matrix.columns, _size(axes)[0] / columns)
    _settle(page, axes, _WIDE * columns, body)
    _write(axes, matrix, drawn)
    return page


def _cells(axes: Axes, matrix: Matrix) -> tuple[Any, tuple[float, float] | None]:
    """Colour the cells; return them with the lowest and the highest value."""
    import numpy as np
    from matplotlib.colors import LogNorm, Normalize

    numbers = _numbers(matrix)
    limits = (min(numbers), max(numbers)) if numbers else None
    low, high = limits or (0.0, 1.0)
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
    return drawn, limits


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


def _settle(page: Figure, axes: Axes, widest: float, high: float) -> None:
    """Give the cells the height that they are to have, and no more than a width, whatever stands around them."""
    engine: Any = page.get_layout_engine()
    page.draw_without_rendering()
    spare = _size(axes)[0] - widest
    if spare > 0.02:
        _, _, width, _ = engine.get()["rect"]
        engine.set(rect=(0, 0, width - spare / WIDTH, 1))
    for _ in range(2):  # the layout moves a little with the height
        page.set_figheight(page.get_figheight() + high - _size(axes)[1])
        page.draw_without_rendering()


def _size(axes: Axes) -> tuple[float, float]:
    """Return the width and height of axes in inches."""
    box = axes.get_window_extent()
    return box.width / axes.figure.dpi, box.height / axes.figure.dpi


def _write(axes: Axes, matrix: Matrix, drawn: Any) -> None:
    """Write the numbers into the cells, in the largest type that fits all of them; not at all where none does."""
    numbers = _numbers(matrix)
    scale = Scale.of(numbers, matrix.z.log)
    wide, high = (
        part / count for part, count in zip(_size(axes), (len(matrix.columns), len(matrix.rows)), strict=True)
    )
    longest = max((len(scale.text(number)) for number in numbers), default=0)
    fitting = [
        size
        for size in _SIZES
        if (0.62 * longest + 0.4) * size <= wide * 72 and 1.3 * size <= high * 72
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
