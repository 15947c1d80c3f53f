"""The loss over the plane of the stream, with the ways that states take (figure 1a of arXiv 2606.24396)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from residual_steer._batches import require_finite
from residual_steer.errors import SteerError
from residual_steer.recording import watch
from residual_steer.training.losses import Loss, measure

from ._moments import Sums, exact
from ._plots import Axes, Figure, panels
from ._table import Table
from .compare import SIDES, Pair, compare, layer_of
from .plane import Plane, plane

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
        columns = {
            "state": "state",
            "x": "along the first direction",
            "y": "along the second",
            "there": "loss with states moved there",
            "loss": "loss of the model",
        }
        x, y, loss = self.lowest
        rows: list[dict[str, Any]] = [
            {"state": f"mean of the {name} model", "x": way.x[-1], "y": way.y[-1], "there": way.loss_there,
             "loss": way.loss}
            for name, way in zip(SIDES, (self.frozen, self.adapted), strict=True)
        ]  # fmt: skip
        rows.append({"state": "lowest of the grid", "x": x, "y": y, "there": loss})
        notes = (
            f"Behind block {self.plane.layer}; the plane holds {100 * sum(self.plane.explained):.1f} % of the variance "
            "of the frozen states.",
            "Loss of the adapted model with all states shifted alike, so that their mean is there."
            if self.together
            else "Loss of the adapted model with every state there; what it has outside the plane stays as it is.",
        )
        return Table("Loss over the plane of the stream", columns, tuple(rows), notes)

    def plot(self, ax: Axes | None = None) -> Figure:
        """Draw the loss as contours, with the ways of the mean states through the layers over them."""
        figure, (axes,) = panels(ax)
        contours = axes.contourf(self.across, self.up, self.losses, levels=15, cmap="Greys")
        figure.colorbar(contours, ax=axes, label="loss")
        for name, way in zip(SIDES, (self.frozen, self.adapted), strict=True):
            axes.plot(way.x, way.y, marker="o", markersize=4, label=name)
        axes.set_title(f"Loss over the stream behind block {self.plane.layer}")
        self.plane.label(axes)
        axes.legend()
        return figure


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
    with compare(model, reference) as pair:
        ways = _ways(pair, loader, over, layer_of(pair.backbones["adapted"], layer))
        ends = ways[:, -1]
        reach = torch.tensor(over.deviations, dtype=ends.dtype) * span
        low, high = torch.minimum(-reach, ways.amin((0, 1))), torch.maximum(reach, ways.amax((0, 1)))
        across, up = (torch.linspace(float(low[k]), float(high[k]), size, dtype=ends.dtype) for k in (0, 1))
        grid = torch.cartesian_prod(up, across).flip(1)
        points = torch.cat([ends, grid])
        losses, own = _losses(pair, loader, over, points, ends[1] if together else None, loss)
    require_finite("the loss over the plane", losses)
    frozen, adapted = (
        Path(tuple(way[:, 0].tolist()), tuple(way[:, 1].tolist()), own[side], float(there))
        for side, way, there in zip(SIDES, ways, losses[: len(SIDES)], strict=True)
    )
    rows = tuple(map(tuple, losses[len(SIDES) :].view(size, size).tolist()))
    return Landscape(over, tuple(across.tolist()), tuple(up.tolist()), rows, frozen, adapted, together)


def _ways(pair: Pair, loader: Iterable[Any], over: Plane, last: int) -> Tensor:
    """Return the coordinates of the mean states of both sides through the layers, `(2, layers, 2)`.

    Blocks whose stream has another width than the plane are passed over.
    """
    widths, sums = pair.backbones["frozen"].widths, Sums()
    blocks = [index for index in range(last + 1) if widths[index] == widths[last]]
    for batch in pair.batches(loader):
        for place, states in enumerate(pair.states(batch, blocks).values()):
            sums.add(("states", place), torch.stack([each.sum(0) for each in states]))
            sums.add(("tokens", place), torch.tensor(len(states[0])))
    means = sums.layers("states") / sums.layers("tokens")[:, None, None]
    return over.project(means.to(over.mean)).transpose(0, 1).cpu()


def _losses(
    pair: Pair, loader: Iterable[Any], over: Plane, points: Tensor, mean: Tensor | None, loss: Loss | None
) -> tuple[Tensor, dict[str, float]]:
    """Return the mean loss with the states at each of the points, `(points,)`, and those of both sides, unmoved.

    States are moved alike, so that their mean, whose coordinates are given, gets to the point; or each if it is None.
    """
    backbone, total, own, weight = pair.backbones["adapted"], Sums(), dict.fromkeys(SIDES, 0.0), 0

    def move(point: Tensor, block: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        states = exact(backbone.left(output).movedim(backbone.channels, -1))
        now = over.project(states) if mean is None else mean.to(states)
        step = ((point.to(states) - now) @ over.directions).expand_as(states).movedim(-1, backbone.channels)
        return backbone.write(output, lambda z: z + step.to(z.device, z.dtype))

    for batch in pair.batches(loader):
        for side in SIDES:
            with pair.on(side) as model:
                outcome = measure(model, batch.content, loss)
                own[side] += float(outcome.loss) * outcome.weight
        weight += outcome.weight
        found = []
        for point in points:
            with watch([backbone.blocks[over.layer]], after=partial(move, point)):
                found.append(measure(pair.models["adapted"], batch.content, loss).loss * outcome.weight)
        total.add("moved", torch.stack(found))
    return total["moved"] / weight, {side: each / weight for side, each in own.items()}
