"""Surfaces: filled contours, with paths over them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

from .canvas import HEIGHT, blank, color_bar, headline, legend_below, number_axis, shades
from .pictures import Surface, Trajectory
from .scales import Scale, levels_of
from .styles import INK, PAPER, Style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["describe", "figure", "names", "remarks"]

_PALE = 0.35  # of white, so that paths stand out
_HEAD = 0.01  # of the plane: how long a piece of the path points with the arrowhead
_HEADS = (0.2, 0.5, 0.8)  # of a path's length: where its direction is shown


def names(surface: Surface) -> list[str]:
    """Return the methods that take the paths."""
    return [path.name for path in surface.paths]


def describe(surface: Surface) -> str:
    """Say what the surface is of, what it reaches from and to, and who walks over it."""
    numbers = [value for row in surface.values for value in row]
    scale = Scale.of(numbers, surface.z.log)
    paths = f" Paths over it: {'; '.join(names(surface))}." if surface.paths else ""
    return (
        f"Contours: {scale.label(surface.z)} over {surface.x} and {surface.y}, from {scale.text(min(numbers))} to "
        f"{scale.text(max(numbers))}.{paths}"
    )


def remarks(surface: Surface) -> list[str]:
    """Return a note on paths that leave the plane, if there are any."""
    left = [
        path.name
        for path in surface.paths
        if min(path.x) < surface.across[0]
        or max(path.x) > surface.across[-1]
        or min(path.y) < surface.up[0]
        or max(path.y) > surface.up[-1]
    ]
    return [f"Beyond the plane that was measured, for a part of the way: {', '.join(left)}."] if left else []


def figure(surface: Surface, styles: Mapping[str, Style]) -> Figure:
    """Draw a surface."""
    page = blank(HEIGHT + 0.4)
    axes = page.add_subplot()
    headline(page, surface.title)
    if surface.x.log:
        axes.set_xscale("log")
    if surface.y.log:
        axes.set_yscale("log")
    _bands(axes, surface)
    for path in surface.paths:
        _path(axes, surface, path, styles[path.name])
    x, y = _limits(surface)
    axes.set(xlim=x, ylim=y)
    number_axis(axes.xaxis, surface.x, x, 60)
    number_axis(axes.yaxis, surface.y, y, 44)
    if surface.paths:
        _legend(page, surface, styles)
    return page


def _bands(axes: Axes, surface: Surface) -> None:
    from matplotlib.colors import LogNorm, Normalize

    low, high = min(map(min, surface.values)), max(map(max, surface.values))
    levels = levels_of(low, high, surface.z.log)
    norm = (LogNorm if surface.z.log else Normalize)(levels[0], levels[-1])
    plane: Any = (surface.across, surface.up, surface.values)
    drawn = axes.contourf(*plane, levels=levels, cmap=shades("viridis", count=256, pale=_PALE), norm=norm)
    if low < high:
        axes.contour(*plane, levels=levels, colors="#ffffff", linestyles="solid", linewidths=0.5)
    color_bar(axes, drawn, surface.z, [value for row in surface.values for value in row], 44)


def _path(axes: Axes, surface: Surface, path: Trajectory, style: Style) -> None:
    """Draw a path: a line in a pale seam, arrowheads along it, an empty circle at its start, a marker at its end."""
    axes.plot(path.x, path.y, color=PAPER, linewidth=4, solid_joinstyle="round", zorder=3)
    axes.plot(path.x, path.y, color=style.color, linestyle=style.dashes, linewidth=2, zorder=4, label=path.name)
    for tail, head in _directions(surface, path):
        arrow: Any = {"arrowstyle": "-|>", "color": style.color, "shrinkA": 0, "shrinkB": 0, "mutation_scale": 17}
        axes.annotate("", head, tail, arrowprops=arrow, zorder=4)
    axes.plot(path.x[:1], path.y[:1], **_start(style.color), clip_on=False, zorder=5)
    axes.plot(path.x[-1:], path.y[-1:], **_end(style), clip_on=False, zorder=6)


def _start(color: str) -> dict[str, Any]:
    face: dict[str, Any] = {"markerfacecolor": PAPER, "markeredgecolor": color, "markeredgewidth": 1.8}
    return {"linestyle": "none", "marker": "o", "markersize": 6.5, **face}


def _end(style: Style) -> dict[str, Any]:
    edge: dict[str, Any] = {"color": style.color, "markeredgecolor": INK, "markeredgewidth": 0.7}
    return {"linestyle": "none", "marker": style.marker, "markersize": 9, **edge}


def _directions(surface: Surface, path: Trajectory) -> list[tuple[tuple[float, float], tuple[float, float]]]:
    """Return tail and tip of the arrowheads of a path, which lie within its steps."""
    wide = surface.across[-1] - surface.across[0]
    high = surface.up[-1] - surface.up[0]
    points = list(zip(path.x, path.y, strict=True))
    steps = [math.hypot((b[0] - a[0]) / wide, (b[1] - a[1]) / high) for a, b in pairwise(points)]
    ends = [0.0, *accumulate(steps)]
    found = []
    for part in _HEADS if ends[-1] else ():
        goal = part * ends[-1]
        index = next(i for i, step in enumerate(steps) if step and ends[i + 1] >= goal)
        tail, tip = points[index], points[index + 1]
        share = (goal - ends[index]) / steps[index]
        back = max(0.0, share - _HEAD / steps[index])
        found.append((_between(tail, tip, back), _between(tail, tip, share)))
    return found


def _between(start: tuple[float, float], end: tuple[float, float], share: float) -> tuple[float, float]:
    return start[0] + share * (end[0] - start[0]), start[1] + share * (end[1] - start[1])


def _limits(surface: Surface) -> tuple[tuple[float, float], tuple[float, float]]:
    """Return limits that show the whole plane and the whole of every path."""
    x = [x for path in surface.paths for x in path.x]
    y = [y for path in surface.paths for y in path.y]
    return _reach(surface.across, x, surface.x.log), _reach(surface.up, y, surface.y.log)


def _reach(plane: Sequence[float], walked: Sequence[float], log: bool) -> tuple[float, float]:
    low, high = min(plane[0], *walked, math.inf), max(plane[-1], *walked, -math.inf)
    air = 0.0 if log else 0.04 * (high - low)  # for markers beyond the plane
    return low - air * (low < plane[0]), high + air * (high > plane[-1])


def _legend(page: Figure, surface: Surface, styles: Mapping[str, Style]) -> None:
    from matplotlib.lines import Line2D

    handles = []
    for path in surface.paths:
        style = styles[path.name]
        line = {**_end(style), "linestyle": style.dashes, "linewidth": 2}
        handles.append(Line2D([], [], **line))
    handles.append(Line2D([], [], **_start(INK)))
    legend_below(page, [*names(surface), "start"], handles)
