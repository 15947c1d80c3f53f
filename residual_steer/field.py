"""H-Res, one steering field: a zero-initialised bottleneck over the residual stream (arXiv 2606.24396, eq. 2 and 5).

It is the map of the parallel adapter of He et al. 2022 (arXiv 2110.04366), read from and written to the stream.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._checks import check_choice, check_flag, check_integer, check_number, is_tracing
from ._internals import is_plainly_called

__all__ = ["ACTIVATIONS", "HRes", "Projection", "add_product"]

_FEW = 1024  # numbers


def _gelu(x: Tensor) -> Tensor:
    """GELU; past oneDNN for few numbers on a CPU, whose call then takes longer than all else that a field does."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or is_tracing():
        return F.gelu(x)
    few = x.numel() <= _FEW and x.dtype == torch.float32 and x.device.type == "cpu"
    return F.gelu(x.double()).float() if few else F.gelu(x)  # oneDNN leaves fp64 to torch


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": _gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
    "tanh": torch.tanh,
    "identity": torch.Tensor.clone,
}


class Projection(nn.Module):
    """A linear map x ↦ W·x + b, `(..., inputs) -> (..., outputs)`, one of the two of a field.

    W starts at `zero` (eq. 5) or as in `nn.Linear`, b at zero. It is no `nn.Linear`: what other libraries do to every
    Linear of a model (quantise it, put LoRA on it, initialise it anew) is not meant for a field. Parameters that were
    made on the meta device start when they come to a real one.
    """

    def __init__(self, inputs: int, outputs: int, *, bias: bool, zero: bool, **factory: Any) -> None:
        super().__init__()
        self.in_features, self.out_features, self.zero, self._loading = inputs, outputs, zero, False
        self.weight = nn.Parameter(torch.empty(outputs, inputs, **factory))
        self.bias = nn.Parameter(torch.empty(outputs, **factory)) if bias else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Return to the start. The methods of tensors are used, since others switch `torch.nn.init` off."""
        bound = 0.0 if self.zero else 1 / math.sqrt(self.in_features)
        self.weight.uniform_(-bound, bound) if bound else self.weight.zero_()
        if self.bias is not None:
            self.bias.zero_()

    def forward(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Return W·x + b in `dtype` (None: the weight's)."""
        dtype = dtype or self.weight.dtype
        bias = self.bias
        return F.linear(_cast(x, dtype), _cast(self.weight, dtype), None if bias is None else _cast(bias, dtype))

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Take a parameter; one in the place of one on the meta device starts, unless it was read from a file.

        So transformers fills a model with room for what a checkpoint lacks; what it read is marked as initialised.
        """
        before = self.__dict__.get("_parameters", {}).get(name)
        super().register_parameter(name, param)
        read = self.__dict__.get("_loading") or getattr(param, "_is_hf_initialized", False)
        if before is not None and before.is_meta and param is not None and not param.is_meta and not read:
            self.reset_parameters()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._loading = True
        try:
            super()._load_from_state_dict(*args, **kwargs)
        finally:
            self._loading = False

    def _apply(self, fn: Any, recurse: bool = True) -> Projection:
        """Start when `to_empty` brings the parameters from the meta device to a real one."""
        weight = getattr(self, "weight", None)  # FSDP1 takes it away between two calls
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if weight is not None and weight.is_meta and not self.weight.is_meta:
            self.reset_parameters()
        return self

    def extra_repr(self) -> str:
        """Show the sizes."""
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"


class HRes(nn.Module):
    """The vector field H(z) = W_up · σ(W_down · z + b_down) + b_up, with W_up = 0 and b_up = 0 at the start (eq. 2, 5).

    It has `2·rank·width` weights and, with biases, `rank + width` more: 1,096 at width 64 and rank 8, which with a
    linear head for two classes gives the 1,226 of the paper's Table 2. At a linear map from `width` to `out_width`
    features it maps as that does, with `rank·(width + out_width)` weights and `rank + out_width` biases.

    Args:
        width: d, the features of the stream, or of what enters a linear map.
        rank: r, the width of the bottleneck, from 1 to `width`.
        scale: λ of eq. 1, used by `add_to`.
        activation: σ; one of `ACTIVATIONS`.
        bias: whether both projections have biases.
        dropout: probability with which a hidden unit is dropped in training mode.
        channels: which dimension of the stream is the width, -1 or 1.
        out_width: the features of H(z); None is `width`.
        device: where the parameters are made.
        dtype: their type. Keep fp32 beside a bf16 backbone: updates smaller than bf16 resolves are not lost.

    Raises:
        SteerError: an argument outside the ranges above.

    >>> field = HRes(width=64, rank=8)
    >>> field(torch.randn(2, 5, 64)).abs().max()        # (batch, length, width); zero until trained
    tensor(0., grad_fn=<MaxBackward1>)
    """

    def __init__(
        self,
        width: int,
        rank: int,
        *,
        scale: float = 1.0,
        activation: str = "gelu",
        bias: bool = True,
        dropout: float = 0.0,
        channels: int = -1,
        out_width: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.width = width = check_integer("width", width, 1)
        self.out_width = width if out_width is None else check_integer("out_width", out_width, 1)
        self.rank = rank = check_integer("rank", rank, 1, width, meaning="the width")
        self.scale = check_number("scale", scale)
        self.activation = check_choice("activation", activation, ACTIVATIONS)
        dropped = check_number("dropout", dropout, at_least=0, below=1, meaning="a probability")
        self.drop = nn.Dropout(dropped) if dropped else None  # a module, which others look for to switch it off
        self.channels = check_choice("channels", channels, (-1, 1))
        check_flag("bias", bias)
        self.down = Projection(width, rank, bias=bias, zero=False, device=device, dtype=dtype)
        self.up = Projection(rank, self.out_width, bias=bias, zero=True, device=device, dtype=dtype)

    def reset(self) -> None:
        """Return to the start: W_down as in `torch.nn.Linear`, everything else zero (eq. 5)."""
        self.down.reset_parameters()
        self.up.reset_parameters()

    @property
    def dropout(self) -> float:
        """The probability with which a hidden unit is dropped in training mode."""
        return 0.0 if self.drop is None else self.drop.p

    @property
    def plain(self) -> bool:
        """Whether the projections may be computed from their tensors, since calling them would do nothing else.

        Another library may have put a hook there: accelerate's brings offloaded weights, pruning computes the weight.
        """
        return is_plainly_called(self.down) and is_plainly_called(self.up)

    def hidden(self, z: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Return σ(W_down · z + b_down), `(..., width) -> (..., rank)`, in `dtype` (None: the weights')."""
        down = self.down  # once: finding a module's attributes takes as long as a small sum
        if is_plainly_called(down):
            weight, bias = down.weight, down.bias
            dtype = dtype or weight.dtype
            product = F.linear(_cast(z, dtype), _cast(weight, dtype), None if bias is None else _cast(bias, dtype))
        else:
            product = down(z, dtype)
        hidden = ACTIVATIONS[self.activation](product)
        dropped: Tensor = hidden if self.drop is None else self.drop(hidden)
        return dropped

    def forward(self, z: Tensor) -> Tensor:
        """Return H(z), of z's shape but for `out_width`, and in the weights' dtype."""
        z = z.movedim(self.channels, -1)
        steered: Tensor = self.up(self.hidden(z))
        return steered.movedim(-1, self.channels)

    def add_to(self, y: Tensor, z: Tensor, dtype: torch.dtype | None = None, weight: float = 1.0) -> Tensor:
        """Return y + weight·λ·H(z) in y's own dtype, computing H in `dtype` (eq. 1).

        Args:
            y: what is added to, `(batch, length, out_width)`, or `(batch, width, height, width)` in a ConvNet.
            z: what the field reads, `(batch, length, width)`, or of the same shape.
            dtype: what the frozen block computes in.
            weight: the field's coefficient in a mix.
        """
        hidden = self.hidden(z if self.channels == -1 else z.movedim(self.channels, -1), dtype)
        up = self.up
        if not is_plainly_called(up):
            moved = up(hidden, hidden.dtype).movedim(-1, self.channels)
            return torch.add(y, moved, alpha=self.scale * weight).to(y.dtype)
        return add_product(y, hidden, up.weight, up.bias, alpha=self.scale * weight, channels=self.channels)

    def extra_repr(self) -> str:
        """Show what the sub-modules' own lines do not."""
        return f"scale={self.scale:g}, activation={self.activation}, dropout={self.dropout:g}"


def add_product(
    y: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, *, alpha: float = 1.0, channels: int = -1
) -> Tensor:
    """Return y + alpha·(weight · hidden + bias) in y's dtype and memory layout.

    The sum is folded into the matrix product, and the bias takes the place of the copy that such a product would begin
    with, so that the stream is passed over as rarely as it can be. Across dtypes (an fp32 stream beside a bf16 block,
    autocast) and in other memory layouts the product is added after: what comes next would compute a stream of another
    layout with another kernel, which rounds differently.

    Args:
        y: the stream, its width in dimension `channels`, -1 or 1.
        hidden: `(..., rank)`, the width's place taken by the rank and put last.
        weight: `(width, rank)`.
        bias: `(width,)`, or `(rows, width)` with one for every row of the batch.
        alpha: a factor.
        channels: which dimension of y is the width.
    """
    width, rank = weight.shape
    by_row = bias is not None and bias.dim() == 2
    if bias is not None and by_row:
        bias = bias.view(-1, *[1] * (y.dim() - 2), width)
    if channels == 1 or not y.is_contiguous() or hidden.dtype != y.dtype or torch.is_autocast_enabled(y.device.type):
        bias = None if bias is None else bias.to(hidden.dtype)
        product = F.linear(hidden, weight.to(hidden.dtype), None if by_row else bias)
        product = product + bias if bias is not None and by_row else product
        return torch.add(y, product.movedim(-1, channels), alpha=alpha).to(y.dtype)
    hidden, weight = hidden.reshape(-1, rank), _cast(weight, y.dtype).t()
    if bias is None:
        return torch.addmm(y.view(-1, width), hidden, weight, alpha=alpha).view_as(y)
    bias = _cast(bias, y.dtype)
    moved = (
        torch.add(y, bias, alpha=alpha).view(-1, width) if by_row else torch.add(y.view(-1, width), bias, alpha=alpha)
    )
    return moved.addmm_(hidden, weight, alpha=alpha).view_as(y)


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a tensor in a dtype; to look first is faster than `to`, where nothing is to be done."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)
