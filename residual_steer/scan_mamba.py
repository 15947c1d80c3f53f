"""How transformers' Mamba, FalconMamba and Jamba train on a CPU: through our own selective scan.

Without CUDA kernels, transformers walks the sequence step by step, and autograd keeps every step: the backward pass
grows with the square of the length. Here a mixer in training mode takes time and memory that grow with the length. In
evaluation mode, with a cache, or on another device its own forward pass runs, so that its output stays the same to the
last bit.
"""

import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._caches import cache_of

_PARTS = ("in_proj", "conv1d", "x_proj", "dt_proj", "out_proj", "act", "A_log", "D", "time_step_rank", "ssm_state_size")
_FLAGS = ("use_mambapy", "use_falcon_mambapy")  # who sets one wants mambapy's scan
_MARK = "_scans_linearly"  # on a mixer that is to scan so


class _Replaced:
    """A forward pass that stands in the place of a mixer's own, until `remove`."""

    def __init__(self, mixer: nn.Module) -> None:
        self._mixer = mixer
        # a partial, whose copies and pickles follow those of the mixer
        self._forward = mixer.__dict__["forward"] = partial(_forward, mixer)
        mixer.__dict__[_MARK] = True

    def remove(self) -> None:
        """Let the mixer's own forward pass run again, even where another library has wrapped ours."""
        self._mixer.__dict__.pop(_MARK, None)
        if self._mixer.__dict__.get("forward") is self._forward:
            del self._mixer.__dict__["forward"]


def scan_linearly(blocks: Sequence[nn.Module]) -> list[_Replaced]:
    """Let the mixers of blocks train through the linear scan; those that compute something else stay as they are."""
    return [_Replaced(module) for block in blocks for module in block.modules() if _is_known(module)]


def _is_known(mixer: Any) -> bool:
    """Say whether `_forward` computes what a mixer does: not Mamba2's, and not a quantized one's."""
    theirs = type(mixer).__module__.startswith("transformers.") and all(hasattr(mixer, part) for part in _PARTS)
    if not theirs or "forward" in mixer.__dict__ or mixer.dt_proj.bias is None:
        return False
    if hasattr(getattr(mixer, "config", None), "_is_quantized"):
        return False
    return hasattr(mixer, "dt_layernorm") or not hasattr(mixer, "rms_eps")  # an older FalconMamba normalises otherwise


def _forward(mixer: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Return what leaves a mixer, `(batch, length, width)`: Mamba's block (figure 3 of the paper)."""
    if not _scans(mixer, hidden_states, args, kwargs):
        own: Tensor = type(mixer).forward(mixer, hidden_states, *args, **kwargs)
        return own
    from .scan import selective_scan  # whose registration with torch takes as long as all families together

    length, dtype, mask = hidden_states.shape[1], hidden_states.dtype, kwargs.get("attention_mask")
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


def _scans(mixer: Any, hidden_states: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Say whether a call is one of training on a CPU, without anything that the linear scan has no place for."""
    if not mixer.training or _MARK not in mixer.__dict__ or hidden_states.device.type != "cpu":
        return False
    if cache_of(kwargs) is not None:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            warnings.warn(
                f"this {type(mixer).__name__} trains with a cache, step by step and in time that grows with the square "
                "of the length. Set model.config.use_cache = False for a linear scan.",
                stacklevel=2,
            )
        return False
    others = any(value is not None for name, value in kwargs.items() if name != "attention_mask")
    wrapped = hasattr(mixer.conv1d, "_hf_hook") or hasattr(mixer.dt_proj, "_hf_hook")  # whose weights are elsewhere
    return not (args or others or wrapped or any(getattr(mixer, flag, False) for flag in _FLAGS))


def _without_padding(x: Tensor, mask: Tensor | None) -> Tensor:
    """Set the tokens of padding to zero, `(batch, length, ...)`."""
    return x if mask is None else (x * mask[:, :, None]).to(x.dtype)
