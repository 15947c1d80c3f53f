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
from .scales import ticks_of
from .styles import INK, PAPER, QUIET

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.colorbar import Colorbar
    from matplotlib.figure import Figure

__all__ = [
    "DPI",
    "HEIGHT",
    "WIDTH",
    "blank",
    "color_bar",
    "headline",
    "legend_below",
    "picture_bytes",
    "settings",
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


def legend_below(figure: Figure, names: Sequence[str], handles: Sequence[Any] | None = None) -> None:
    """Name what is drawn below it, where nothing is covered, on a page that is so much taller.

    Args:
        figure: the page.
        names: in the order of the legend.
        handles: what they name; the labelled lines of the page if left out.
    """
    longest = max(map(len, names))
    columns = max(1, min(len(names), 80 // (longest + 8)))
    shown: dict[str, Any] = {} if handles is None else {"handles": handles, "labels": names}
    figure.legend(loc="outside lower center", ncols=columns, handlelength=3, **shown)
    figure.set_figheight(figure.get_figheight() + 0.21 * math.ceil(len(names) / columns))


def shades(name: str, *, count: int = 64, pale: float = 0.0) -> Any:
    """Return a colour map of a few steps, which an SVG can hold as shapes; mixed with so much white."""
    import matplotlib
    from matplotlib.colors import ListedColormap

    colors = matplotlib.colormaps[name].resampled(count)(range(count))
    colors[:, :3] = pale + (1 - pale) * colors[:, :3]
    return ListedColormap(colors, name)


def color_bar(axes: Axes, drawn: ScalarMappable, z: Axis, limits: tuple[float, float], room: int) -> Colorbar:
    """Draw the colour bar at the right of axes.

    Args:
        axes: that it belongs to.
        drawn: what the colours come from.
        z: what they mean.
        limits: the lowest and the highest value.
        room: how many letters of the label fit beside it.
    """
    figure: Any = axes.get_figure(root=True)
    bar: Colorbar = figure.colorbar(drawn, ax=axes, fraction=0.05, pad=0.02, aspect=24)
    ticks, texts, scale = ticks_of(*limits, z.log)
    bar.set_ticks(ticks, labels=texts)
    bar.minorticks_off()
    bar.set_label("\n".join(textwrap.wrap(scale.label(z), room)))
    bar.outline.set_visible(False)
    solids: Any = bar.solids
    solids.set_rasterized(False)  # shapes, which any page can hold
    solids.set_edgecolor("face")
    return bar
