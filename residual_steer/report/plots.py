"""Plots as SVG and PNG. Equal plots are equal bytes, with one version of matplotlib, whatever the user's settings."""

from __future__ import annotations

import contextlib
import io
import math
import textwrap
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from residual_steer.errors import SteerError

from .labels import Mark, write_labels
from .result import Measured, Plot, Series
from .styles import INK, PAPER, QUIET, Style, styles_for

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["alt_text", "draw", "left_out", "png", "svg"]

WIDTH, HEIGHT, DPI = 7.2, 4.4, 160  # inches; dots per inch of PNG
_SETTINGS: dict[str, Any] = {
    "font.size": 10,
    "axes.titlesize": 11.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": QUIET,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": INK,
    "text.parse_math": False,  # a dollar is a dollar
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": QUIET,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.7,
    "figure.facecolor": PAPER,
    "axes.facecolor": PAPER,
    "savefig.facecolor": PAPER,
    "legend.frameon": False,
    "svg.hashsalt": "residual_steer",
    "svg.fonttype": "path",
}


def svg(plot: Plot, styles: Mapping[str, Style] | None = None) -> str:
    """Return a plot as SVG.

    Args:
        plot: what is drawn.
        styles: of the methods, as `styles_for` returns them for a whole report; from the plot alone if left out.

    Raises:
        SteerError: matplotlib is not installed.
    """
    return _save(plot, styles, "svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))).decode()


def png(plot: Plot, styles: Mapping[str, Style] | None = None) -> bytes:
    """Return a plot as PNG; `styles` as `svg` takes them.

    Raises:
        SteerError: matplotlib is not installed.
    """
    return _save(plot, styles, "png", dpi=DPI, metadata={"Software": None})


def alt_text(plot: Plot) -> str:
    """Describe a plot in a sentence to those who cannot see it."""
    kind = {"lines": "Lines", "scatter": "Points", "bars": "Bars"}[plot.kind]
    names = "; ".join(series.name for series in plot.series)
    return f"{plot.title}. {kind}: {plot.y} against {plot.x}, for: {names}."


def left_out(plot: Plot) -> list[str]:
    """Return a note on points that cannot be drawn, if there are any."""
    count = sum(len(series.x) - len(_points(plot, series)) for series in plot.series)
    why = "not a finite number, or not positive on a logarithmic axis"
    return [f"Not drawn: {count} {'point' if count == 1 else 'points'} ({why})."] if count else []


def draw(plot: Plot, styles: Mapping[str, Style] | None = None) -> Figure:
    """Return a plot as a matplotlib figure, which belongs to no pyplot and no backend.

    Raises:
        SteerError: matplotlib is not installed.
    """
    with _settings():
        return _figure(plot, styles or styles_for(series.name for series in plot.series))


def _save(plot: Plot, styles: Mapping[str, Style] | None, kind: str, **options: Any) -> bytes:
    with _settings():
        file = io.BytesIO()
        _figure(plot, styles or styles_for(series.name for series in plot.series)).savefig(file, format=kind, **options)
        return file.getvalue()


@contextlib.contextmanager
def _settings() -> Iterator[None]:
    """Draw with settings of our own, and leave the user's as they were.

    Raises:
        SteerError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise SteerError(
            "plots are drawn with matplotlib, which cannot be imported here; pip install 'residual-steer[plots]'."
        ) from error
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        settings: Any = matplotlib.rcParams  # typed by their 300 names
        settings.update(_SETTINGS)
        yield


def _figure(plot: Plot, styles: Mapping[str, Style]) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=(WIDTH, HEIGHT), layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08))
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_title("\n".join(textwrap.wrap(plot.title, 72)), pad=10)
    axes.set_xlabel(str(plot.x))
    axes.set_ylabel("\n".join(textwrap.wrap(str(plot.y), 44)))
    if plot.x.log and plot.kind != "bars":
        axes.set_xscale("log")
    if plot.y.log:
        axes.set_yscale("log")
    axes.grid(visible=True, axis="y" if plot.kind == "bars" else "both")
    _DRAWN[plot.kind](axes, plot, styles)
    return figure


def _tick(axes: Axes, plot: Plot) -> None:
    """Write 10,000 and 0.01 at the ticks of logarithmic axes; also between decades, where there are few of them."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    def text(value: float, _: int) -> str:
        return f"{value:,.10g}" if 1e-4 <= value < 1e7 else f"{value:.0e}"

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
    """Name the methods below the plot, where nothing is covered, on a page that is so much taller."""
    figure = axes.get_figure(root=True)
    if figure is not None and len(plot.series) > 1:
        longest = max(len(series.name) for series in plot.series)
        columns = max(1, min(len(plot.series), 80 // (longest + 8)))
        figure.legend(loc="outside lower center", ncols=columns, handlelength=3)
        figure.set_figheight(HEIGHT + 0.21 * math.ceil(len(plot.series) / columns))


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
