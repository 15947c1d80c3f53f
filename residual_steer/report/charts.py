"""Plots of methods against each other: lines with bands, labelled points, and grouped bars."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from .canvas import blank, legend_below
from .labels import Mark, write_labels
from .series import Plot, Series
from .styles import INK, Style
from .table import Measured

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["describe", "figure", "names", "remarks"]


def names(plot: Plot) -> list[str]:
    """Return the methods that are drawn."""
    return [series.name for series in plot.series]


def describe(plot: Plot) -> str:
    """Describe a plot in a sentence."""
    kind = {"lines": "Lines", "scatter": "Points", "bars": "Bars"}[plot.kind]
    return f"{kind}: {plot.y} against {plot.x}, for: {'; '.join(names(plot))}."


def remarks(plot: Plot) -> list[str]:
    """Return a note on points that cannot be drawn, if there are any."""
    count = sum(len(series.x) - len(_points(plot, series)) for series in plot.series)
    why = "not a finite number, or not positive on a logarithmic axis"
    return [f"Not drawn: {count} {'point' if count == 1 else 'points'} ({why})."] if count else []


def figure(plot: Plot, styles: Mapping[str, Style]) -> Figure:
    """Draw a plot."""
    page = blank()
    axes = page.add_subplot()
    axes.set_title("\n".join(textwrap.wrap(plot.title, 72)), pad=10)
    axes.set_xlabel(str(plot.x))
    axes.set_ylabel("\n".join(textwrap.wrap(str(plot.y), 44)))
    if plot.x.log and plot.kind != "bars":
        axes.set_xscale("log")
    if plot.y.log:
        axes.set_yscale("log")
    axes.grid(visible=True, axis="y" if plot.kind == "bars" else "both")
    _DRAWN[plot.kind](axes, plot, styles)
    return page


def _tick(axes: Axes, plot: Plot) -> None:
    """Write 10,000 and 0.01 at the ticks of logarithmic axes; also between decades, where there are few of them."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    def text(value: float, _: int) -> str:
        return f"{value:,.10g}" if 1e-4 <= value < 1e7 else f"{value:.0e}"

    if plot.kind == "lines" and not plot.x.log and all(_whole(x) for series in plot.series for x in series.x):
        axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))  # no layer stands at 0.5
    for axis, log in ((axes.xaxis, plot.x.log and plot.kind != "bars"), (axes.yaxis, plot.y.log)):
        if log:
            low, high = sorted(axis.get_view_interval())
            few = low > 0 and high / low < 300
            axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if few else (1.0,)))
            axis.set_major_formatter(FuncFormatter(text))
            axis.set_minor_formatter(NullFormatter())


def _lines(axes: Axes, plot: Plot, styles: Mapping[str, Style]) -> None:
    drawn = [point for series in plot.series for point in _points(plot, series)]
    lowest = min((p[2] - p[3] if p[2] > p[3] else p[2] / 2 for p in drawn), default=0)
    for series in plot.series:
        style, points = styles[series.name], _points(plot, series, gaps=True)
        x, y, spread = [p[0] for p in points], [p[2] for p in points], [p[3] for p in points]
        marked: Any = {"marker": style.marker, "markersize": 5.5, "markevery": max(1, len(x) // 12)}
        edge: Any = {"markeredgecolor": INK, "markeredgewidth": 0.5}
        axes.plot(x, y, color=style.color, linestyle=style.dashes, linewidth=1.9, label=series.name, **marked, **edge)
        if any(width > 0 for width in spread):
            low = [value - width for value, width in zip(y, spread, strict=True)]
            if plot.y.log:  # which has no place for the end of a band that reaches below zero
                low = [max(bound, lowest) for bound in low]
            high = [value + width for value, width in zip(y, spread, strict=True)]
            axes.fill_between(x, low, high, color=style.color, alpha=0.18, linewidth=0)
    _tick(axes, plot)
    _legend(axes, plot)


def _whole(x: float | Measured | str) -> bool:
    return isinstance(x, (int, float)) and float(x).is_integer()


def _bars(axes: Axes, plot: Plot, styles: Mapping[str, Style]) -> None:
    groups = list(dict.fromkeys(str(x) for series in plot.series for x in series.x))
    width = 0.8 / len(plot.series)
    for index, series in enumerate(plot.series):
        points = _points(plot, series)
        at = [groups.index(str(p[0])) + (index - (len(plot.series) - 1) / 2) * width for p in points]
        height, spread = [p[2] for p in points], [p[3] for p in points]
        style: Any = {"color": styles[series.name].color, "edgecolor": INK, "linewidth": 0.6, "label": series.name}
        axes.bar(at, height, 0.92 * width, **style)
        for x, y, error in zip(at, height, spread, strict=True):
            if error > 0:
                axes.errorbar(x, y, yerr=error, fmt="none", ecolor=INK, elinewidth=1.1, capsize=3)
    longest = max((len(group) for group in groups), default=0)
    turned = longest * len(groups) > 90 and longest > 6
    room = max(10, 84 // max(1, len(groups)))
    names = groups if turned else ["\n".join(textwrap.wrap(group, room)) for group in groups]
    axes.set_xticks(range(len(groups)), names, rotation=30 if turned else 0, ha="right" if turned else "center")
    axes.tick_params(axis="x", length=0)
    _tick(axes, plot)
    _legend(axes, plot)


def _scatter(axes: Axes, plot: Plot, styles: Mapping[str, Style]) -> None:
    axes.margins(0.16, 0.2)
    marks: list[Mark] = []
    for series in plot.series:
        style, points = styles[series.name], _points(plot, series)
        x, y = [p[0] for p in points], [p[2] for p in points]
        for at, across, value, up, _ in points:
            errors: Any = {"yerr": up or None, "xerr": across or None}
            if across > 0 or up > 0:
                axes.errorbar(at, value, **errors, fmt="none", ecolor=style.color, elinewidth=1.3, capsize=3, zorder=2)
        size = 9 if len(points) <= 30 else 4
        edge: Any = {"markeredgecolor": INK, "markeredgewidth": 0.7 if len(points) <= 30 else 0.2}
        line = style.dashes if series.labels else "none"  # labels are settings of one method; a cloud has none
        shape: Any = {"color": style.color, "marker": style.marker, "markersize": size, "label": series.name}
        axes.plot(x, y, linestyle=line, linewidth=1.1, zorder=3, **shape, **edge)
        names = series.labels or ((series.name,) if len(series.x) == 1 else ("",) * len(series.x))
        marks += [Mark(p[0], p[2], p[1], p[3], names[p[4]]) for p in points]
    _tick(axes, plot)
    if any(len(series.x) != 1 or series.labels for series in plot.series):
        _legend(axes, plot)
        write_labels(axes, marks)
    elif not write_labels(axes, marks):
        _legend(axes, plot)


def _legend(axes: Axes, plot: Plot) -> None:
    page: Any = axes.figure
    if len(plot.series) > 1:
        legend_below(page, names(plot))


def _points(plot: Plot, series: Series, gaps: bool = False) -> list[tuple[Any, float, float, float, int]]:
    """Return (x, its spread, y, its spread, position) of every point that can be drawn.

    With `gaps`, a point without y is there with NaN, so that a line stops before it and begins again behind it.
    """
    found = []
    for index, (x, y) in enumerate(zip(series.x, series.y, strict=True)):
        (at, across), (value, up) = _numbers(x), _numbers(y)
        drawn = isinstance(at, str) or (math.isfinite(at) and not (plot.x.log and at <= 0))
        if not drawn:
            continue
        if math.isfinite(value) and not (plot.y.log and value <= 0):
            found.append((at, across, value, up, index))
        elif gaps:
            found.append((at, 0.0, math.nan, 0.0, index))
    return sorted(found, key=lambda point: point[0]) if plot.kind == "lines" else found


def _numbers(value: float | Measured | str | None) -> tuple[Any, float]:
    if isinstance(value, Measured):
        return value.mean, value.spread
    return (math.nan if value is None else value), 0.0


_DRAWN: Mapping[str, Callable[[Axes, Plot, Mapping[str, Style]], None]] = {
    "lines": _lines,
    "scatter": _scatter,
    "bars": _bars,
}
