"""The plane in which the frozen stream at a layer varies most: where pictures of the stream are drawn."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from residual_steer.errors import SteerError

from ._moments import Moments
from ._plots import Axes, Figure, bars
from ._table import Table
from .compare import compare, layer_of

__all__ = ["Plane", "plane", "plane_of", "spectrum"]


@dataclass(frozen=True, eq=False)
class Plane:
    """A plane through the mean of the frozen states at a layer.

    Attributes:
        layer: index of the block that the states leave.
        mean: of the states, `(width,)`, fp64.
        directions: the first two principal directions, orthonormal, `(2, width)`; the sign of each is such that its
            largest entry is positive.
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
        columns = {"direction": "principal direction", "deviation": "standard deviation", "explained": "variance, %"}
        pairs = zip(self.deviations, self.explained, strict=True)
        rows = tuple({"direction": i + 1, "deviation": d, "explained": 100 * e} for i, (d, e) in enumerate(pairs))
        note = f"Of {self.tokens:,} states of the frozen model behind block {self.layer}."
        return Table("Plane of the stream", columns, rows, (note,))

    def plot(self, ax: Axes | None = None) -> Figure:
        """Draw the share of the variance along each direction as bars."""
        shares = dict(zip(("first", "second"), (100 * share for share in self.explained), strict=True))
        return bars(ax, f"Plane of the stream behind block {self.layer}", "share of the variance, %", shares)


def plane(model: nn.Module, loader: Iterable[Any], *, layer: int = -1, reference: nn.Module | None = None) -> Plane:
    """Find the plane in which the frozen stream at a layer varies most, over all tokens but padding.

    Directions are those of the frozen states alone: adapted states do not turn the plane that they are compared in.

    Args:
        model: a steered model; with a reference, any model of the same backbone.
        loader: batches; labels are not needed. It is read once.
        layer: the block whose outgoing stream is looked at; negative ones count from the end.
        reference: the frozen model; None is the same model with its fields off.

    Raises:
        SteerError: the model is neither steered nor given a reference, there is no such block, the loader gives
            nothing, states are NaN or infinite, or vary in fewer than two directions.
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
    """Return the eigenvalues of a covariance, largest first, and its eigenvectors as rows.

    Directions in which states vary 10⁵ times less than along the first are left out: there is nothing but rounding in
    them, as across the hyperplane on which a LayerNorm puts a stream.
    """
    if not moments.count:
        return torch.zeros(0), torch.zeros(0, 0)
    values, vectors = torch.linalg.eigh(moments.scatter / moments.count)
    values, vectors = values.flip(0).clamp_min(0), vectors.T.flip(0)
    kept = values > 1e-10 * values[0]
    return values[kept], vectors[kept]
