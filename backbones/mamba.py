"""Selective state-space models: transformers' Mamba, Mamba2 and FalconMamba, and `mamba_ssm`'s MambaLMHeadModel.

In transformers a block maps the stream to the stream. In `mamba_ssm` a block takes and returns the pair
`(hidden, residual)`, whose SUM is the stream, so that addition and normalisation can be fused.
"""

import importlib.util
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from residual_steer.backbone import Backbone
from residual_steer.registry import register_backbone


@register_backbone(
    "mamba",
    matches=[
        "transformers.MambaModel",
        "transformers.Mamba2Model",
        "transformers.FalconMambaModel",
        "mamba_ssm.MixerModel",
    ],
)
def mamba(model: nn.Module) -> Backbone:
    """Describe transformers' stacks, or that of `mamba_ssm` with Mamba-1 or Mamba-2 mixers and, maybe, MLPs."""
    if not hasattr(model, "embedding"):  # transformers calls it `embeddings`
        return Backbone(blocks=model.layers, width=model.config.hidden_size, mixer="mixer", prepare=_scan_linearly)
    return Backbone(
        blocks=model.layers,
        width=model.embedding.embedding_dim,
        mixer="mixer",
        mlp="mlp",
        read=_read_pair,
        write=_write_pair,
        leave=_leave_pair,
    )


def _read_pair(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """Return hidden + residual, the stream that enters a `mamba_ssm` block; the first block has no residual yet."""
    hidden, residual = (*args, None, None)[:2]
    hidden = kwargs.get("hidden_states", hidden)
    residual = kwargs.get("residual", residual)
    return hidden if residual is None else hidden + residual


def _write_pair(output: tuple[Tensor, Tensor], f: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Move the sum by moving the residual, which is the half that is kept in fp32."""
    hidden, residual = output
    return hidden, f(residual)


def _leave_pair(output: tuple[Tensor, Tensor]) -> Tensor:
    """Return hidden + residual, the stream that leaves a `mamba_ssm` block."""
    hidden, residual = output
    return hidden + residual


def _scan_linearly(blocks: Sequence[nn.Module]) -> list[RemovableHandle]:
    """Train transformers' Mamba without CUDA kernels through mambapy's parallel scan, in linear time and memory.

    The fallback of transformers walks the sequence step by step, and its backward pass grows with the square of the
    length. In evaluation mode the model's own path is kept, so that its output stays the same to the last bit; and in a
    model with half-precision weights too, since transformers' call of mambapy fails on those.
    """
    mixers = [block.mixer for block in blocks if getattr(block.mixer, _flag(block.mixer), None) is False]
    if not mixers:  # Mamba2 scans in chunks, and who set the flag wants the scan everywhere
        return []
    if importlib.util.find_spec("mambapy") is None:
        if next(mixers[0].parameters()).device.type == "cpu":
            warnings.warn(
                "training transformers' Mamba on a CPU takes time and memory that grow with the square of the length. "
                "Install mambapy for a linear scan: pip install 'residual-steer[cpu-mamba]'.",
                stacklevel=5,
            )
        return []
    handles = []
    for mixer in mixers:
        handles.append(mixer.register_forward_pre_hook(_enter_scan))
        handles.append(mixer.register_forward_hook(_leave_scan, always_call=True))
    return handles


def _enter_scan(mixer: nn.Module, args: tuple[Any, ...]) -> None:
    half = mixer.in_proj.weight.dtype in (torch.bfloat16, torch.float16)
    if mixer.training and not half:
        setattr(mixer, _flag(mixer), True)


def _leave_scan(mixer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    if mixer.training:
        setattr(mixer, _flag(mixer), False)


def _flag(mixer: nn.Module) -> str:
    """Name the switch of a mixer; FalconMamba's had one of its own in earlier releases of transformers 5."""
    return "use_falcon_mambapy" if hasattr(mixer, "use_falcon_mambapy") else "use_mambapy"
