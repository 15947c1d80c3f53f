"""The loss over the plane of the stream, with the ways that states take (figure 1a of arXiv 2606.24396)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from residual_steer.backbone import Backbone
from residual_steer.errors import SteerError
from residual_steer.passes import Batch, require_finite
from residual_steer.report import Axis, Column, Surface, Table, Trajectory
from residual_steer.tokens import prefix_tokens
from residual_steer.training.losses import Loss, measure

from .moments import exact
from .pairs import SIDES, Pair, compared
from .plane import Plane, plane
from .stream import beside, layer_of, states_of

__all__ = ["Landscape", "Path", "landscape"]


@dataclass(frozen=True)
class Path:
    """The way of the mean state through the layers, in the plane.

    Attributes:
        x: along the first principal direction, of what leaves each block up to the plane's.
        y: along the second.
        loss: of the model, nothing moved.
        loss_there: of the adapted model with all states of the layer moved to where the way ends.
    """

    x: tuple[float, ...]
    y: tuple[float, ...]
    loss: float
    loss_there: float


@dataclass(frozen=True, eq=False)
class Landscape:
    """The loss of an adapted model over the plane of the frozen stream at a layer.

    Attributes:
        plane: its origin is the mean of the frozen states.
        across: coordinates along the first principal direction.
        up: along the second.
        losses: one row for each of `up`.
        frozen: the way of the frozen model.
        adapted: that of the adapted model.
        together: whether all states were shifted alike, or each was given the coordinates.
    """

    plane: Plane
    across: tuple[float, ...]
    up: tuple[float, ...]
    losses: tuple[tuple[float, ...], ...]
    frozen: Path
    adapted: Path
    together: bool

    @property
    def lowest(self) -> tuple[float, float, float]:
        """The lowest loss of the grid, behind its two coordinates."""
        loss, y, x = min((loss, y, x) for y, row in zip(self.up, self.losses, strict=True)
                         for x, loss in zip(self.across, row, strict=True))  # fmt: skip
        return x, y, loss

    def table(self) -> Table:
        """Return where the ways end and where the loss is lowest."""
        columns = (
            Column("state", "state"),
            Column("x", "along the first direction"),
            Column("y", "along the second"),
            Column("there", "loss with states moved there", digits=4),
            Column("loss", "loss of the model", digits=4),
        )
        x, y, loss = self.lowest
        rows: list[dict[str, str | float]] = [
            {
                "state": f"mean of the {name} model",
                "x": way.x[-1],
                "y": way.y[-1],
                "there": way.loss_there,
                "loss": way.loss,
            }
            for name, way in (("frozen", self.frozen), ("adapted", self.adapted))
        ]
        rows.append({"state": "lowest of the grid", "x": x, "y": y, "there": loss})
        share = 100 * sum(self.plane.explained)
        note = (
            f"Behind block {self.plane.layer}; the plane holds {share:.1f} % of the variance of the frozen states. "
            f"{self._moved()}"
        )
        return Table("Loss over the plane of the stream", columns, tuple(rows), (note,))

    def _moved(self) -> str:
        if self.together:
            return "Loss of the adapted model with all states shifted alike, so that their mean is there."
        return "Loss of the adapted model with every state there; what it has outside the plane stays as it is."

    def plot(self) -> Surface:
        """Return the loss as contours, with the ways of the mean states through the layers over them."""
        ways = (("frozen", self.frozen), ("adapted", self.adapted))
        paths = tuple(Trajectory(name, way.x, way.y) for name, way in ways)
        notes = (f"{self._moved()} Paths: the mean state behind each block up to {self.plane.layer}.",)
        x, y = self.plane.axes()
        return Surface(
            f"Loss over the stream behind block {self.plane.layer}", x, y, Axis("loss"), self.across, self.up,
            self.losses, paths, notes,
        )  # fmt: skip


def landscape(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    layer: int = -1,
    reference: nn.Module | None = None,
    size: int = 21,
    span: float = 2.0,
    loss: Loss | None = None,
    together: bool = False,
) -> Landscape:
    """Measure the loss of an adapted model with the states at a layer moved about in a plane.

    The plane is that of `plane`. At a point (a, b) of the grid every state z that leaves the block is given these
    coordinates, z ← z − PᵀP (z − z̄) + Pᵀ (a, b) with the two directions as rows of P, and keeps what it has outside
    the plane; or all are shifted alike, so that their mean gets them. The blocks behind and the head then run as they
    are, with the fields that act there. Tokens of padding and of a prompt are moved as all others.

    Every point is a run of the whole model: `size`² times the loader, which a few batches of are enough.

    Args:
        model: a steered model; with a reference, one that was adapted by any method.
        loader: batches with what the loss needs, as in `fit`. It is read three times.
        layer: the block whose outgoing stream is moved; negative ones count from the end.
        reference: the frozen model; None is the same model with its fields off.
        size: points along each direction.
        span: how far the grid reaches, in standard deviations of the frozen states along each direction; it is made
            wider where a way of the mean states leads out of it.
        loss: as in `fit`.
        together: shift all states alike. The way of the adapted model then ends at the loss that it really has.

    Raises:
        SteerError: the model is neither steered nor given a reference; there is no such block; a bad `size` or `span`;
            the loader is empty or can be read only once, gives no loss; states or losses are NaN or infinite.
    """
    if isinstance(loader, Iterator):
        raise SteerError(
            "`loader` is read three times, which an iterator cannot be. Give the list or DataLoader itself."
        )
    if not isinstance(size, int) or isinstance(size, bool) or size < 2:
        raise SteerError(f"`size` is an integer from 2; received {size!r}.")
    if isinstance(span, bool) or not isinstance(span, (int, float)) or not 0 < span < math.inf:
        raise SteerError(f"`span` is a positive number of standard deviations; received {span!r}.")
    over = plane(model, loader, layer=layer, reference=reference)
    with compared(model, reference) as pair:
        ways = _ways(pair, loader, over, layer_of(pair.backbone("adapted"), layer))
        ends = ways[:, -1]
        reach = torch.tensor(over.deviations, dtype=ends.dtype) * span
        low, high = torch.minimum(-reach, ways.amin((0, 1))), torch.maximum(reach, ways.amax((0, 1)))
        across, up = (torch.linspace(float(low[k]), float(high[k]), size, dtype=ends.dtype) for k in (0, 1))
        grid = torch.cartesian_prod(up, across).flip(1)
        moves = _Moves(over, torch.cat([ends, grid]), ends[1] if together else None)
        losses, own = _losses(pair, loader, moves, loss)
    require_finite("the loss over the plane", losses)
    paths = [
        Path(tuple(way[:, 0].tolist()), tuple(way[:, 1].tolist()), own[side], float(losses[number]))
        for number, (side, way) in enumerate(zip(SIDES, ways, strict=True))
    ]
    rows = losses[len(SIDES) :].view(size, size).tolist()
    grid_losses = tuple(map(tuple, rows))
    return Landscape(over, tuple(across.tolist()), tuple(up.tolist()), grid_losses, paths[0], paths[1], together)


def _ways(pair: Pair, loader: Iterable[Any], over: Plane, last: int) -> Tensor:
    """Return the coordinates of the mean states of both sides through the layers, `(2, layers, 2)`.

    Blocks whose stream has another width than the plane are passed over.
    """
    widths = pair.backbone("frozen").widths
    blocks = [index for index in range(last + 1) if widths[index] == widths[last]]
    prefix = prefix_tokens(pair.inner("frozen"))
    sums = torch.zeros(0)
    counts = torch.zeros(0)
    for batch in pair.batches(loader):
        seen = []
        for side in SIDES:
            with pair.on(side) as model:
                seen.append(states_of(model, pair.backbone(side), batch, blocks))
        frozen, adapted = seen
        parts, numbers = [], []
        for index in blocks:
            z = frozen[index]
            real = batch.real(z.shape[:2], z.device)
            parts.append(torch.stack([z[real].sum(0), beside(adapted[index], z, prefix)[real].sum(0)]))
            numbers.append(real.sum())
        added, number = torch.stack(parts, 1), torch.stack(numbers)
        sums, counts = (added, number) if not len(sums) else (sums + added, counts + number)
    return over.project(sums / counts[:, None]).cpu()


@dataclass(frozen=True)
class _Moves:
    """Where states are moved to.

    Attributes:
        over: the plane.
        points: coordinates, `(points, 2)`.
        mean: those of the mean of the states that are moved alike; None moves each from where it is.
    """

    over: Plane
    points: Tensor
    mean: Tensor | None

    def step(self, states: Tensor, point: Tensor) -> Tensor:
        """Return what takes states, `(..., width)`, to a point."""
        now = self.over.project(states) if self.mean is None else self.mean.to(states)
        return (point.to(states) - now) @ self.over.directions


def _losses(pair: Pair, loader: Iterable[Any], moves: _Moves, loss: Loss | None) -> tuple[Tensor, dict[str, float]]:
    """Return the mean loss with the states at each of the points, `(points,)`, and those of both sides, unmoved."""
    moved, own, weight = torch.zeros(len(moves.points), dtype=torch.float64), dict.fromkeys(SIDES, 0.0), 0
    for batch in pair.batches(loader):
        for side in SIDES:
            with pair.on(side) as model:
                outcome = measure(model, batch.content, loss)
                own[side] += float(outcome.loss) * outcome.weight
        weight += outcome.weight
        with pair.on("adapted") as model:
            found = _over(model, pair.backbone("adapted"), batch, moves, loss)
        moved += torch.tensor(found, dtype=moved.dtype) * outcome.weight
    return moved / weight, {side: total / weight for side, total in own.items()}


def _over(model: nn.Module, backbone: Backbone, batch: Batch, moves: _Moves, loss: Loss | None) -> list[float]:
    """Return the loss of one batch with the states at each of the points."""
    found: list[float] = []

    def after(block: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        states = exact(backbone.left(output).movedim(backbone.channels, -1))
        step = moves.step(states, moves.points[len(found)]).expand_as(states).movedim(-1, backbone.channels)
        return backbone.write(output, lambda z: z + step.to(z.device, z.dtype))

    handle = backbone.blocks[moves.over.layer].register_forward_hook(after)
    try:
        for _ in moves.points:
            found.append(float(measure(model, batch.content, loss).loss))
    finally:
        handle.remove()
    return found
