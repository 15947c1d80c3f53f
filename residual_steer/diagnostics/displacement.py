"""The displacement field of a method: where it moves each state of the frozen stream (figure 1b of arXiv 2606.24396).

The paper calls LoRA's field "chaotic" and H-Res's "smooth, convergent" (claim 10) and shows a drawing. Here the field
is that of real states, and the two words are numbers: the coherence of neighbouring displacements, and how far states
come together.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from residual_steer._batches import Batch
from residual_steer.errors import SteerError

from ._field_measures import NEIGHBOURS, Draw, FieldMeasures, measures_of
from ._moments import Moments, Sums
from ._plots import Axes, Figure, panels
from ._table import Table
from .compare import Pair, beside, compare, layer_of
from .plane import Plane, plane_of, spectrum

__all__ = ["Displacement", "MethodField", "Token", "displacement"]

Token = Literal["each", "first", "last", "mean"]

_STATES = {
    "each": "one for every token",
    "first": "the first token of every row",
    "last": "the last token of every row",
    "mean": "the mean of the tokens of every row",
}
_MEASURES = ("coherence", "chance", "contraction", "divergence")
_PANELS = 4


@dataclass(frozen=True)
class MethodField:
    """The displacement field of one method.

    Attributes:
        name: of the method.
        dx: of every point, along the first principal direction.
        dy: along the second.
        size: the mean of ‖displacement‖ / ‖frozen state‖ over all states.
        seen: the share of the squared displacement that lies in the plane; None where nothing moves.
        stream: its measures in all dimensions of the stream.
        plane: those of its image in the plane.
    """

    name: str
    dx: tuple[float, ...]
    dy: tuple[float, ...]
    size: float
    seen: float | None
    stream: FieldMeasures
    plane: FieldMeasures


@dataclass(frozen=True, eq=False)
class Displacement:
    """The fields of several methods over the same frozen states.

    Attributes:
        plane: of the frozen stream.
        x: of the points, along the first principal direction.
        y: along the second.
        groups: the class of each point; empty where rows have none.
        fields: one for each method.
        states: of how many states the points were drawn.
        token: which states of a row they are: of each token, of the first, of the last, or their mean.
    """

    plane: Plane
    x: tuple[float, ...]
    y: tuple[float, ...]
    groups: tuple[str, ...]
    fields: tuple[MethodField, ...]
    states: int
    token: Token

    def table(self) -> Table:
        """Return one row for each method."""
        columns = {"method": "method", "size": "relative size", "seen": "in the plane, %"}
        columns |= {f"{where}_{name}": f"{name}, {where}" for where in ("stream", "plane") for name in _MEASURES}
        rows = []
        for one in self.fields:
            row: dict[str, Any] = {"method": one.name, "size": one.size}
            row["seen"] = None if one.seen is None else 100 * one.seen
            for where, measures in (("stream", one.stream), ("plane", one.plane)):
                row |= {f"{where}_{name}": getattr(measures, name) for name in _MEASURES}
            rows.append(row)
        drawn = f"{len(self.x)} of {self.states:,} states behind block {self.plane.layer}, {_STATES[self.token]}"
        within = "within classes" if self.groups else "of all pairs"
        notes = (
            f"{drawn}; the plane holds {100 * sum(self.plane.explained):.1f} % of the frozen variance.",
            f"Coherence: mean cosine with the {NEIGHBOURS} nearest neighbours; chance: with any point. Contraction "
            f"{within}: below 1 states come together. Divergence: of the best linear fit, per direction.",
        )
        return Table("Displacement fields", columns, tuple(rows), notes)

    def plot(self, *methods: str, ax: Axes | None = None) -> Figure:
        """Draw the fields in the plane beside each other, an arrow from each frozen state to the adapted one.

        Args:
            *methods: which ones, four at most; none names all.
            ax: where to draw a single one; None makes a figure.

        Raises:
            SteerError: there is no such method, there are too many, or more than `ax` has room for.
        """
        known = {one.name: one for one in self.fields}
        wrong = [name for name in methods if name not in known]
        chosen = [known[name] for name in methods if name in known] if methods else list(self.fields)
        if wrong or len(chosen) > _PANELS:
            raise SteerError(f"a plot is of one to four of {', '.join(known)}; received {', '.join(methods) or 'all'}.")
        figure, found = panels(ax, len(chosen))
        of = [self.groups.index(group) for group in self.groups]  # the same colour for a class in every panel
        for axes, one in zip(found, chosen, strict=True):
            colour = [of] if of else []
            arrows = (self.x, self.y, one.dx, one.dy, *colour)
            axes.quiver(*arrows, angles="xy", scale_units="xy", scale=1, cmap="tab10")
            axes.update_datalim([(x + dx, y + dy) for x, y, dx, dy in zip(self.x, self.y, one.dx, one.dy, strict=True)])
            axes.autoscale_view()
            axes.set_title(f"{one.name}: coherence {_text(one.stream.coherence)}, chance {_text(one.stream.chance)}")
            self.plane.label(axes)
        return figure


def displacement(
    models: Mapping[str, nn.Module],
    loader: Iterable[Any],
    *,
    reference: nn.Module | None = None,
    layer: int = -1,
    points: int = 200,
    token: Token = "each",
    seed: int = 0,
) -> Displacement:
    """Measure how each of several methods moves the stream at a layer, from the frozen states to the adapted ones.

    The plane, sizes and the linear fit are of all states, added up over batches; coherence, contraction and the picture
    are of points drawn from them without replacement, the same for every method and however the batches are cut.
    Padding and tokens that a method puts into the stream are left out (see `drift`).

    Args:
        models: adapted models by name, on one device, of one backbone.
        loader: batches; class labels `(rows,)` say between which states contraction is measured. It is read once.
        reference: the frozen model; None is the first of the models, which is then steered, with its fields off.
        layer: the block whose outgoing stream is looked at; negative ones count from the end.
        points: how many are drawn.
        token: which states of a row count: of each token, of the first (CLS), of the last, or their mean.
        seed: of the draw.

    Raises:
        SteerError: no model, models that cannot be compared, no such block, an unknown `token`, fewer than 10 points, a
            loader that gives nothing, states that are NaN or vary in fewer than two directions.
    """
    if not isinstance(models, Mapping) or not models:
        raise SteerError(f"`models` is a dict of one adapted model or more, by name; received {type(models).__name__}.")
    if token not in get_args(Token):
        raise SteerError(f"`token` is each, first, last or mean; received {token!r}.")
    if not isinstance(points, int) or isinstance(points, bool) or points <= NEIGHBOURS + 1:
        raise SteerError(f"`points` is an integer from {NEIGHBOURS + 2}; received {points!r}.")
    moments, tallies, draw = Moments(), {name: _Tally() for name in models}, Draw(points, seed)
    with contextlib.ExitStack() as stack:
        pairs: dict[str, Pair] = {}
        for name, model in models.items():
            against = next(iter(pairs.values())).models["frozen"] if pairs else reference
            pairs[name] = stack.enter_context(compare(model, against))
        first = next(iter(pairs.values()))
        index = layer_of(first.backbones["frozen"], layer)
        for batch in first.batches(loader):
            z = first.stream("frozen", batch, [index])[index]
            real = batch.real(z.shape[:2], z.device)
            start, rows = _pick(z, real, token)
            shifts = []
            for name, pair in pairs.items():
                adapted = beside(pair.stream("adapted", batch, [index])[index], z, first.prefix)
                shifts.append(_pick(adapted, real, token)[0] - start)
                tallies[name].add(start, shifts[-1])
            moments.add(start)
            draw.add(torch.stack([start, *shifts], 1), _labels(batch, rows))
    draw.sort()
    over = plane_of(moments, index)
    start, *shifts = draw.states.unbind(1)
    flat = over.project(start)
    fields = []
    for (name, tally), shift in zip(tallies.items(), shifts, strict=True):
        image = shift @ over.directions.T
        stream = measures_of(start, shift, draw.labels, tally.divergence(moments, None))
        inside = measures_of(flat, image, draw.labels, tally.divergence(moments, 2))
        dx, dy = (tuple(part) for part in image.T.tolist())
        fields.append(MethodField(name, dx, dy, *tally.sizes(over), stream, inside))
    groups = () if draw.labels is None else tuple(str(label) for label in draw.labels.tolist())
    x, y = (tuple(part) for part in flat.T.tolist())
    return Displacement(over, x, y, groups, tuple(fields), moments.count, token)


class _Tally:
    """Sums over all states of one method."""

    def __init__(self) -> None:
        self._sums, self._moments = Sums(), Moments()

    def add(self, start: Tensor, shift: Tensor) -> None:
        """Add states and their displacements, `(states, width)`."""
        length = start.norm(dim=1)
        self._sums.add("relative", (shift.norm(dim=1) / length)[length > 0].sum())
        self._sums.add("states", (length > 0).sum())
        self._sums.add("products", shift.T @ shift)
        self._moments.add(start, shift)

    def sizes(self, plane: Plane) -> tuple[float, float | None]:
        """Return the mean relative size, and the share of the squared displacement in the plane."""
        products, directions = self._sums["products"], plane.directions.cpu()
        total, inside = float(products.trace()), float((directions @ products @ directions.T).trace())
        return float(self._sums["relative"] / self._sums["states"].clamp_min(1)), inside / total if total else None

    def divergence(self, frozen: Moments, dimensions: int | None) -> float | None:
        """Return tr J per direction of the least squares fit δ ≈ c + J (z − z̄); None where it fits any field.

        With principal directions u and variances v, J = C_δz C_zz⁻¹ has the trace Σ uᵀ C_δz u / v; of the field's image
        in the plane it is the sum over the first two, `dimensions`.
        """
        values, vectors = (each[:dimensions] for each in spectrum(frozen))
        if frozen.count < len(values) + 2:
            return None
        along = torch.einsum("kd,de,ke->k", vectors, self._moments.scatter / frozen.count, vectors)
        return float((along / values).mean())


def _pick(z: Tensor, real: Tensor, token: Token) -> tuple[Tensor, Tensor]:
    """Return the states that count of z, `(rows, tokens, width)`, as `(states, width)`, and the row of each.

    `real` is `(rows, tokens)` of booleans; rows of padding alone give nothing.
    """
    if token == "each":
        return z[real], real.nonzero()[:, 0]
    rows = real.any(1).nonzero().squeeze(1)
    z, real = z[rows], real[rows]
    if token == "mean":
        return torch.where(real[..., None], z, 0.0).sum(1) / real.sum(1, keepdim=True), rows
    at = real.int().argmax(1) if token == "first" else real.shape[1] - 1 - real.flip(1).int().argmax(1)
    return z[torch.arange(len(z), device=z.device), at], rows


def _text(number: float | None) -> str:
    return "–" if number is None else f"{number:.2f}"


def _labels(batch: Batch, rows: Tensor) -> Tensor | None:
    """Return the class of each state's row; None where a batch has no class for each row."""
    labels = batch.labels
    if labels is None or labels.shape != (batch.rows,) or labels.is_floating_point():
        return None
    return labels.long().to(rows.device)[rows]
