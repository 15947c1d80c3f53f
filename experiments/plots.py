"""Every kind of picture as a matplotlib figure, and in words."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from benchmarks import charts
from benchmarks.charts import INK, PAPER, Plot, look, page

from .results import Arrows, Matrix, Picture, Surface

__all__ = ["describe", "draw"]

_LONGEST, _AIM = 0.5, 0.3  # of a panel: how long most arrows may be before all are scaled, and are then


def draw(picture: Picture) -> Figure:
    """Return a picture as a figure, which belongs to no pyplot and no backend."""
    with page():
        return _drawing(picture)


@functools.singledispatch
def _drawing(picture: Plot) -> Figure:
    return charts.draw(picture)


def describe(picture: Picture) -> str:
    """Describe a picture in a sentence or two to those who cannot see it."""
    if isinstance(picture, Plot):
        return charts.words(picture)
    if isinstance(picture, Arrows):
        panels = "; ".join(f"{panel.name} ({len(panel.x):,})" for panel in picture.panels)
        return f"{picture.title}. Arrows: {picture.y} against {picture.x}, for: {panels}. {lengths(picture)}".strip()
    numbers = [value for row in picture.values for value in row if value is not None]
    reach = f", from {min(numbers):.3g} to {max(numbers):.3g}" if numbers else ""
    if isinstance(picture, Matrix):
        return f"{picture.title}. Heat map: {picture.z} by {picture.y} (rows) and {picture.x} (columns){reach}."
    paths = f" Paths over it: {'; '.join(path.name for path in picture.paths)}." if picture.paths else ""
    return f"{picture.title}. Contours: {picture.z} over {picture.x} and {picture.y}{reach}.{paths}"


@_drawing.register
def _(picture: Matrix) -> Figure:
    high = min(6.5, max(1.5, 0.36 * len(picture.rows))) + 1.8
    figure = Figure(figsize=(7.2, high), layout="constrained")
    axes = figure.add_subplot()
    grid = np.array([[np.nan if value is None else value for value in row] for row in picture.values], dtype=float)
    axes.patch.set(hatch="////", edgecolor="0.6", linewidth=0)  # seen where a cell has no number
    drawn = axes.imshow(grid, cmap="viridis", aspect="auto", norm=LogNorm() if picture.z.log else None)
    axes.set_title(picture.title)
    axes.set_xlabel(str(picture.x))
    axes.set_ylabel(str(picture.y))
    turned: dict[str, Any] = {"rotation": 45, "ha": "right"} if sum(map(len, picture.columns)) > 70 else {}
    axes.set_xticks(range(len(picture.columns)), picture.columns, **turned)
    axes.set_yticks(range(len(picture.rows)), picture.rows)
    if grid.size <= 150:
        for (row, column), value in np.ndenumerate(grid):
            if np.isfinite(value):
                light = np.dot(drawn.to_rgba(value)[:3], (0.2126, 0.7152, 0.0722)) > 0.45
                color = "#000000" if light else "#ffffff"
                axes.text(column, row, f"{value:.3g}", ha="center", va="center", color=color, fontsize=8.5)
    figure.colorbar(drawn, ax=axes, label=str(picture.z))
    return figure


@_drawing.register
def _(picture: Surface) -> Figure:
    figure = Figure(figsize=(7.2, 4.8), layout="constrained")
    axes = figure.add_subplot()
    norm = LogNorm() if picture.z.log else None
    plane: Any = (picture.across, picture.up, picture.values)
    drawn = axes.contourf(*plane, levels=16, cmap="viridis", norm=norm, alpha=0.75)
    names = [path.name for path in picture.paths]
    for path in picture.paths:
        style = look(path.name, names)
        axes.plot(path.x, path.y, color=PAPER, linewidth=4)
        axes.plot(path.x, path.y, linewidth=2, label=path.name, markevery=[-1], markersize=8, **style)
        axes.plot(path.x[:1], path.y[:1], "o", color=PAPER, markeredgecolor=style["color"], markeredgewidth=1.8)
    axes.set_title(picture.title)
    axes.set_xlabel(str(picture.x))
    axes.set_ylabel(str(picture.y))
    axes.set_xscale("log" if picture.x.log else "linear")
    axes.set_yscale("log" if picture.y.log else "linear")
    figure.colorbar(drawn, ax=axes, label=str(picture.z))
    if names:
        axes.plot([], [], "o", color=PAPER, markeredgecolor=INK, label="start")
        figure.legend(loc="outside lower center", ncols=4)
    return figure


@_drawing.register
def _(picture: Arrows) -> Figure:
    count = len(picture.panels)
    figure = Figure(figsize=(7.2, 2 + 4 / count), layout="constrained")
    figure.suptitle(picture.title, x=0.01, ha="left", fontsize=11.5, fontweight="bold")
    panels = figure.subplots(1, count, sharex=True, sharey=True, squeeze=False)[0]
    groups = list(dict.fromkeys(group for panel in picture.panels for group in panel.groups))
    colors = {group: look(group, groups)["color"] for group in groups}
    factor = factor_of(picture)
    for axes, panel in zip(panels, picture.panels, strict=True):
        shades = [colors[group] for group in panel.groups] or look(panel.name)["color"]
        where = (panel.x, panel.y, panel.dx, panel.dy)
        axes.quiver(*where, color=shades, angles="xy", scale_units="xy", scale=1 / factor, width=0.006)
        for sign in (0, 1):  # both ends are within the limits
            x = np.add(panel.x, np.multiply(sign * factor, panel.dx))
            axes.plot(x, np.add(panel.y, np.multiply(sign * factor, panel.dy)), linestyle="none")
        axes.set_title(panel.name, fontsize=10, fontweight="normal")
        axes.set_xlabel(str(picture.x), fontsize=9)
        axes.grid(visible=True)
    panels[0].set_ylabel(str(picture.y))
    for group, color in colors.items():
        panels[0].plot([], [], "s", color=color, label=group)
    if groups:
        figure.legend(loc="outside lower center", ncols=8, fontsize=9, title=lengths(picture))
    else:
        figure.supxlabel(lengths(picture), fontsize=9)
    return figure


def factor_of(arrows: Arrows) -> float:
    """Return what all arrows are multiplied by: 1, or a power of ten times 1, 2 or 5 where they would cover a panel."""
    x, y = (np.concatenate([getattr(panel, name) for panel in arrows.panels]) for name in ("x", "y"))
    dx, dy = (np.concatenate([getattr(panel, name) for panel in arrows.panels]) for name in ("dx", "dy"))
    most = float(np.quantile(np.hypot(dx / (np.ptp(x) or 1.0), dy / (np.ptp(y) or 1.0)), 0.95))
    if not most or 0.03 <= most <= _LONGEST:
        return 1.0
    power = math.floor(math.log10(_AIM / most))
    return max(step * 10.0**power for step in (1, 2, 5) if step * 10.0**power <= _AIM / most)


def lengths(arrows: Arrows) -> str:
    """Return a note on the length of arrows, if it is not to scale."""
    factor = factor_of(arrows)
    return "" if factor == 1 else f"Arrows are drawn at {factor:g} times their length."
