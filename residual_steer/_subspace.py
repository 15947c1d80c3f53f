"""Directions that hold the energy of features, and linear maps that an optimizer moves in all others (eq. 6).

The update is projected, not the gradient: an optimizer that scales coordinates one by one, and weight decay, would
leave the null space again.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Optimizer

from ._internals import version
from .errors import SteerError, some
from .field import Projection

_ROWS = 8192  # that are taken to fp64 at a time
_SLACK = 1e-12  # by which a sum of shares may miss what it adds up to
_STRAYED = 1e-4  # relative to [W, b]: far above what fp32 rounds, far below what training does


class SecondMoment:
    """Σ x xᵀ of the features x that enter a linear map, uncentred, with a 1 behind every x where it has a bias.

    The sum is in fp64, and so on the CPU for a device that has none.
    """

    def __init__(self, linear: Projection) -> None:
        device = linear.weight.device
        self.device = torch.device("cpu") if device.type == "mps" else device
        self.bias, self.count = linear.bias is not None, 0
        self.sum = torch.zeros(inputs_of(linear), inputs_of(linear), dtype=torch.float64, device=self.device)

    def add(self, x: Tensor) -> None:
        """Add features, `(tokens, width)`."""
        self.count += len(x)
        for part in torch.split(x, _ROWS):
            rows = part.to(self.device).double()
            rows = F.pad(rows, (0, 1), value=1.0) if self.bias else rows
            self.sum.addmm_(rows.t(), rows)


@dataclass(frozen=True)
class Protected:
    """What a linear map has to go on doing.

    Attributes:
        basis: U, the directions of its inputs in which it stays, that of its bias last; `(inputs, dimensions)` in fp64,
            with orthonormal columns.
        response: what it makes of them, [W, b]·U, `(outputs, dimensions)` in fp64.
        shares: of each task, the part of its features' energy that lies inside.
    """

    basis: Tensor
    response: Tensor
    shares: tuple[float, ...] = ()

    @classmethod
    def of(cls, linear: Projection, basis: Tensor | None = None, shares: tuple[float, ...] = ()) -> Protected:
        """Protect a map as it is, in no direction without a basis."""
        basis = torch.zeros(inputs_of(linear), 0, dtype=torch.float64) if basis is None else basis
        return cls(basis, _matrix(linear).cpu().double() @ basis, shares)

    @property
    def left(self) -> int:
        """How many dimensions lie outside."""
        return self.basis.shape[0] - self.basis.shape[1]

    def grown(self, linear: Projection, moment: Tensor, energy: float) -> Protected:
        """Protect a map for one more task too; in directions that were protected before, as it was then."""
        basis = extended(self.basis, moment, energy)
        new = _matrix(linear).cpu().double() @ basis[:, self.basis.shape[1] :]
        return Protected(basis, torch.cat([self.response, new], dim=1), (*self.shares, share_inside(basis, moment)))

    def strayed(self, linear: Projection) -> float:
        """Return how far a map is from what it has to do, relative to its size."""
        matrix = _matrix(linear).cpu().double()
        return float((matrix @ self.basis - self.response).norm() / matrix.norm().clamp_min(1e-30))


def share_inside(basis: Tensor, moment: Tensor) -> float:
    """Return the part of the energy of features with the second moment M that lies inside, tr(UᵀMU) / tr(M)."""
    total = float(moment.trace())
    return _energy_inside(basis.to(moment), moment) / total if total else 1.0


def extended(basis: Tensor, moment: Tensor, energy: float) -> Tensor:
    """Return the basis of the smallest space around another that holds `energy` of a task's energy (GPM).

    What the space holds already counts; what is missing is taken from the rest, in the order of its eigenvalues. An
    energy of 1 takes all that the numbers can tell from zero: eigenvalues above what fp32 (of the features) and fp64
    (of their sum) resolve, the larger of ε₃₂² and inputs·ε₆₄ times the largest.
    """
    inner, left = basis.to(moment), basis.shape[0] - basis.shape[1]
    total, inside = float(moment.trace()), _energy_inside(inner, moment)
    if not total or not left:
        return basis
    outside = moment - inner @ (inner.t() @ moment)
    outside = outside - (outside @ inner) @ inner.t()
    values, vectors = torch.linalg.eigh((outside + outside.t()) / 2)
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
    largest = float(torch.linalg.eigvalsh(moment)[-1] if inner.shape[1] else values[0])
    tolerance = max(torch.finfo(torch.float32).eps ** 2, len(moment) * torch.finfo(torch.float64).eps)
    resolved = int((values > tolerance * largest).sum())
    before = inside + values.cumsum(0) - values  # what is inside before each direction is added
    needed = resolved if energy == 1 else int((before < energy * total * (1 - _SLACK)).sum())
    more = vectors[:, : min(needed, resolved, left)]
    for _ in range(2):  # once leaves what rounding leaves
        more = torch.linalg.qr(more - inner @ (inner.t() @ more)).Q
    return torch.cat([inner, more], dim=1).cpu()


def _energy_inside(basis: Tensor, moment: Tensor) -> float:
    return float(((moment @ basis) * basis).sum())


class Protection:
    """Stand behind every step of an optimizer, until `remove` or the end of a `with`.

    Projecting every update onto what lies outside U is keeping [W, b]·U where it was; it is done in this form, since
    then rounding does not add up from step to step. What others write between two steps, as when weights are loaded, is
    no update: where it leaves what is protected, that is what the map does from then on, and a warning is given.
    `protected` is looked up in every step, so that it may grow.

    Attributes:
        active: whether it has not been removed.
    """

    def __init__(
        self, optimizer: Optimizer, linears: Mapping[str, Projection], protected: MutableMapping[str, Protected]
    ) -> None:
        self._linears, self._protected = linears, protected
        self._near: dict[str, tuple[Protected, Tensor, Tensor]] = {}
        self._left: dict[str, list[tuple[int, int]]] = {}  # the marks of a map as the last step left it
        self.active = True
        self._handles = [
            optimizer.register_step_pre_hook(self._notice),
            optimizer.register_step_post_hook(self._correct),
        ]

    def remove(self) -> None:
        """Let the optimizer go where it likes again."""
        for handle in self._handles:
            handle.remove()
        self.active = False
        self._near.clear()

    def __enter__(self) -> Protection:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def _notice(self, *_: Any) -> None:
        """Before a step: warn of what was changed by others since the last one, beyond what a type can round."""
        strayed = []
        for name, linear in self._linears.items():
            known, limit = self._protected[name], max(_STRAYED, 4 * torch.finfo(linear.weight.dtype).eps)
            if self._left.get(name) != _marks(linear) and known.strayed(linear) > limit:
                strayed.append(name)
                self._protected[name] = Protected.of(linear, known.basis, known.shares)
        if strayed:
            warnings.warn(
                f"weights were changed in protected directions by something else than this optimizer, at "
                f"{some(strayed)}: earlier tasks are changed already, and what these weights do now is protected. "
                "Train under `protect` from the first observed task on, and load the weights that it was observed "
                "with.",
                stacklevel=2,
            )

    @torch.no_grad()
    def _correct(self, *_: Any) -> None:
        """After a step: put back what it moved in protected directions."""
        for name, linear in self._linears.items():
            matrix, protected = _matrix(linear), self._protected[name]
            known, basis, response = self._near.get(name, (None, matrix, matrix))
            if known is not protected or basis.device != matrix.device:  # brought to the map's device once
                basis, response = protected.basis.to(matrix), protected.response.to(matrix)
                self._near[name] = protected, basis, response
            if basis.shape[1]:
                matrix = matrix - (matrix @ basis - response) @ basis.t()
                linear.weight.copy_(matrix[:, : linear.in_features])
                if linear.bias is not None:
                    linear.bias.copy_(matrix[:, -1])
            self._left[name] = _marks(linear)


def inputs_of(linear: Projection) -> int:
    """Return the inputs of a map; a bias is one more, which is always 1."""
    return linear.in_features + (linear.bias is not None)


def unwrapped(optimizer: object) -> Optimizer:
    """Return the torch optimizer in another one's `optimizer`, as accelerate wraps it, or raise if there is none."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = inner
    if not isinstance(optimizer, Optimizer):
        raise SteerError(f"what is protected from is a torch.optim.Optimizer; received {type(optimizer).__name__}.")
    return optimizer


def _marks(linear: Projection) -> list[tuple[int, int]]:
    """Return what changes when somebody writes to a map's parameters, or puts others in their place."""
    return [(parameter.data_ptr(), version(parameter)) for parameter in linear.parameters()]


@torch.no_grad()
def _matrix(linear: Projection) -> Tensor:
    """Return [W, b], `(outputs, inputs)`; in fp64 where the device has it."""
    weight = linear.weight
    dtype = torch.float32 if weight.device.type == "mps" else torch.float64
    parts = [weight] if linear.bias is None else [weight, linear.bias[:, None]]
    return torch.cat([part.to(dtype) for part in parts], dim=1)
