"""Fields of arrows beside each other, drawn to one scale."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .canvas import blank, headline, legend_below, number_axis, settle
from .pictures import LARGEST, Arrows
from .scales import plain
from .styles import QUIET, Style, colors_for

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["describe", "factor_of", "figure", "names", "remarks"]

_LONGEST, _SHORTEST = 0.5, 0.03  # of a panel: long arrows are within these, or all are drawn by a factor
_AIM = 0.3  # of a panel: how long they are at most, where there is a factor
_HEIGHTS = {1: 3.7, 2: 2.7, 3: 2.1, 4: 1.7}  # inches of the panels, by their number


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
    times = f"1/{plain(1 / factor)} of" if factor < 1 else f"{plain(factor)} times"
    return [f"Arrows are drawn at {times} their length."]


def factor_of(arrows: Arrows) -> float:
    """Return what all arrows are multiplied by: 1 unless they are too long, or too short to be seen."""
    xs, ys = _starts(arrows)
    wide, high = max(xs) - min(xs), max(ys) - min(ys)
    lengths = sorted(
        math.hypot(dx / wide if wide else 0.0, dy / high if high else 0.0)
        for panel in arrows.panels
        for dx, dy in zip(panel.dx, panel.dy, strict=True)
    )
    most = max(lengths[int(0.95 * (len(lengths) - 1))], lengths[-1] / 3)  # an arrow in twenty may be longer
    if most < 1 / LARGEST or _SHORTEST <= most <= _LONGEST:
        return 1.0
    times = _AIM / most if most < _AIM else most / _AIM
    steps = [step * 10.0**power for power in range(-1, math.ceil(math.log10(times)) + 1) for step in (1, 2, 3, 5)]
    if most < _AIM:
        return max(step for step in steps if step <= times)
    return 1 / min(step for step in steps if step >= times)


def figure(arrows: Arrows, styles: Mapping[str, Style]) -> Figure:
    """Draw panels of arrows."""
    count = len(arrows.panels)
    page = blank(_HEIGHTS[count] + 2)  # more than will be needed, until it is known
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
            "width": 0.018 if count < 3 else 0.013,
            "headwidth": 4.2,
            "minlength": 1.8,
        }
        axes.quiver(*where, color=shades, **scale, **shaft, zorder=3)
        title = textwrap.wrap(panel.name, round(72 / count))
        axes.set_title("\n".join(title), fontsize=10, fontweight="normal")
        axes.grid(visible=True)
        axes.locator_params(nbins=8 - count)
    x, y = _ends(arrows, factor)
    for axes in every[0]:
        number_axis(axes.xaxis, arrows.x, x, round(76 / count) - 1)
        axes.xaxis.label.set_fontsize(10 if count < 3 else 9)
    number_axis(every[0][0].yaxis, arrows.y, y, round(12 * _HEIGHTS[count]))
    every[0][0].set(xlim=x, ylim=y)  # which the panels share
    note = " ".join(remarks(arrows))
    if colors:
        _legend(page, arrows, colors, note)
    else:
        page.supxlabel(note, fontsize=10)
    settle(page, every[0][0], _HEIGHTS[count])
    return page


def _starts(arrows: Arrows) -> tuple[list[float], list[float]]:
    return [x for panel in arrows.panels for x in panel.x], [y for panel in arrows.panels for y in panel.y]


def _ends(arrows: Arrows, factor: float) -> tuple[tuple[float, float], tuple[float, float]]:
    """Return the limits within which every arrow is from its start to its tip, with some air."""
    xs, ys = _starts(arrows)
    xs += [x + factor * dx for panel in arrows.panels for x, dx in zip(panel.x, panel.dx, strict=True)]
    ys += [y + factor * dy for panel in arrows.panels for y, dy in zip(panel.y, panel.dy, strict=True)]
    return _aired(xs), _aired(ys)


def _aired(values: list[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    air = 0.06 * (high - low) or abs(low) / 20 or 1.0
    return low - air, high + air


def _legend(page: Figure, arrows: Arrows, colors: Mapping[str, str], note: str) -> None:
    from matplotlib.patches import Patch

    handles, labels = [Patch(color=color) for color in colors.values()], [*colors]
    others = {group for panel in arrows.panels for group in panel.groups} - colors.keys()
    if others:
        handles.append(Patch(color=QUIET))
        labels.append(f"{len(others)} others")
    legend_below(page, labels, handles, note)
