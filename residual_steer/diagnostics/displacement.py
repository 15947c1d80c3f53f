"""The displacement field of a method: where it moves each state of the frozen stream (figure 1b of arXiv 2606.24396).

The paper calls LoRA's field "chaotic" and H-Res's "smooth, convergent" (claim 10) and shows a drawing. Here the field
is that of real states, and the words are numbers: whether neighbours move alike, and whether states come together.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from residual_steer._batches import Batch
from residual_steer._checks import check_choice, check_integer
from residual_steer.errors import SteerError

from ._moments import Moments, Sums
from ._results import Axes, Figure, Table, panels, table_of
from .compare import Pair, beside, compare, layer_of
from .landscape import Plane, plane_of, spectrum

__all__ = ["NEIGHBOURS", "Displacement", "FieldMeasures", "MethodField", "Token", "displacement"]

Token = Literal["each", "first", "last", "mean"]

NEIGHBOURS = 8  # of a point, whose displacements its own is compared with
_STATES = {"each": "one for every token", "mean": "the mean of the tokens of every row"}


@dataclass(frozen=True)
class FieldMeasures:
    """The measures of a displacement field, in the stream or in the plane. None where it is not defined.

    Attributes:
        coherence: the mean cosine between the displacement of a point and those of its 8 nearest neighbours in the
            frozen stream: 1 for a smooth field, `chance` for one without order.
        chance: the same between any two points. A field that moves all states alike has 1 in both.
        contraction: after ÷ before, of the root mean square distance of a state from the mean of its class; where rows
            have no class, of the mean distance between two states. Below 1 states come together.
        divergence: of the field's best linear fit by least squares, tr J, divided by the number of directions: 0 for a
            field that only shifts or turns, −1 where all states end in one point.
    """

    coherence: float | None
    chance: float | None
    contraction: float | None
    divergence: float | None


@dataclass(frozen=True)
class MethodField:
    """The displacement field of one method.

    Attributes:
        name: of the method.
        dx, dy: of every point, along the first and the second principal direction.
        size: the mean of ‖displacement‖ / ‖frozen state‖ over all states.
        seen: the share of the squared displacement that lies in the plane; None where nothing moves.
        stream, plane: its measures in all dimensions of the stream, and those of its image in the plane.
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
        x, y: of the points, along the first and the second principal direction.
        groups: the class of each point; empty where rows have none.
        fields: one for each method.
        states: of how many states the points were drawn.
        token: which states of a row they are.
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
        fields = self.fields
        columns: dict[str, tuple[str, list[Any]]] = {
            "method": ("method", [one.name for one in fields]),
            "size": ("relative size", [one.size for one in fields]),
            "seen": ("in the plane, %", [None if one.seen is None else 100 * one.seen for one in fields]),
        }
        for where in ("stream", "plane"):
            for name in ("coherence", "chance", "contraction", "divergence"):
                values = [getattr(getattr(one, where), name) for one in fields]
                columns[f"{where}_{name}"] = f"{name}, {where}", values
        which = _STATES.get(self.token, f"the {self.token} token of every row")
        drawn = f"{len(self.x)} of {self.states:,} states behind block {self.plane.layer}, {which}"
        return table_of(
            "Displacement fields",
            columns,
            f"{drawn}; the plane holds {100 * sum(self.plane.explained):.1f} % of the frozen variance.",
            f"Coherence: mean cosine with the {NEIGHBOURS} nearest neighbours; chance: with any point. Contraction "
            f"{'within classes' if self.groups else 'of all pairs'}: below 1 states come together. Divergence: of the "
            "best linear fit, per direction.",
        )

    def plot(self, *methods: str, ax: Axes | None = None) -> Figure:
        """Draw the fields of methods, four at most, or all, with an arrow from each frozen state to the adapted one.

        Raises:
            SteerError: there is no such method, there are too many, or more than `ax` has room for.
        """
        known = {one.name: one for one in self.fields}
        chosen = [known[name] for name in methods or known if name in known]
        if len(chosen) < len(methods) or len(chosen) > 4:
            raise SteerError(f"a plot is of one to four of {', '.join(known)}; received {', '.join(methods) or 'all'}.")
        figure, found = panels(ax, len(chosen))
        colours = [[self.groups.index(group) for group in self.groups]] if self.groups else []  # alike in all panels
        for axes, one in zip(found, chosen, strict=True):
            arrows = (self.x, self.y, one.dx, one.dy, *colours)
            axes.quiver(*arrows, angles="xy", scale_units="xy", scale=1, cmap="tab10")
            axes.update_datalim([(x + dx, y + dy) for x, y, dx, dy in zip(*arrows[:4], strict=True)])
            axes.autoscale_view()
            coherence, chance = (
                "–" if each is None else f"{each:.2f}" for each in (one.stream.coherence, one.stream.chance)
            )
            axes.set_title(f"{one.name}: coherence {coherence}, chance {chance}")
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
    are of `points` drawn from them without replacement, the same for every method and however the batches are cut.

    `models` are adapted ones by name, on one device and of one backbone; without a `reference` the first is steered.
    `token` says which states of a row count: of "each" token, of the "first" (CLS), the "last", or their "mean". Class
    labels of the loader, `(rows,)`, say between which states contraction is measured.

    Raises:
        SteerError: besides what all raise, no model, no such block, an unknown `token`, fewer than 10 points, or states
            that vary in fewer than two directions.
    """
    if not isinstance(models, Mapping) or not models:
        raise SteerError(f"`models` is a dict of one adapted model or more, by name; received {type(models).__name__}.")
    check_choice("token", token, get_args(Token))
    check_integer("points", points, NEIGHBOURS + 2)
    moments, tallies, draw = Moments(), {name: _Tally() for name in models}, _Draw(points, seed)
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
    over = plane_of(moments, index)
    (start, *shifts), labels = draw.sorted()
    flat = over.project(start)
    fields = []
    for (name, tally), shift in zip(tallies.items(), shifts, strict=True):
        image = shift @ over.directions.T
        stream = _measures(start, shift, labels, tally.divergence(moments, None))
        inside = _measures(flat, image, labels, tally.divergence(moments, 2))
        dx, dy = map(tuple, image.T.tolist())
        fields.append(MethodField(name, dx, dy, *tally.sizes(over), stream, inside))
    groups = () if labels is None else tuple(map(str, labels.tolist()))
    x, y = map(tuple, flat.T.tolist())
    return Displacement(over, x, y, groups, tuple(fields), moments.count, token)


def _pick(z: Tensor, real: Tensor, token: Token) -> tuple[Tensor, Tensor]:
    """Return the states that count of z, `(rows, tokens, width)`, as `(states, width)`, and the row of each."""
    if token == "each":
        return z[real], real.nonzero()[:, 0]
    rows = real.any(1).nonzero().squeeze(1)
    z, real = z[rows], real[rows]
    if token == "mean":
        return torch.where(real[..., None], z, 0.0).sum(1) / real.sum(1, keepdim=True), rows
    at = real.int().argmax(1) if token == "first" else real.shape[1] - 1 - real.flip(1).int().argmax(1)
    return z[torch.arange(len(z), device=z.device), at], rows


def _labels(batch: Batch, rows: Tensor) -> Tensor | None:
    """Return the class of each state's row; None where a batch has no class for each row."""
    labels = batch.labels
    if labels is None or labels.shape != (batch.rows,) or labels.is_floating_point():
        return None
    return labels.long().to(rows.device)[rows]


class _Draw:
    """Some of the states that come in batches, each as likely as any other: those with the smallest random keys."""

    def __init__(self, size: int, seed: int) -> None:
        self._size, self._random = size, np.random.default_rng(seed)
        self._parts: list[Tensor] = []  # keys, labels and states
        self._labelled = True

    def add(self, states: Tensor, labels: Tensor | None) -> None:
        """Add states, `(states, 1 + methods, width)`, with their labels; none at all unless every batch has them."""
        self._labelled = self._labelled and labels is not None
        labels = torch.zeros(len(states), dtype=torch.long) if labels is None else labels.cpu()
        parts = [torch.from_numpy(self._random.random(len(states))), labels, states]
        parts = [torch.cat(both) for both in zip(self._parts, parts, strict=True)] if self._parts else parts
        kept = parts[0].argsort()[: self._size]
        self._parts = [part[kept.to(part.device)] for part in parts]

    def sorted(self) -> tuple[tuple[Tensor, ...], Tensor | None]:
        """Return the states, `(points, width)` of the frozen model and of each method, and their labels, by label."""
        _, labels, states = self._parts
        if not self._labelled:
            return states.unbind(1), None
        order = labels.argsort(stable=True)
        return states[order.to(states.device)].unbind(1), labels[order]


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


def _measures(start: Tensor, shift: Tensor, labels: Tensor | None, divergence: float | None) -> FieldMeasures:
    """Return the measures of the field that moves `start` by `shift`, `(points, dimensions)` both."""
    before, after = (_spread(states, labels) for states in (start, start + shift))
    contraction = after / before if before else None
    moving = shift.norm(dim=1) > 0
    start, unit = start[moving], F.normalize(shift[moving], dim=1, eps=0.0)
    count = len(start)
    if count <= NEIGHBOURS:
        return FieldMeasures(None, None, contraction, divergence)
    distance = torch.cdist(start, start, compute_mode="donot_use_mm_for_euclid_dist").fill_diagonal_(torch.inf)
    near = distance.topk(NEIGHBOURS, largest=False).indices
    coherence = (unit[:, None] * unit[near]).sum(-1).mean()
    chance = (unit.sum(0).square().sum() - count) / (count * (count - 1))
    return FieldMeasures(float(coherence), float(chance), contraction, divergence)


def _spread(states: Tensor, labels: Tensor | None) -> float:
    """Return the root mean square distance from the mean of the class, or the mean distance between two states."""
    if labels is None:
        return float(torch.pdist(states).mean()) if len(states) > 1 else 0.0
    _, of = torch.unique(labels.to(states.device), return_inverse=True)
    counts = torch.bincount(of).to(states)
    means = torch.zeros(len(counts), states.shape[1]).to(states).index_add_(0, of, states) / counts[:, None]
    return float((states - means[of]).square().sum(1).mean().sqrt())
