"""Plots of methods against each other: lines, points and bars."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from residual_steer.errors import SteerError

from .axis import Axis, Drawn
from .schema import check_fields, short
from .table import Measured

__all__ = ["Plot", "Series"]


@dataclass(frozen=True)
class Series:
    """What a plot shows of one method.

    Attributes:
        name: of the method; the same name has the same colour and marker in every plot.
        x: numbers; for bars, the names of groups.
        y: as many numbers, with a spread or without; None where there is none.
        labels: in a scatter plot, one for each point; if left out, a series of a single point is labelled by its name.
    """

    name: str
    x: tuple[float | Measured | str, ...]
    y: tuple[float | Measured | None, ...]
    labels: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_fields(self)
        if len(self.x) != len(self.y) or (self.labels and len(self.labels) != len(self.x)):
            raise SteerError(
                f"a series has as many y as x, and a label for each point or none at all; {self.name!r} has "
                f"{len(self.x)} x, {len(self.y)} y and {len(self.labels)} labels."
            )


@dataclass(frozen=True)
class Plot(Drawn):
    """A picture of what was measured of each method.

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
        check_fields(self)
        names = [series.name for series in self.series]
        if not names or len(set(names)) < len(names):
            raise SteerError(f"a plot has series of different names; received {names}.")
        for series in self.series:
            texts = sum(isinstance(x, str) for x in series.x)
            if texts != (len(series.x) if self.kind == "bars" else 0):
                wanted = "the name of a group" if self.kind == "bars" else "a number"
                raise SteerError(f"an x of {self.kind} is {wanted}; {series.name!r} has {short(series.x)}.")
            if self.kind == "bars" and len(set(series.x)) < len(series.x):
                raise SteerError(f"a series has one bar in a group; {series.name!r} has {short(series.x)}.")
