"""Directions that hold the energy of features, and linear maps that an optimizer moves in all others (eq. 6).

The rule by which directions are added, task after task, is that of gradient projection memory (Saha et al. 2021, arXiv
2103.09762), on covariances as in Adam-NSCL (Wang et al. 2021, arXiv 2103.07113), which need no stored features. The
update is projected, not the gradient: an optimizer that scales coordinates one by one, and weight decay, would leave
the null space again.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Optimizer

from ._internals import version
from .errors import SteerError
from .field import Projection

__all__ = ["Protected", "Protection", "SecondMoment", "Subspace", "inputs_of", "listed", "unwrapped"]

_ROWS = 8192  # that are taken to fp64 at a time
_SLACK = 1e-12  # by which a sum of shares may miss what it adds up to
_STRAYED = 1e-4  # relative to [W, b]: far above what fp32 rounds, far below what training does


class SecondMoment:
    """Σ x xᵀ of the features x that went by, uncentred; nothing else of them is kept.

    Args:
        linear: the map that they enter; where it has a bias, a 1 is put behind every x. The sum is in fp64, and so on
            the CPU for a device that has none.
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
class Subspace:
    """A space of directions, and what lies outside of it.

    Attributes:
        basis: U, `(inputs, dimensions)` in fp64, with orthonormal columns.
    """

    basis: Tensor

    @classmethod
    def nothing(cls, inputs: int) -> Subspace:
        """Return the space without a direction."""
        return cls(torch.zeros(inputs, 0, dtype=torch.float64))

    @property
    def left(self) -> int:
        """How many dimensions lie outside."""
        return self.basis.shape[0] - self.basis.shape[1]

    def share(self, moment: Tensor) -> float:
        """Return the part of the energy of features with the second moment M that lies inside, tr(UᵀMU) / tr(M)."""
        total = float(moment.trace())
        return _energy_inside(self.basis.to(moment), moment) / total if total else 1.0

    def extend(self, moment: Tensor, energy: float) -> Subspace:
        """Return the smallest space around this one that holds `energy` of the features' energy.

        What the space holds already counts. What is missing is taken from the rest, in the order of its eigenvalues.

        Args:
            moment: M, `(inputs, inputs)`, the second moment of a task's features.
            energy: from 0 to 1; 1 takes all that the numbers can tell from zero: eigenvalues above what fp32 (of the
                features) and fp64 (of their sum) resolve, the larger of ε₃₂² and inputs·ε₆₄ times the largest.
        """
        basis = self.basis.to(moment)
        total, inside = float(moment.trace()), _energy_inside(basis, moment)
        if not total or not self.left:
            return self
        outside = moment - basis @ (basis.t() @ moment)
        outside = outside - (outside @ basis) @ basis.t()
        values, vectors = torch.linalg.eigh((outside + outside.t()) / 2)
        values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
        largest = float(values[0] if not basis.shape[1] else torch.linalg.eigvalsh(moment)[-1])
        tolerance = max(torch.finfo(torch.float32).eps ** 2, len(moment) * torch.finfo(torch.float64).eps)
        resolved = int((values > tolerance * largest).sum())
        before = inside + values.cumsum(0) - values  # what is inside before each direction is added
        needed = resolved if energy == 1 else int((before < energy * total * (1 - _SLACK)).sum())
        more = vectors[:, : min(needed, resolved, self.left)]
        for _ in range(2):  # once leaves what rounding leaves
            more = torch.linalg.qr(more - basis @ (basis.t() @ more)).Q
        return Subspace(torch.cat([basis, more], dim=1).cpu())


def _energy_inside(basis: Tensor, moment: Tensor) -> float:
    return float(((moment @ basis) * basis).sum())


@dataclass(frozen=True)
class Protected:
    """What a linear map has to go on doing.

    Attributes:
        space: the directions U of its inputs in which it stays, that of its bias last.
        response: what it makes of them, [W, b]·U, `(outputs, dimensions)` in fp64.
    """

    space: Subspace
    response: Tensor

    @classmethod
    def of(cls, linear: Projection, space: Subspace) -> Protected:
        """Protect a map as it is."""
        return cls(space, (_matrix(linear).cpu().double() @ space.basis))

    def extended(self, linear: Projection, space: Subspace) -> Protected:
        """Protect a map in more directions; in those that were protected before, as it was then."""
        new = Protected.of(linear, Subspace(space.basis[:, self.response.shape[1] :]))
        return Protected(space, torch.cat([self.response, new.response], dim=1))

    def strayed(self, linear: Projection) -> float:
        """Return how far a map is from what it has to do, relative to its size."""
        matrix = _matrix(linear).cpu().double()
        return float((matrix @ self.space.basis - self.response).norm() / matrix.norm().clamp_min(1e-30))

    def lost(self, linear: Projection) -> bool:
        """Return whether a map is further from what it has to do than its type can round."""
        return self.strayed(linear) > max(_STRAYED, 4 * torch.finfo(linear.weight.dtype).eps)


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


def listed(keys: list[str]) -> str:
    """Return a few of some keys, and how many more there are."""
    return ", ".join(keys[:6]) + (f" and {len(keys) - 6} more" if len(keys) > 6 else "")


class Protection:
    """Stand behind every step of an optimizer, until `remove` or the end of a `with`.

    Projecting every update onto what lies outside U is keeping [W, b]·U where it was; it is done in this form, since
    then rounding does not add up from step to step. What others write between two steps, as when weights are loaded, is
    no update: where it leaves what is protected, that is what the map does from then on, and a warning is given.

    Args:
        optimizer: whose steps are corrected, after its own scaling and weight decay.
        linears: the maps, by the names of their points.
        protected: what is protected of each; looked up in every step, so that it may grow.
    """

    def __init__(
        self, optimizer: Optimizer, linears: Mapping[str, Projection], protected: MutableMapping[str, Protected]
    ) -> None:
        self._linears, self._protected = linears, protected
        self._near: dict[str, tuple[Protected, Tensor, Tensor]] = {}
        self._left: dict[str, list[tuple[int, int]]] = {}  # the marks of a map as the last step left it
        self._optimizer: Callable[[], Optimizer | None] = weakref.ref(optimizer)
        self._handles = [
            optimizer.register_step_pre_hook(self._notice),
            optimizer.register_step_post_hook(self._correct),
        ]

    @property
    def active(self) -> bool:
        """Whether it has not been removed, and the optimizer is still there."""
        return self._optimizer() is not None

    def covers(self, optimizer: Optimizer) -> bool:
        """Return whether it stands behind this optimizer now."""
        return self._optimizer() is optimizer

    def remove(self) -> None:
        """Let the optimizer go where it likes again."""
        for handle in self._handles:
            handle.remove()
        self._optimizer = lambda: None
        self._near.clear()

    def __enter__(self) -> Protection:
        """Protect until the end of the `with`; it has begun already."""
        return self

    def __exit__(self, *_: object) -> None:
        """End it."""
        self.remove()

    def _notice(self, *_: Any) -> None:
        """Before a step: warn of what was changed by others since the last one."""
        written = [name for name, linear in self._linears.items() if self._left.get(name) != _marks(linear)]
        strayed = [name for name in written if self._protected[name].lost(self._linears[name])]
        for name in strayed:
            self._protected[name] = Protected.of(self._linears[name], self._protected[name].space)
        if strayed:
            warnings.warn(
                f"weights were changed in protected directions by something else than this optimizer, at "
                f"{listed(strayed)}: earlier tasks are changed already, and what these weights do now is protected. "
                "Train under `protect` from the first observed task on, and load the weights that it was observed "
                "with.",
                stacklevel=2,
            )

    @torch.no_grad()
    def _correct(self, *_: Any) -> None:
        """After a step: put back what it moved in protected directions."""
        for name, linear in self._linears.items():
            matrix = _matrix(linear)
            basis, response = self._beside(name, matrix)
            if basis.shape[1]:
                matrix = matrix - (matrix @ basis - response) @ basis.t()
                linear.weight.copy_(matrix[:, : linear.in_features])
                if linear.bias is not None:
                    linear.bias.copy_(matrix[:, -1])
            self._left[name] = _marks(linear)

    def _beside(self, name: str, matrix: Tensor) -> tuple[Tensor, Tensor]:
        """Return U and the response on the device of the map, which is moved at most once."""
        protected = self._protected[name]
        known, basis, response = self._near.get(name, (None, matrix, matrix))
        if known is not protected or basis.device != matrix.device:
            basis, response = protected.space.basis.to(matrix), protected.response.to(matrix)
            self._near[name] = protected, basis, response
        return basis, response


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
