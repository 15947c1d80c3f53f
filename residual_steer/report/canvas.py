"""What every drawing begins with: a page, its settings, its title, its legend and its colour bar."""

from __future__ import annotations

import contextlib
import io
import math
import textwrap
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from residual_steer.errors import SteerError

from .axis import Axis
from .scales import Scale, power_of, ticks_of
from .styles import INK, PAPER, QUIET

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure
    from matplotlib.transforms import Bbox

__all__ = [
    "DPI",
    "HEIGHT",
    "WIDTH",
    "blank",
    "color_bar",
    "headline",
    "legend_below",
    "number_axis",
    "picture_bytes",
    "settings",
    "settle",
    "shades",
]

WIDTH, HEIGHT, DPI = 7.2, 4.4, 160  # inches; dots per inch of PNG
PAD = 0.08  # inches around what is drawn
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


@contextlib.contextmanager
def settings() -> Iterator[None]:
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
        chosen: Any = matplotlib.rcParams  # typed by their 300 names
        chosen.update(_SETTINGS)
        yield


def blank(height: float = HEIGHT) -> Figure:
    """Return an empty page, which belongs to no pyplot and no backend."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=(WIDTH, height), layout=ConstrainedLayoutEngine(w_pad=PAD, h_pad=PAD))
    FigureCanvasAgg(figure)
    return figure


def picture_bytes(figure: Figure, kind: str, **options: Any) -> bytes:
    """Return a page as a file of a kind."""
    file = io.BytesIO()
    figure.savefig(file, format=kind, **options)
    return file.getvalue()


def headline(figure: Figure, title: str) -> None:
    """Write the title over the whole page, from the left."""
    text = "\n".join(textwrap.wrap(title, 72))
    figure.suptitle(text, x=PAD / WIDTH, ha="left", fontsize=11.5, fontweight="bold", color=INK)


def legend_below(figure: Figure, names: Sequence[str], handles: Sequence[Any] | None = None, title: str = "") -> None:
    """Name what is drawn below it, where nothing is covered, on a page that is so much taller.

    Args:
        figure: the page.
        names: in the order of the legend.
        handles: what they name; the labelled lines of the page if left out.
        title: a line above them.
    """
    longest = max(map(len, names))
    columns = max(1, min(len(names), 80 // (longest + 8)))
    shown: dict[str, Any] = {} if handles is None else {"handles": handles, "labels": names}
    shown |= {"title": title} if title else {}
    figure.legend(loc="outside lower center", ncols=columns, handlelength=3, **shown)
    figure.set_figheight(figure.get_figheight() + 0.21 * (math.ceil(len(names) / columns) + bool(title)))


def settle(figure: Figure, axes: Axes, high: float) -> None:
    """Make the page as tall as it has to be for axes of a height in inches, whatever stands around them."""
    figure.draw_without_rendering()
    figure.set_figheight(figure.get_figheight() + high - axes.get_window_extent().height / figure.dpi)


def shades(name: str, *, count: int = 64, pale: float = 0.0) -> Any:
    """Return a colour map of a few steps, which an SVG can hold as shapes; mixed with so much white."""
    import matplotlib
    from matplotlib.colors import ListedColormap

    colors = matplotlib.colormaps[name].resampled(count)(range(count))
    colors[:, :3] = pale + (1 - pale) * colors[:, :3]
    return ListedColormap(colors, name)


def number_axis(drawn: Any, axis: Axis, ends: tuple[float, float], room: int) -> None:
    """Label an axis of matplotlib, and number it in the power of ten that the label has.

    Args:
        drawn: the axis of matplotlib.
        axis: what it shows.
        ends: of its numbers.
        room: how many letters of the label fit in a line.
    """
    from matplotlib.ticker import FuncFormatter

    power = 0 if axis.log else power_of(max(map(abs, ends)))
    if power:
        drawn.set_major_formatter(FuncFormatter(lambda tick, _: f"{tick / 10.0**power:g}".replace("-", "−")))
    drawn.set_label_text("\n".join(textwrap.wrap(Scale(power, 0).label(axis), room)))


def color_bar(axes: Axes, drawn: ScalarMappable, z: Axis, numbers: Sequence[float], room: int) -> None:
    """Draw the colour bar at the right of axes, as high as they are.

    Args:
        axes: that it belongs to.
        drawn: what the colours come from.
        z: what they mean.
        numbers: what is coloured.
        room: how many letters of the label fit beside it.
    """
    page: Any = axes.figure
    beside = axes.inset_axes((1, 0, 0.1, 1))
    beside.set_axes_locator(lambda *_: _beside(axes))
    bar = page.colorbar(drawn, cax=beside)
    scale = Scale.of(numbers, z.log)
    ticks, texts = ticks_of(min(numbers), max(numbers), scale, z.log)
    bar.set_ticks(ticks, labels=texts)
    bar.minorticks_off()
    bar.set_label("\n".join(textwrap.wrap(scale.label(z), room)))
    bar.outline.set_visible(False)
    bar.solids.set_rasterized(False)  # shapes, which any page can hold
    bar.solids.set_edgecolor("face")


def _beside(axes: Axes) -> Bbox:
    """Return where a colour bar is, in shares of the page."""
    from matplotlib.transforms import Bbox

    place = axes.get_position()
    return Bbox([[place.x1 + 0.12 / WIDTH, place.y0], [place.x1 + 0.28 / WIDTH, place.y1]])
