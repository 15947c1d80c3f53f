"""SSF (Lian et al. 2022, arXiv 2210.08823): scale and shift what leaves each norm and each linear layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from residual_steer.errors import UnsuitableError

from ._attach import Attached, Subject, Trained, is_linear, parts_of, place_of, require_free
from .selective import is_key

__all__ = ["ScaleShift", "ssf"]


class ScaleShift(Attached):
    """y ↦ γ·y + β (eq. 4) after a norm or a linear layer, in the parameters' type; γ = 1 and β = 0 at the start."""

    def __init__(self, host: Any, shift: bool, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        # of a linear layer, of GPT-2's `Conv1D`, of a norm
        features = getattr(host, "out_features", None) or getattr(host, "nf", None) or len(host.weight)
        self.scale = nn.Parameter(torch.ones(features, device=device, dtype=dtype))
        self.shift = nn.Parameter(torch.zeros(features, device=device, dtype=dtype)) if shift else None
        self._channels = 1 if type(host).__name__.endswith("2d") else -1
        self.attach(host, "scale_shift")

    def leave(self, host: nn.Module, output: Tensor, note: None) -> Tensor:
        """Scale and shift."""
        y = output.movedim(self._channels, -1).to(torch.promote_types(output.dtype, self.scale.dtype)) * self.scale
        y = y if self.shift is None else y + self.shift
        return y.to(output.dtype).movedim(-1, self._channels)


def ssf(subject: Subject, *, layers: Sequence[int] | None = None) -> Trained:
    """Scale and shift what is called inside the blocks, but for a shift of keys alone, which a softmax does not see."""
    parts = [part for part in parts_of(subject, layers, _takes_part) if part.remedy is None]
    if not parts:
        raise UnsuitableError(
            "'ssf' stands after norms and linear layers inside the blocks, and this model calls none there. Choose "
            "another method."
        )
    unique = {id(part.module): part for part in parts}.values()
    require_free((part.module for part in unique), "scale_shift")
    children = [ScaleShift(x.module, not is_key(subject, x.name), *place_of(x.module)) for x in unique]
    return Trained([p for child in children for p in child.parameters()], called=[part.name for part in parts])


def _takes_part(module: nn.Module) -> bool:
    """Return whether a module is a linear layer, or a norm with a weight."""
    weight = getattr(module, "weight", None)
    leaf = isinstance(weight, nn.Parameter) and weight.dim() == 1 and not list(module.children())
    return is_linear(module) or (leaf and "norm" in type(module).__name__.lower())
