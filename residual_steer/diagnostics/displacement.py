"""The displacement field of a method: where it moves each state of the frozen stream (figure 1b of arXiv 2606.24396).

The paper calls LoRA's field "chaotic" and H-Res's "smooth, convergent" (claim 10) and shows a drawing. Here the field
is that of real states, and the two words are numbers: the coherence of neighbouring displacements, and how far states
come together.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from residual_steer.errors import SteerError
from residual_steer.passes import Batch
from residual_steer.report import Arrows, Column, Flow, Table
from residual_steer.tokens import prefix_tokens

from .field_measures import NEIGHBOURS, Draw, FieldMeasures, measures_of
from .moments import Moments
from .pairs import Pair, compared
from .plane import Plane, plane_of, spectrum
from .stream import beside, layer_of, states_of

__all__ = ["Displacement", "MethodField", "Token", "displacement"]

Token = Literal["each", "first", "last", "mean"]

_SAID = {
    "each": "one for every token",
    "first": "the first token of every row",
    "last": "the last token of every row",
    "mean": "the mean of the tokens of every row",
}


@dataclass(frozen=True)
class MethodField:
    """The displacement field of one method.

    Attributes:
        name: of the method.
        dx: of every point, along the first principal direction.
        dy: along the second.
        size: the mean of ‖displacement‖ / ‖frozen state‖ over all states.
        seen: the share of the squared displacement that lies in the plane; None where nothing moves.
        stream: what is said of it in all dimensions of the stream.
        plane: the same of its image in the plane.
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
        names = ("coherence", "chance", "contraction", "divergence")
        columns = [
            Column("method", "method"),
            Column("size", "relative size", digits=4),
            Column("seen", "in the plane", "%", digits=1),
        ]
        columns += [Column(f"stream_{name}", f"{name}, stream") for name in names]
        columns += [Column(f"plane_{name}", f"{name}, plane") for name in names]
        rows = []
        for one in self.fields:
            row: dict[str, str | float | None] = {"method": one.name, "size": one.size}
            row["seen"] = None if one.seen is None else 100 * one.seen
            for place, measures in (("stream", one.stream), ("plane", one.plane)):
                row.update({f"{place}_{name}": getattr(measures, name) for name in names})
            rows.append(row)
        share = 100 * sum(self.plane.explained)
        within = "within classes" if self.groups else "of all pairs"
        notes = (
            f"{self._drawn()}; the plane holds {share:.1f} % of the frozen variance.",
            f"Coherence: mean cosine with the {NEIGHBOURS} nearest neighbours; chance: with any point. Contraction "
            f"{within}: below 1 states come together. Divergence: of the best linear fit, per direction.",
        )
        return Table("Displacement fields", tuple(columns), tuple(rows), notes)

    def _drawn(self) -> str:
        return f"{len(self.x)} of {self.states:,} states behind block {self.plane.layer}, {_SAID[self.token]}"

    def plot(self, *methods: str) -> Arrows:
        """Return the fields in the plane beside each other, an arrow from each frozen state to the adapted one.

        Args:
            *methods: which ones, four at most; none names all.

        Raises:
            SteerError: there is no such method, or there are too many.
        """
        known = {one.name: one for one in self.fields}
        wrong = [name for name in methods if name not in known]
        chosen = [known[name] for name in methods if name in known] if methods else list(self.fields)
        if wrong or len(chosen) > 4:
            raise SteerError(f"a plot is of one to four of {', '.join(known)}; received {', '.join(methods) or 'all'}.")
        panels = tuple(Flow(one.name, self.x, self.y, one.dx, one.dy, self.groups) for one in chosen)
        notes = [f"{self._drawn()}."]
        notes += [
            f"{one.name}: coherence {_text(one.stream.coherence)} (chance {_text(one.stream.chance)}), contraction "
            f"{_text(one.stream.contraction)}, divergence {_text(one.stream.divergence)}, all in the stream."
            for one in chosen
        ]
        x, y = self.plane.axes()
        return Arrows(f"Displacement of the stream behind block {self.plane.layer}", x, y, panels, tuple(notes))


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
    if token not in Token.__args__:  # type: ignore[attr-defined]
        raise SteerError(f"`token` is each, first, last or mean; received {token!r}.")
    if not isinstance(points, int) or isinstance(points, bool) or points <= NEIGHBOURS + 1:
        raise SteerError(f"`points` is an integer from {NEIGHBOURS + 2}; received {points!r}.")
    with contextlib.ExitStack() as stack:
        pairs: dict[str, Pair] = {}
        for name, model in models.items():
            against = next(iter(pairs.values())).side("frozen") if pairs else reference
            pairs[name] = stack.enter_context(compared(model, against))
        seen = _look(pairs, loader, layer, token, Draw(points, seed))
    start, *shifts = seen.draw.states.unbind(1)
    flat = seen.plane.project(start)
    fields = []
    for (name, tally), shift in zip(seen.tallies.items(), shifts, strict=True):
        image = shift @ seen.plane.directions.T
        size, inside = tally.sizes(seen.plane)
        fields.append(
            MethodField(
                name,
                tuple(image[:, 0].tolist()),
                tuple(image[:, 1].tolist()),
                size,
                inside,
                stream=measures_of(start, shift, seen.draw.labels, tally.divergence(seen.moments, None)),
                plane=measures_of(flat, image, seen.draw.labels, tally.divergence(seen.moments, 2)),
            )
        )
    x, y = (tuple(part) for part in flat.T.tolist())
    groups = () if seen.draw.labels is None else tuple(str(label) for label in seen.draw.labels.tolist())
    return Displacement(seen.plane, x, y, groups, tuple(fields), seen.moments.count, token)


@dataclass
class _Seen:
    """What one reading of the loader gave."""

    plane: Plane
    moments: Moments
    tallies: dict[str, _Tally]
    draw: Draw


def _look(pairs: Mapping[str, Pair], loader: Iterable[Any], layer: int, token: Token, draw: Draw) -> _Seen:
    """Run every model over the loader, the frozen one once; points that were drawn stand in the order of classes."""
    moments, tallies = Moments(), {name: _Tally() for name in pairs}
    first = next(iter(pairs.values()))
    backbone = first.backbone("frozen")
    index, prefix = layer_of(backbone, layer), prefix_tokens(first.inner("frozen"))
    for batch in first.batches(loader):
        with first.on("frozen") as model:
            frozen = states_of(model, backbone, batch, [index])
        z = frozen[index]
        real = batch.real(z.shape[:2], z.device)
        start, rows = _pick(z, real, token)
        shifts = []
        for name, pair in pairs.items():
            with pair.on("adapted") as model:
                adapted = states_of(model, pair.backbone("adapted"), batch, [index])
            shifts.append(_pick(beside(adapted[index], z, prefix), real, token)[0] - start)
            tallies[name].add(start, shifts[-1])
        moments.add(start)
        draw.add(torch.stack([start, *shifts], 1), _labels(batch, rows))
    draw.sort()
    return _Seen(plane_of(moments, index), moments, tallies, draw)


class _Tally:
    """Sums over all states of one method."""

    def __init__(self) -> None:
        self._relative, self.kept = 0.0, 0
        self.moments = Moments()
        self.products = torch.zeros(0)

    def add(self, start: Tensor, shift: Tensor) -> None:
        """Add states and their displacements, `(states, width)`."""
        length = start.norm(dim=1)
        there = length > 0
        self._relative += float((shift.norm(dim=1)[there] / length[there]).sum())
        self.kept += int(there.sum())
        self.moments.add(start, shift)
        products = shift.T @ shift
        self.products = self.products + products if len(self.products) else products

    def sizes(self, plane: Plane) -> tuple[float, float | None]:
        """Return the mean relative size, and the share of the squared displacement in the plane."""
        total = float(self.products.trace())
        inside = float((plane.directions @ self.products @ plane.directions.T).trace())
        return self._relative / max(self.kept, 1), inside / total if total else None

    def divergence(self, frozen: Moments, dimensions: int | None) -> float | None:
        """Return tr J per direction of the least squares fit δ ≈ c + J (z − z̄); None where it fits any field.

        With principal directions u and variances v, J = C_δz C_zz⁻¹ has the trace Σ uᵀ C_δz u / v; of the field's image
        in the plane it is the sum over the first two.

        Args:
            frozen: moments of the states.
            dimensions: how many principal directions; None is all of them.
        """
        values, vectors = spectrum(frozen)
        values, vectors = values[:dimensions], vectors[:dimensions]
        if frozen.count < len(values) + 2:
            return None
        along = torch.einsum("kd,de,ke->k", vectors, self.moments.scatter / frozen.count, vectors)
        return float((along / values).mean())


def _pick(z: Tensor, real: Tensor, token: Token) -> tuple[Tensor, Tensor]:
    """Return the states that count, `(states, width)`, and the row of each.

    Args:
        z: `(rows, tokens, width)`.
        real: `(rows, tokens)` of booleans; rows of padding alone give nothing.
        token: each, first, last or mean.
    """
    if token == "each":
        return z[real], real.nonzero()[:, 0]
    rows = real.any(1).nonzero().squeeze(1)
    z, real = z[rows], real[rows]
    if token == "mean":
        return (z * real[..., None]).sum(1) / real.sum(1, keepdim=True), rows
    at = real.int().argmax(1) if token == "first" else real.shape[1] - 1 - real.flip(1).int().argmax(1)
    return z[torch.arange(len(z), device=z.device), at], rows


def _text(number: float | None) -> str:
    return "–" if number is None else f"{number:.3f}"


def _labels(batch: Batch, rows: Tensor) -> Tensor | None:
    """Return the class of each state's row; None where a batch has no class for each row."""
    labels = batch.labels
    if labels is None or labels.shape != (batch.rows,) or labels.is_floating_point():
        return None
    return labels.long().to(rows.device)[rows]
