"""Fields of arrows beside each other, drawn to one scale."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .canvas import blank, headline, legend_below
from .pictures import Arrows
from .scales import plain
from .styles import QUIET, Style, colors_for

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["describe", "factor_of", "figure", "names", "remarks"]

_LONGEST, _SHORTEST = 0.35, 0.02  # of the panel: the longest arrow is within, or all are drawn by a factor
_AIM = 0.2  # of the panel: about the longest arrow, where there is a factor
_HEIGHTS = {1: 4.6, 2: 3.7, 3: 3.0, 4: 2.6}  # inches, by the number of panels


def names(arrows: Arrows) -> list[str]:
    """Return the panels, which are methods, unless colours are for something else."""
    return [] if arrows.panels[0].groups else [panel.name for panel in arrows.panels]


def describe(arrows: Arrows) -> str:
    """Say what the panels show, and by which factor."""
    panels = "; ".join(f"{panel.name} ({len(panel.x):,})" for panel in arrows.panels)
    return " ".join([f"Arrows: {arrows.y} against {arrows.x}, for: {panels}.", *remarks(arrows)])


def remarks(arrows: Arrows) -> list[str]:
    """Return a note on the length of arrows, if it is not to scale."""
    factor = factor_of(arrows)
    if factor == 1:
        return []
    times = f"1/{plain(round(1 / factor))}" if factor < 1 else f"{plain(factor)} times"
    return [f"Arrows are drawn at {times} their length."]


def factor_of(arrows: Arrows) -> float:
    """Return what all arrows are multiplied by: 1 unless they are too long, or too short to be seen."""
    xs, ys = _starts(arrows)
    wide, high = max(xs) - min(xs), max(ys) - min(ys)
    moves = [(dx, dy) for panel in arrows.panels for dx, dy in zip(panel.dx, panel.dy, strict=True)]
    longest = max(
        math.hypot(dx / wide if wide else 0.0, dy / high if high else 0.0) for dx, dy in moves
    )  # fmt: skip
    if not longest or _SHORTEST <= longest <= _LONGEST:
        return 1.0
    goal = _AIM / longest
    power = 10.0 ** math.floor(math.log10(goal))
    return max(step * power for step in (1, 2, 5) if step * power <= goal * (1 + 1e-9))


def figure(arrows: Arrows, styles: Mapping[str, Style]) -> Figure:
    """Draw panels of arrows."""
    count = len(arrows.panels)
    page = blank(_HEIGHTS[count])
    headline(page, arrows.title)
    every: Any = page.subplots(1, count, sharex=True, sharey=True, squeeze=False)
    factor = factor_of(arrows)
    colors = colors_for(group for panel in arrows.panels for group in panel.groups)
    for axes, panel in zip(every[0], arrows.panels, strict=True):
        shades = [colors.get(group, QUIET) for group in panel.groups] or styles[panel.name].color
        where: Any = (panel.x, panel.y, panel.dx, panel.dy)
        scale: dict[str, Any] = {"angles": "xy", "scale_units": "xy", "scale": 1 / factor}
        shaft: dict[str, Any] = {
            "units": "inches",
            "width": 0.018,
            "headwidth": 4.2,
            "headlength": 5,
            "headaxislength": 4.5,
        }
        axes.quiver(*where, color=shades, **scale, **shaft, zorder=3)
        title = textwrap.wrap(panel.name, round(72 / count))
        axes.set_title("\n".join(title), fontsize=10, fontweight="normal")
        axes.grid(visible=True)
        axes.locator_params(nbins=8 - count)
    _limits(every[0][0], arrows, factor)
    label = "\n".join(textwrap.wrap(str(arrows.x), 80))
    notes = remarks(arrows)
    page.supxlabel("\n".join([label, *notes]), fontsize=10)
    page.supylabel("\n".join(textwrap.wrap(str(arrows.y), round(11 * _HEIGHTS[count]))), fontsize=10)
    if colors:
        _legend(page, arrows, colors)
    return page


def _starts(arrows: Arrows) -> tuple[list[float], list[float]]:
    return [x for panel in arrows.panels for x in panel.x], [y for panel in arrows.panels for y in panel.y]


def _limits(axes: Any, arrows: Arrows, factor: float) -> None:
    """Show every arrow from its start to its tip, with some air; the panels share their limits."""
    xs, ys = _starts(arrows)
    xs = xs + [x + factor * dx for panel in arrows.panels for x, dx in zip(panel.x, panel.dx, strict=True)]
    ys = ys + [y + factor * dy for panel in arrows.panels for y, dy in zip(panel.y, panel.dy, strict=True)]
    for values, setter in ((xs, axes.set_xlim), (ys, axes.set_ylim)):
        low, high = min(values), max(values)
        air = 0.06 * (high - low) or abs(low) / 20 or 1.0
        setter(low - air, high + air)


def _legend(page: Figure, arrows: Arrows, colors: Mapping[str, str]) -> None:
    from matplotlib.patches import Patch

    handles, labels = [Patch(color=color) for color in colors.values()], [*colors]
    others = {group for panel in arrows.panels for group in panel.groups} - colors.keys()
    if others:
        handles.append(Patch(color=QUIET))
        labels.append(f"{len(others)} others")
    legend_below(page, labels, handles)
