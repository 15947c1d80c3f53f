"""The plane in which the frozen stream varies most, and the loss over it (figure 1a of arXiv 2606.24396)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from residual_steer._batches import check_loader, device_of, require_finite
from residual_steer._checks import check_integer, check_number
from residual_steer._undisturbed import watch
from residual_steer.errors import SteerError
from residual_steer.training.losses import Loss, MeanLoss, measure

from ._moments import Moments, Sums, exact
from ._results import Axes, Figure, Table, bars, panels, table_of
from .compare import SIDES, Pair, compare, layer_of

__all__ = ["Landscape", "Path", "Plane", "landscape", "plane", "plane_of", "spectrum"]


@dataclass(frozen=True, eq=False)
class Plane:
    """A plane through the mean of the frozen states at a layer.

    Attributes:
        layer: index of the block that the states leave.
        mean: of the states, `(width,)`, fp64.
        directions: the first two principal directions, orthonormal, `(2, width)`, with positive largest entries.
        deviations: standard deviations of the states along them.
        explained: the share of the variance that lies along each.
        tokens: how many states.
    """

    layer: int
    mean: Tensor
    directions: Tensor
    deviations: tuple[float, float]
    explained: tuple[float, float]
    tokens: int

    def project(self, states: Tensor) -> Tensor:
        """Return coordinates in the plane, `(..., width) -> (..., 2)`."""
        return (states - self.mean) @ self.directions.T

    def label(self, axes: Axes) -> None:
        """Name the axes of a picture in the plane."""
        first, second = (100 * share for share in self.explained)
        axes.set(xlabel=f"first principal direction, {first:.0f} % of the variance", ylabel=f"second, {second:.0f} %")

    def table(self) -> Table:
        """Return one row for each direction."""
        columns = {
            "direction": ("principal direction", (1, 2)),
            "deviation": ("standard deviation", self.deviations),
            "explained": ("variance, %", [100 * share for share in self.explained]),
        }
        note = f"Of {self.tokens:,} states of the frozen model behind block {self.layer}."
        return table_of("Plane of the stream", columns, note)

    def plot(self, ax: Axes | None = None) -> Figure:
        """Draw the share of the variance along each direction as bars."""
        shares = dict(zip(("first", "second"), (100 * share for share in self.explained), strict=True))
        return bars(ax, f"Plane of the stream behind block {self.layer}", "share of the variance, %", shares)


def plane(model: nn.Module, loader: Iterable[Any], *, layer: int = -1, reference: nn.Module | None = None) -> Plane:
    """Find the plane in which the frozen stream at a layer varies most: adapted states do not turn it.

    Raises:
        SteerError: besides what all raise, there is no such block, or states vary in fewer than two directions.
    """
    moments = Moments()
    with compare(model, reference) as pair:
        index = layer_of(pair.backbones["frozen"], layer)
        for batch in pair.batches(loader):
            z = pair.stream("frozen", batch, [index])[index]
            moments.add(z[batch.real(z.shape[:2], z.device)])
    return plane_of(moments, index)


def plane_of(moments: Moments, layer: int) -> Plane:
    """Return the plane of states whose moments were added up, or raise if they vary in fewer than two directions."""
    values, vectors = spectrum(moments)
    if len(values) < 2:
        raise SteerError(
            f"a plane needs states that vary in two directions; {moments.count} states behind block {layer} vary in "
            f"{len(values)}. Give more data, or another layer."
        )
    directions = vectors[:2]
    largest = directions.gather(1, directions.abs().argmax(1, keepdim=True))
    share, deviations = (values[:2] / values.sum()).tolist(), values[:2].sqrt().tolist()
    return Plane(layer, moments.mean, directions * largest.sign(), (*deviations,), (*share,), moments.count)


def spectrum(moments: Moments) -> tuple[Tensor, Tensor]:
    """Return the eigenvalues of a covariance, largest first, and its eigenvectors as rows."""
    if not moments.count:
        return torch.zeros(0), torch.zeros(0, 0)
    values, vectors = torch.linalg.eigh(moments.scatter / moments.count)
    values, vectors = values.flip(0).clamp_min(0), vectors.T.flip(0)
    kept = values > 1e-10 * values[0]  # across the hyperplane on which a LayerNorm puts a stream is only rounding
    return values[kept], vectors[kept]


@dataclass(frozen=True)
class Path:
    """The way of the mean state through the layers, in the plane.

    Attributes:
        x, y: along the first and second principal direction, of what leaves each block up to the plane's.
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
        across, up: coordinates along the first and the second principal direction.
        losses: one row for each of `up`.
        frozen, adapted: the ways of both models.
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
        lowest, ways = self.lowest, (self.frozen, self.adapted)
        columns = {
            "state": ("state", [*(f"mean of the {side} model" for side in SIDES), "lowest of the grid"]),
            "x": ("along the first direction", [*(way.x[-1] for way in ways), lowest[0]]),
            "y": ("along the second", [*(way.y[-1] for way in ways), lowest[1]]),
            "there": ("loss with states moved there", [*(way.loss_there for way in ways), lowest[2]]),
            "loss": ("loss of the model", [*(way.loss for way in ways), None]),
        }
        return table_of(
            "Loss over the plane of the stream",
            columns,
            f"Behind block {self.plane.layer}; the plane holds {100 * sum(self.plane.explained):.1f} % of the variance "
            "of the frozen states.",
            "Loss of the adapted model with all states shifted alike, so that their mean is there."
            if self.together
            else "Loss of the adapted model with every state there; what it has outside the plane stays as it is.",
        )

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
    """Measure the loss of an adapted model with the states at a layer moved about in the plane of `plane`.

    At a point (a, b) of the grid every state z that leaves the block is given these coordinates, z ← z − PᵀP (z − z̄) +
    Pᵀ (a, b) with the two directions as rows of P, and keeps what it has outside the plane; or all are shifted alike,
    so that their mean gets them. The blocks behind and the head then run as they are, with the fields that act there.
    Tokens of padding and of a prompt are moved as all others.

    `loader` gives what the `loss` needs, both as for `fit`, and is read three times; `size`² points are as many runs of
    the whole model. The grid reaches `span` standard deviations of the frozen states along each direction, and further
    where a way of the mean states leads out of it. With `together` all states are shifted alike: the way of the adapted
    model then ends at the loss that it really has.

    Raises:
        SteerError: besides what all raise, there is no such block; a bad `size` or `span`; the loader is an iterator.
    """
    check_loader("loader", loader, read="three times")
    check_integer("size", size, 2)
    check_number("span", span, above=0, meaning="in standard deviations")
    over = plane(model, loader, layer=layer, reference=reference)
    with compare(model, reference) as pair:
        ways = _ways(pair, loader, over)
        ends = ways[:, -1]
        reach = torch.tensor(over.deviations, dtype=ends.dtype) * span
        low, high = torch.minimum(-reach, ways.amin((0, 1))), torch.maximum(reach, ways.amax((0, 1)))
        across, up = (torch.linspace(float(low[k]), float(high[k]), size, dtype=ends.dtype) for k in (0, 1))
        points = torch.cat([ends, torch.cartesian_prod(up, across).flip(1)])
        losses, own = _losses(pair, loader, over, points, ends[1] if together else None, loss)
    require_finite("the loss over the plane", losses)
    there, grid = losses[:2].tolist(), losses[2:].view(size, size).tolist()
    paths = zip(ways.mT.tolist(), own, there, strict=True)
    frozen, adapted = (Path(tuple(x), tuple(y), alone, at) for (x, y), alone, at in paths)
    return Landscape(
        over, tuple(across.tolist()), tuple(up.tolist()), tuple(map(tuple, grid)), frozen, adapted, together
    )


def _ways(pair: Pair, loader: Iterable[Any], over: Plane) -> Tensor:
    """Return the coordinates of the mean states of both sides at blocks of the plane's width, `(2, blocks, 2)`."""
    widths, sums = pair.backbones["frozen"].widths, Sums()
    blocks = [index for index in range(over.layer + 1) if widths[index] == widths[over.layer]]
    for batch in pair.batches(loader):
        for place, states in enumerate(pair.states(batch, blocks).values()):
            sums.add(("states", place), torch.stack([each.sum(0) for each in states]))
            sums.add(("tokens", place), torch.tensor(len(states[0])))
    means = sums.layers("states") / sums.layers("tokens")[:, None, None]
    return over.project(means.to(over.mean)).transpose(0, 1).cpu()


def _losses(
    pair: Pair, loader: Iterable[Any], over: Plane, points: Tensor, mean: Tensor | None, loss: Loss | None
) -> tuple[Tensor, list[float]]:
    """Return the mean loss with each state, or a `mean` of all, at each point, and that of each side unmoved."""
    backbone, total = pair.backbones["adapted"], Sums()

    def move(point: Tensor, block: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        states = exact(backbone.left(output).movedim(backbone.channels, -1))
        now = over.project(states) if mean is None else mean.to(states)
        step = ((point.to(states) - now) @ over.directions).expand_as(states).movedim(-1, backbone.channels)
        return backbone.write(output, lambda z: z + step.to(z.device, z.dtype))

    adapted, parts = pair.models["adapted"], [batch.content for batch in pair.batches(loader)]
    shares, _ = MeanLoss(adapted, loss, device_of(adapted)).shares([(part, True) for part in parts])
    if not any(shares):
        raise SteerError("the loader gave no label that counts. Look at the labels.")
    for part, share in zip(parts, shares, strict=True):
        if not share:  # its mean is one over nothing
            continue
        for side in SIDES:
            with pair.on(side) as model:
                total.add(side, exact(measure(model, part, loss).loss) * share)
        moved = []
        for point in points:
            with watch([backbone.blocks[over.layer]], after=partial(move, point)):
                moved.append(measure(adapted, part, loss).loss * share)
        total.add("moved", torch.stack(moved))
    return total["moved"], [float(total[side]) for side in SIDES]
