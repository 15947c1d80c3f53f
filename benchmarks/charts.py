"""Charts of methods against each other: lines with bands, points with bars of error, and grouped bars.

A method has the same colour and marker in every chart; the colours are Okabe and Ito's, told apart with every common
colour blindness.
"""

from __future__ import annotations

import contextlib
import io
import math
import re
import statistics
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, Literal

import matplotlib
from matplotlib.figure import Figure

from residual_steer import SteerError

__all__ = ["Axis", "Measured", "Plot", "Series", "draw", "look", "page", "save", "svg", "words"]

INK, QUIET, PAPER = "#1b1b1f", "#8a8a93", "#fefefe"  # which a page that is dark replaces
BLUE, ORANGE, GREEN, PURPLE, VERMILLION, SKY = "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9"
KNOWN = {
    "h-res": (BLUE, "o", "-"),
    "full fine-tuning": (VERMILLION, "s", "--"),
    "head alone": (GREEN, "^", ":"),
    "lora": (ORANGE, "D", "-."),
    "lora, merged": (SKY, "P", "--"),
    "prompt": (PURPLE, "v", "--"),
    "frozen": (INK, "X", ":"),
}
OTHERS = (SKY, PURPLE, GREEN, ORANGE, VERMILLION, BLUE, "#7f7f7f", "#f0e442")
MARKERS = "pP<>hd*8"
_STYLE: dict[str, Any] = {
    **{"font.size": 10, "axes.titlesize": 11.5, "axes.titleweight": "bold", "axes.titlelocation": "left"},
    **{"text.color": INK, "axes.labelcolor": INK, "axes.titlecolor": INK, "axes.edgecolor": QUIET},
    **{"xtick.color": QUIET, "ytick.color": QUIET, "xtick.labelcolor": INK, "ytick.labelcolor": INK},
    **{"figure.facecolor": PAPER, "axes.facecolor": PAPER, "savefig.facecolor": PAPER, "legend.frameon": False},
    **{"axes.axisbelow": True, "axes.spines.top": False, "axes.spines.right": False},
    **{"grid.color": QUIET, "grid.alpha": 0.25, "text.parse_math": False, "svg.hashsalt": "residual_steer"},
}


@dataclass(frozen=True)
class Measured:
    """A number that was measured with several seeds, or in several rounds.

    Attributes:
        mean: NaN where any of them gave no finite number.
        spread: sample standard deviation (divided by count - 1); 0 for one, which has none.
        count: how many.
    """

    mean: float
    spread: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Measured:
        """Return mean and spread; a seed that diverged is not left out, but makes them NaN.

        Raises:
            SteerError: there is no value.
        """
        if not len(values):
            raise SteerError("a measured number needs the value of at least one seed; received none.")
        numbers = [float(value) for value in values]
        if not all(map(math.isfinite, numbers)):
            return cls(math.nan, math.nan, len(numbers))
        return cls(statistics.fmean(numbers), statistics.stdev(numbers) if len(numbers) > 1 else 0.0, len(numbers))

    def __str__(self) -> str:
        """Write the spread with two digits that count, and the mean as far as the spread goes: `82.14 ± 0.31`."""
        if math.isnan(self.mean):
            return "–"
        if not self.spread:
            return f"{self.mean:.6g}"
        decimals = max(0, 1 - math.floor(math.log10(self.spread)))
        return f"{self.mean:.{decimals}f} ± {self.spread:.{decimals}f}"


@dataclass(frozen=True)
class Axis:
    """An axis: what it shows, in which unit, and whether it is logarithmic."""

    label: str
    unit: str = ""
    log: bool = False

    def __str__(self) -> str:
        """Write the label with its unit."""
        return f"{self.label} ({self.unit})" if self.unit else self.label


@dataclass(frozen=True)
class Series:
    """What a chart shows of one method.

    Attributes:
        name: of the method.
        x: numbers; for bars, the names of groups.
        y: as many numbers, with a spread or without; None where there is none.
        labels: in a scatter plot, one for each point; if left out, a single point is labelled by the name.
    """

    name: str
    x: tuple[float | Measured | str, ...]
    y: tuple[float | Measured | None, ...]
    labels: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if len(self.x) != len(self.y) or len(self.labels) not in (0, len(self.x)):
            raise SteerError(
                f"a series has as many y as x, and a label for each point or none; {self.name!r} has {len(self.x)} x, "
                f"{len(self.y)} y and {len(self.labels)} labels."
            )

    def points(self, plot: Plot) -> Iterator[tuple[Any, float, float, float, str]]:
        """Yield (x, its spread, y, its spread, label) of every point; y is NaN where it cannot be drawn."""
        single = (self.name,) if len(self.x) == 1 else ("",) * len(self.x)
        for x, y, label in zip(self.x, self.y, self.labels or single, strict=True):
            at, across = (x.mean, x.spread) if isinstance(x, Measured) else (x, 0.0)
            value, up = (y.mean, y.spread) if isinstance(y, Measured) else (math.nan if y is None else y, 0.0)
            if isinstance(at, str) or not (math.isnan(at) or (plot.x.log and at <= 0)):
                yield at, across, math.nan if plot.y.log and value <= 0 else value, up, label


@dataclass(frozen=True)
class Plot:
    """A chart of what was measured of each method.

    Attributes:
        title: above it.
        kind: "lines" with bands where y has a spread; "scatter", labelled points with bars of error, as in the paper's
            figure 2; "bars", grouped by x.
        x: the axis along the bottom.
        y: the axis at the left.
        series: one for every method, with different names.
        notes: lines below it.
    """

    title: str
    kind: Literal["lines", "scatter", "bars"]
    x: Axis
    y: Axis
    series: tuple[Series, ...]
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        names = [series.name for series in self.series]
        if not names or len(set(names)) < len(names):
            raise SteerError(f"a plot has series of different names; received {names}.")
        if self.kind not in _DRAWN:
            raise SteerError(f"a plot is one of {', '.join(_DRAWN)}; received {self.kind!r}.")


def look(name: str, taken: Sequence[str] = ()) -> dict[str, Any]:
    """Return a method's colour, marker and dashes; one without its own takes what its place among `taken` leaves."""
    key = next((key for key in KNOWN if name.lower() == key), None)
    others = [one for one in taken if one.lower() not in KNOWN]
    index = others.index(name) if name in others else 0
    color, marker, dashes = KNOWN[key] if key else (OTHERS[index % 8], MARKERS[index % 8], "-" if index < 8 else "--")
    return {"color": color, "marker": marker, "linestyle": dashes}


@contextlib.contextmanager
def page() -> Iterator[None]:
    """Draw in our style, whatever the user has set, and leave that as it was."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        yield


def draw(plot: Plot) -> Figure:
    """Return the chart as a figure, which belongs to no pyplot and no backend."""
    with page():
        figure = Figure(figsize=(7.2, 4.4), layout="constrained")
        axes = figure.add_subplot()
        axes.set_title("\n".join(textwrap.wrap(plot.title, 72)), pad=10)
        axes.set_xlabel(str(plot.x))
        axes.set_ylabel("\n".join(textwrap.wrap(str(plot.y), 44)))
        if plot.x.log and plot.kind != "bars":
            axes.set_xscale("log")
        if plot.y.log:
            axes.set_yscale("log")
        axes.grid(visible=True, axis="y" if plot.kind == "bars" else "both")
        _DRAWN[plot.kind](axes, plot)
        if len(plot.series) > 1:
            longest = max(len(series.name) for series in plot.series)
            figure.legend(loc="outside lower center", ncols=max(1, 80 // (longest + 8)), handlelength=3)
        return figure


def svg(figure: Figure, title: str) -> str:
    """Return a figure as SVG, which has its title; the same figure gives the same bytes."""
    drawn = save(figure, "svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))).decode()
    return re.sub(r"(<svg\b[^>]*>)", lambda head: f"{head[1]}\n <title>{escape(title)}</title>", drawn, count=1)


def save(figure: Figure, kind: str, **options: Any) -> bytes:
    """Return a figure as a file of a kind."""
    file = io.BytesIO()
    with page():
        figure.savefig(file, format=kind, dpi=160, **options)
    return file.getvalue()


def words(plot: Plot) -> str:
    """Describe a chart to those who cannot see it."""
    kind = {"lines": "Lines", "scatter": "Points", "bars": "Bars"}[plot.kind]
    return f"{plot.title}. {kind}: {plot.y} against {plot.x}, for: {'; '.join(one.name for one in plot.series)}."


def _lines(axes: Any, plot: Plot) -> None:
    names = [series.name for series in plot.series]
    for series in plot.series:
        points = sorted(series.points(plot), key=lambda point: point[0])
        x, y, up = ([point[i] for point in points] for i in (0, 2, 3))
        style = look(series.name, names)
        axes.plot(x, y, label=series.name, linewidth=1.9, markersize=5.5, markevery=max(1, len(x) // 12), **style)
        if any(up):
            low = [value - width for value, width in zip(y, up, strict=True)]
            high = [value + width for value, width in zip(y, up, strict=True)]
            axes.fill_between(x, low, high, color=style["color"], alpha=0.18, linewidth=0)
    if not plot.x.log and all(float(at).is_integer() for series in plot.series for at, *_ in series.points(plot)):
        axes.xaxis.get_major_locator().set_params(integer=True)  # no layer stands at 0.5


def _scatter(axes: Any, plot: Plot) -> None:
    axes.margins(0.16, 0.2)
    names = [series.name for series in plot.series]
    for series in plot.series:
        style = look(series.name, names)
        points = [point for point in series.points(plot) if math.isfinite(point[2])]
        dashes = style.pop("linestyle")  # labels are settings of one method; a cloud has no line
        x, y = [point[0] for point in points], [point[2] for point in points]
        axes.plot(
            x, y, linestyle=dashes if series.labels else "none", linewidth=1.1, markersize=8, label=series.name, **style
        )
        for at, across, value, up, label in points:
            axes.errorbar(at, value, up or None, across or None, fmt="none", ecolor=style["color"], capsize=3)
            if len(points) <= 30:
                axes.annotate(label, (at, value), (6, 5), textcoords="offset points", fontsize=8.5)


def _bars(axes: Any, plot: Plot) -> None:
    names = [series.name for series in plot.series]
    groups = list(dict.fromkeys(str(at) for series in plot.series for at, *_ in series.points(plot)))
    width = 0.8 / len(names)
    for index, series in enumerate(plot.series):
        for first, (at, _, value, up, _) in enumerate(series.points(plot)):
            x = groups.index(str(at)) + (index - (len(names) - 1) / 2) * width
            style = {"color": look(series.name, names)["color"], "edgecolor": INK, "linewidth": 0.6}
            axes.bar(x, value, 0.92 * width, yerr=up or None, capsize=3, label=None if first else series.name, **style)
    axes.set_xticks(range(len(groups)), ["\n".join(textwrap.wrap(group, 16)) for group in groups])


_DRAWN: dict[str, Callable[[Any, Plot], None]] = {"lines": _lines, "scatter": _scatter, "bars": _bars}
