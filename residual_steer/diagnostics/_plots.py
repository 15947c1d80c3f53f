"""What the diagnostics draw, with plain matplotlib: each function returns the Figure that it drew in."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from residual_steer.errors import SteerError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
else:  # it is imported when something is drawn
    Axes = Figure = Any

__all__ = ["Axes", "Figure", "bars", "lines", "panels"]

Numbers = Sequence[float | None]


def panels(ax: Axes | None, count: int = 1) -> tuple[Figure, list[Axes]]:
    """Return axes side by side in a new figure, to which no window belongs; or the ones that are given, with theirs."""
    try:
        from matplotlib import axes, figure
    except ImportError as error:
        raise SteerError("plots need matplotlib: pip install residual-steer[plots].") from error
    if ax is None:
        made = figure.Figure(figsize=(6.4 if count == 1 else 4.0 * count, 4.2), layout="constrained")
        return made, list(made.subplots(1, count, squeeze=False, sharex=True, sharey=True)[0])
    if not isinstance(ax, axes.Axes):
        raise SteerError(f"`ax` is a matplotlib Axes or None; received {type(ax).__name__}.")
    if count > 1:
        raise SteerError(f"`ax` has room for one panel, and there are {count} to draw. Name one, or leave `ax` out.")
    found: Any = ax.get_figure()
    return found, [ax]


def lines(
    ax: Axes | None,
    title: str,
    x: str,
    y: str,
    series: Mapping[str, Numbers],
    *,
    at: Sequence[float] | None = None,
    spread: Mapping[str, Sequence[float]] | None = None,
    log: bool = False,
) -> Figure:
    """Draw lines by name over layers or steps, `at`; None leaves a gap, as does what has no logarithm."""
    figure, (axes,) = panels(ax)
    for name, values in series.items():
        place = range(len(values)) if at is None else at
        numbers = [math.nan if one is None or (log and one <= 0) else float(one) for one in values]
        if spread is None:
            axes.plot(place, numbers, marker="o", markersize=4, label=name)
        else:
            axes.errorbar(place, numbers, yerr=list(spread[name]), marker="o", markersize=4, capsize=3, label=name)
    axes.set(title=title, xlabel=x, ylabel=y, yscale="log" if log else "linear")
    axes.locator_params(axis="x", integer=True)
    if len(series) > 1:
        axes.legend()
    return figure


def bars(ax: Axes | None, title: str, y: str, values: Mapping[str, float | None]) -> Figure:
    """Draw one bar for each name; None leaves a gap."""
    figure, (axes,) = panels(ax)
    axes.bar(list(values), [math.nan if one is None else one for one in values.values()])
    axes.set(title=title, ylabel=y)
    axes.tick_params(axis="x", rotation=30)
    return figure
