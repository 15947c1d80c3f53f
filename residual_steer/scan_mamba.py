"""How transformers' Mamba, FalconMamba and Jamba train on a CPU: through our own selective scan.

Without CUDA kernels, transformers walks the sequence step by step, and its backward pass grows with the square of the
length; this one grows with the length. In evaluation mode, with a cache, or on another device the mixer's own forward
pass runs, so that its output stays the same to the last bit.
"""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._caches import cache_of

_PARTS = ("in_proj", "conv1d", "x_proj", "dt_proj", "out_proj", "act", "A_log", "D", "time_step_rank", "ssm_state_size")
_FLAGS = ("use_mambapy", "use_falcon_mambapy")  # who sets one wants mambapy's scan


class _LinearScan:
    """A mixer's `forward` until `remove`: the linear scan where it can be, else the forward pass of its class."""

    def __init__(self, mixer: nn.Module) -> None:
        self._mixer: Any = mixer
        self._on = True
        # on the mixer it follows every copy; on its class it would reach every Mamba of the process
        self._mixer.forward = self

    def remove(self) -> None:
        """Let the forward pass of the mixer's class run again, even where another library has wrapped this one."""
        self._on = False
        if vars(self._mixer).get("forward") is self:
            del self._mixer.forward

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        mixer = self._mixer
        if self._on and not args and _can_scan(mixer, hidden_states, kwargs):
            return _scan(mixer, hidden_states, kwargs.get("attention_mask"))
        return type(mixer).forward(mixer, hidden_states, *args, **kwargs)  # type: ignore[no-any-return]


def scan_linearly(blocks: Sequence[nn.Module]) -> list[_LinearScan]:
    """Let the mixers of blocks train through the linear scan; those that compute something else stay as they are."""
    return [_LinearScan(module) for block in blocks for module in block.modules() if _is_known(module)]


def _is_known(mixer: Any) -> bool:
    """Return whether `_scan` computes what a mixer does: not Mamba2's, nor one whose forward is replaced already."""
    theirs = type(mixer).__module__.startswith("transformers.") and all(hasattr(mixer, part) for part in _PARTS)
    if not theirs or "forward" in vars(mixer) or mixer.dt_proj.bias is None:
        return False
    return hasattr(mixer, "dt_layernorm") or not hasattr(mixer, "rms_eps")  # an older FalconMamba normalises otherwise


def _scan(mixer: Any, hidden_states: Tensor, mask: Tensor | None) -> Tensor:
    """Return what leaves a mixer, `(batch, length, width)`: Mamba's block (figure 3 of the paper)."""
    from .scan import selective_scan  # whose registration with torch takes as long as all families together

    length, dtype = hidden_states.shape[1], hidden_states.dtype
    x, gate = mixer.in_proj(_without_padding(hidden_states, mask)).chunk(2, dim=-1)
    kernel, width = mixer.conv1d.weight, mixer.conv1d.kernel_size[0]  # not called, as in transformers
    x = x.transpose(1, 2).to(kernel.dtype)
    x = F.conv1d(x, kernel, mixer.conv1d.bias, padding=width - 1, groups=x.shape[1])[..., :length]
    x = _without_padding(mixer.act(x).to(gate.dtype).transpose(1, 2), mask)
    ranks = [mixer.time_step_rank, mixer.ssm_state_size, mixer.ssm_state_size]
    delta, B, C = mixer.x_proj(x).split(ranks, dim=-1)
    if hasattr(mixer, "dt_layernorm"):  # FalconMamba and Jamba
        delta, B, C = mixer.dt_layernorm(delta), mixer.b_layernorm(B), mixer.c_layernorm(C)
    delta = F.softplus(F.linear(delta, mixer.dt_proj.weight).float() + mixer.dt_proj.bias.float())
    y = selective_scan(x, delta, -mixer.A_log.float().exp(), B, C)
    left: Tensor = mixer.out_proj(((y + x * mixer.D.float()) * F.silu(gate)).to(dtype))
    return left


def _can_scan(mixer: Any, hidden_states: Tensor, kwargs: dict[str, Any]) -> bool:
    """Return whether a call is one of training on a CPU, with nothing that the linear scan has no place for."""
    if not mixer.training or hidden_states.device.type != "cpu":
        return False
    if cache_of(kwargs) is not None:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            warnings.warn(
                f"this {type(mixer).__name__} trains with a cache, step by step and in time that grows with the square "
                "of the length. Set model.config.use_cache = False for a linear scan.",
                stacklevel=2,
            )
        return False
    if any(value is not None for name, value in kwargs.items() if name != "attention_mask"):
        return False
    # `_scan` reads the weights of these without calling them, so that they must not be quantised nor offloaded
    read = ((mixer.conv1d, nn.Conv1d), (mixer.dt_proj, nn.Linear))
    plain = all(type(part) is kind and "forward" not in vars(part) for part, kind in read)
    return plain and not any(getattr(mixer, flag, False) for flag in _FLAGS)


def _without_padding(x: Tensor, mask: Tensor | None) -> Tensor:
    """Set the tokens of padding to zero, `(batch, length, ...)`."""
    return x if mask is None else (x * mask[:, :, None]).to(x.dtype)
