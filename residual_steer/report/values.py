"""What pictures show as tables of numbers, for those who cannot see them."""

from __future__ import annotations

from collections.abc import Sequence

from .pictures import Arrows, Matrix, Picture, Surface
from .series import Plot
from .table import Cell, Column, Measured, Table

__all__ = ["numbers_of"]

_LONGEST, _WIDEST = 60, 24  # rows and columns
_DIGITS = 4


def numbers_of(picture: Picture) -> Table | None:
    """Return what a picture shows as a table; None where that is too long or too wide."""
    if isinstance(picture, Plot):
        table = _of_plot(picture)
    elif isinstance(picture, Arrows):
        table = _of_arrows(picture)
    elif isinstance(picture, Matrix):
        table = _of_grid(picture, picture.columns, [*zip(picture.rows, picture.values, strict=True)])
    else:
        rows = [*zip(picture.up, picture.values, strict=True)][::-1]  # as it is seen
        table = _of_grid(picture, [f"{x:g}" for x in picture.across], [(f"{y:g}", row) for y, row in rows])
    return table if len(table.rows) <= _LONGEST and len(table.columns) <= _WIDEST else None


def _of_plot(plot: Plot) -> Table:
    x, y = Column("x", str(plot.x)), Column("y", str(plot.y))
    if plot.kind == "scatter":
        rows = [
            {"name": series.name, "label": label, "x": at, "y": value}
            for series in plot.series
            for at, value, label in zip(series.x, series.y, series.labels or [""] * len(series.x), strict=True)
        ]
        label = [Column("label", "point")] if any(series.labels for series in plot.series) else []
        columns = (Column("name", "method"), *label, x, y)
        kept = {column.key for column in columns}
        rows = [{key: cell for key, cell in row.items() if key in kept} for row in rows]
    else:
        places = dict.fromkeys(_plain(at) for series in plot.series for at in series.x)
        by_name = [dict(zip(map(_plain, series.x), series.y, strict=True)) for series in plot.series]
        columns = (x, *(Column(f"y{index}", series.name) for index, series in enumerate(plot.series)))
        order = sorted(places) if plot.kind == "lines" else list(places)
        rows = [{"x": at, **{f"y{i}": found.get(at) for i, found in enumerate(by_name)}} for at in order]
    about = plot.title if plot.kind == "scatter" else f"{plot.title}: {plot.y}"
    return Table(about, columns, tuple(rows))


def _of_grid(
    picture: Matrix | Surface, columns: Sequence[str], rows: Sequence[tuple[str, Sequence[float | None]]]
) -> Table:
    first = Column("y", f"{picture.y} \\ {picture.x}")
    heads = [Column(f"x{index}", name, digits=_DIGITS) for index, name in enumerate(columns)]
    cells: list[dict[str, Cell]] = [
        {"y": name, **{head.key: value for head, value in zip(heads, values, strict=True)}} for name, values in rows
    ]
    return Table(f"{picture.title}: {picture.z}", (first, *heads), tuple(cells))


def _of_arrows(arrows: Arrows) -> Table:
    grouped = [Column("group", "group")] if arrows.panels[0].groups else []
    places = [Column("x", str(arrows.x), digits=_DIGITS), Column("y", str(arrows.y), digits=_DIGITS)]
    moves = [Column("dx", "along x", digits=_DIGITS), Column("dy", "along y", digits=_DIGITS)]
    rows: list[dict[str, Cell]] = []
    for panel in arrows.panels:
        for index, (x, y, dx, dy) in enumerate(zip(panel.x, panel.y, panel.dx, panel.dy, strict=True)):
            group: dict[str, Cell] = {"group": panel.groups[index]} if panel.groups else {}
            rows.append({"name": panel.name, **group, "x": x, "y": y, "dx": dx, "dy": dy})
    return Table(arrows.title, (Column("name", "panel"), *grouped, *places, *moves), tuple(rows))


def _plain(at: float | Measured | str) -> float | str:
    if isinstance(at, Measured):
        at = at.mean
    return int(at) if isinstance(at, float) and at.is_integer() else at
