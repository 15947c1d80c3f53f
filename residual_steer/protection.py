"""Holding linear maps still in some directions while an optimizer moves them in the others (eq. 6).

The update is projected, not the gradient: an optimizer that scales coordinates one by one, and weight decay, would
leave the null space again.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .errors import SteerError
from .subspace import Subspace

__all__ = ["Held", "Protection", "inputs_of", "unwrapped"]

_STRAYED = 1e-4  # relative to [W, b]: far above what fp32 rounds, far below what training does


@dataclass(frozen=True)
class Held:
    """What a linear map has to go on doing.

    Attributes:
        space: the directions U of its inputs in which it is held, that of its bias last.
        response: what it makes of them, [W, b]·U, `(outputs, dimensions)` in fp64.
    """

    space: Subspace
    response: Tensor

    @classmethod
    def of(cls, linear: nn.Linear, space: Subspace) -> Held:
        """Hold a map as it is."""
        return cls(space, (_matrix(linear).cpu().double() @ space.basis))

    def extended(self, linear: nn.Linear, space: Subspace) -> Held:
        """Hold a map in more directions; in those that were held before, as it was then."""
        new = Held.of(linear, Subspace(space.basis[:, self.response.shape[1] :]))
        return Held(space, torch.cat([self.response, new.response], dim=1))

    def strayed(self, linear: nn.Linear) -> float:
        """Return how far a map is from what it is held to, relative to its size."""
        matrix = _matrix(linear).cpu().double()
        return float((matrix @ self.space.basis - self.response).norm() / matrix.norm().clamp_min(1e-30))

    def lost(self, linear: nn.Linear) -> bool:
        """Say whether a map is further from what it is held to than its type can round."""
        return self.strayed(linear) > max(_STRAYED, 4 * torch.finfo(linear.weight.dtype).eps)


def inputs_of(linear: nn.Linear) -> int:
    """Return the inputs of a map; a bias is one more, which is always 1."""
    return linear.in_features + (linear.bias is not None)


def unwrapped(optimizer: object) -> Optimizer:
    """Return the torch optimizer in another one's `optimizer`, as accelerate wraps it.

    Raises:
        SteerError: there is none.
    """
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = inner
    if not isinstance(optimizer, Optimizer):
        raise SteerError(f"what is protected from is a torch.optim.Optimizer; received {type(optimizer).__name__}.")
    return optimizer


class Protection:
    """Stand behind every step of an optimizer, until `remove` or the end of a `with`.

    Projecting every update onto what lies outside U is keeping [W, b]·U where it was; it is done in this form, since
    then rounding does not add up from step to step. What others write between two steps, as when weights are loaded, is
    no update: where it leaves what is held, that is what the map does from then on, and a warning says so.

    Args:
        optimizer: whose steps are corrected, after its own scaling and weight decay.
        linears: the maps, by the names of their points.
        held: what is held of each; looked up in every step, so that it may grow.
    """

    def __init__(self, optimizer: Optimizer, linears: Mapping[str, nn.Linear], held: MutableMapping[str, Held]) -> None:
        self._linears, self._held = linears, held
        self._near: dict[str, tuple[Held, Tensor, Tensor]] = {}
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
        """Say whether it stands behind this optimizer now."""
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

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End it."""
        self.remove()

    def _notice(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        written = [name for name, linear in self._linears.items() if self._left.get(name) != _marks(linear)]
        strayed = [name for name in written if self._held[name].lost(self._linears[name])]
        for name in strayed:
            self._held[name] = Held.of(self._linears[name], self._held[name].space)
        if strayed:
            told = ", ".join(strayed[:6]) + (", …" if len(strayed) > 6 else "")
            warnings.warn(
                f"weights were changed in protected directions by something else than this optimizer, at {told}: "
                "earlier tasks are changed already, and what these weights do now is held. Train under `protect` from "
                "the first observed task on, and load the weights that it was observed with.",
                stacklevel=2,
            )

    @torch.no_grad()
    def _correct(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
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
        held = self._held[name]
        known, basis, response = self._near.get(name, (None, matrix, matrix))
        if known is not held or basis.device != matrix.device:
            basis, response = held.space.basis.to(matrix), held.response.to(matrix)
            self._near[name] = held, basis, response
        return basis, response


def _marks(linear: nn.Linear) -> list[tuple[int, int]]:
    """Return what changes when somebody writes to a map's parameters, or puts others in their place."""
    return [(parameter.data_ptr(), parameter._version) for parameter in linear.parameters()]


@torch.no_grad()
def _matrix(linear: nn.Linear) -> Tensor:
    """Return [W, b], `(outputs, inputs)`; in fp64 where the device has it."""
    weight = linear.weight
    dtype = torch.float32 if weight.device.type == "mps" else torch.float64
    parts = [weight] if linear.bias is None else [weight, linear.bias[:, None]]
    return torch.cat([part.to(dtype) for part in parts], dim=1)
