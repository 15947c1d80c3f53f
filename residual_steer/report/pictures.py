"""Pictures of what a model does: heat maps, surfaces with paths over them, and fields of arrows.

Like every class of a result they check themselves. In a file they are told apart by their fields.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from residual_steer.errors import SteerError

from .axis import Axis, Drawn
from .schema import check_fields, short
from .series import Plot

__all__ = ["Arrows", "Flow", "Matrix", "Picture", "Surface", "Trajectory"]

PANELS = 4  # of arrows, beside each other on a page
LARGEST = 1e100  # number; one that is small for a logarithm is 1 / LARGEST


@dataclass(frozen=True)
class Matrix(Drawn):
    """A heat map, with the number in every cell that has room for it.

    Attributes:
        title: above it.
        x: what the columns are.
        y: what the rows are.
        z: what the values are.
        columns: names, from left to right.
        rows: names, from top to bottom.
        values: one row for each of `rows`, with a value for each of `columns`; None where there is none.
        notes: lines below it.
    """

    title: str
    x: Axis
    y: Axis
    z: Axis
    columns: tuple[str, ...]
    rows: tuple[str, ...]
    values: tuple[tuple[float | None, ...], ...]
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_fields(self)
        _shape(f"the matrix {self.title!r}", self.values, len(self.rows), len(self.columns), least=1)
        for index, row in enumerate(self.values):
            _finite(f"row {index} of the matrix {self.title!r}", [0.0 if value is None else value for value in row])
        low = min((value for row in self.values for value in row if value is not None), default=1.0)
        _positive(self.z, low, self.title)


@dataclass(frozen=True)
class Trajectory:
    """A path over a surface.

    Attributes:
        name: of the method that takes it.
        x: of its points, from the start to the end.
        y: as many.
    """

    name: str
    x: tuple[float, ...]
    y: tuple[float, ...]

    def __post_init__(self) -> None:
        check_fields(self)
        _same(f"the path {self.name!r}", x=self.x, y=self.y)


@dataclass(frozen=True)
class Surface(Drawn):
    """Contours of a value over a plane, with paths over them: the left of the paper's figure 1.

    Attributes:
        title: above it.
        x: the axis along the bottom.
        y: the axis at the left.
        z: what the values are.
        across: where they were taken along x, increasing.
        up: where they were taken along y, increasing.
        values: one row for each of `up`, with a value for each of `across`.
        paths: with different names; they may leave the plane.
        notes: lines below it.
    """

    title: str
    x: Axis
    y: Axis
    z: Axis
    across: tuple[float, ...]
    up: tuple[float, ...]
    values: tuple[tuple[float, ...], ...]
    paths: tuple[Trajectory, ...] = ()
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_fields(self)
        name = f"the surface {self.title!r}"
        _shape(name, self.values, len(self.up), len(self.across), least=2)
        for axis, places in (("across", self.across), ("up", self.up)):
            _finite(f"{axis} of {name}", places)
            if any(a >= b for a, b in pairwise(places)):
                raise SteerError(f"{axis} of {name} increases from each place to the next; received {short(places)}.")
        for index, row in enumerate(self.values):
            _finite(f"row {index} of {name}", row)
        _different("paths", [path.name for path in self.paths])
        _positive(self.x, min(self.across[0], *(x for path in self.paths for x in path.x), math.inf), self.title)
        _positive(self.y, min(self.up[0], *(y for path in self.paths for y in path.y), math.inf), self.title)
        _positive(self.z, min(map(min, self.values)), self.title)


@dataclass(frozen=True)
class Flow:
    """Arrows of one panel.

    Attributes:
        name: of the panel.
        x: where arrows start.
        y: as many.
        dx: how far they go along x.
        dy: how far they go along y.
        groups: one for each arrow, which colours it; none at all colours them by the panel.
    """

    name: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    dx: tuple[float, ...]
    dy: tuple[float, ...]
    groups: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_fields(self)
        _same(f"the flow {self.name!r}", x=self.x, y=self.y, dx=self.dx, dy=self.dy)
        if self.groups and len(self.groups) != len(self.x):
            raise SteerError(
                f"a flow has a group for each of its arrows or none at all; {self.name!r} has {len(self.x)} arrows "
                f"and {len(self.groups)} groups."
            )


@dataclass(frozen=True)
class Arrows(Drawn):
    """Fields of arrows beside each other, with the same limits and the same scale.

    Attributes:
        title: above them.
        x: the axis along the bottom of each panel.
        y: the axis at the left.
        panels: 1 to 4 with different names, all with groups or all without.
        notes: lines below them.
    """

    title: str
    x: Axis
    y: Axis
    panels: tuple[Flow, ...]
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_fields(self)
        if not 1 <= len(self.panels) <= PANELS:
            raise SteerError(f"arrows have 1 to {PANELS} panels; {self.title!r} has {len(self.panels)}.")
        _different("panels", [panel.name for panel in self.panels])
        if len({bool(panel.groups) for panel in self.panels}) > 1:
            raise SteerError(f"all panels of arrows have groups or none has; {self.title!r} has both kinds.")
        if self.x.log or self.y.log:
            raise SteerError(f"arrows have linear axes, where their lengths mean something; {self.title!r} has others.")


Picture = Plot | Matrix | Surface | Arrows


def _shape(name: str, values: Sequence[Sequence[float | None]], rows: int, columns: int, *, least: int) -> None:
    """Hold values against the names or places of their rows and columns.

    Raises:
        SteerError: there are too few rows or columns, or other numbers of values.
    """
    if min(rows, columns) < least:
        raise SteerError(f"{name} needs at least {least} rows and {least} columns; received {rows} and {columns}.")
    if len(values) != rows or any(len(row) != columns for row in values):
        lengths = sorted({len(row) for row in values})
        raise SteerError(
            f"{name} has {rows} rows of {columns} values; received {len(values)} rows of "
            f"{' or '.join(map(str, lengths)) or 'no'} values."
        )


def _same(name: str, **coordinates: tuple[float, ...]) -> None:
    """Hold the coordinates of points against each other.

    Raises:
        SteerError: there are none, or not as many of each, or one is no finite number.
    """
    counts = {key: len(values) for key, values in coordinates.items()}
    if len(set(counts.values())) > 1 or not min(counts.values()):
        told = ", ".join(f"{count} {key}" for key, count in counts.items())
        raise SteerError(f"{name} has at least one point, with as many {' as '.join(counts)}; received {told}.")
    for key, values in coordinates.items():
        _finite(f"{key} of {name}", values)


def _finite(name: str, values: Sequence[float]) -> None:
    """Hold numbers against being finite, and not so large that their differences are not.

    Raises:
        SteerError: one is NaN, as infinity and None have become, or too large.
    """
    wrong = [index for index, value in enumerate(values) if not abs(value) <= LARGEST]
    if wrong:
        raise SteerError(
            f"{name} has finite numbers up to ±{LARGEST:g}; number {wrong[0]} is none. Leave it out, or give a bound."
        )


def _different(what: str, names: list[str]) -> None:
    """Hold names against each other.

    Raises:
        SteerError: two are the same.
    """
    if len(set(names)) < len(names):
        raise SteerError(f"{what} have different names; received {', '.join(map(repr, names))}.")


def _positive(axis: Axis, lowest: float, title: str) -> None:
    """Hold the lowest number along an axis against its logarithm.

    Raises:
        SteerError: the axis is logarithmic, and the number is not positive, or too small.
    """
    if axis.log and lowest < 1 / LARGEST:
        raise SteerError(
            f"a logarithmic axis has positive numbers from {1 / LARGEST:g}; {axis.label!r} of {title!r} has {lowest:g}."
        )
