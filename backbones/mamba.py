"""Selective state-space models: transformers' Mamba, Mamba2 and FalconMamba, and `mamba_ssm`'s MambaLMHeadModel.

In transformers a block maps the stream to the stream. In `mamba_ssm` a block takes and returns the pair
`(hidden, residual)`, whose SUM is the stream, so that addition and normalisation can be fused.
"""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from residual_steer.backbone import Backbone
from residual_steer.registry import register_backbone
from residual_steer.scan_mamba import scan_linearly


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
        return Backbone(blocks=model.layers, width=model.config.hidden_size, mixer="mixer", prepare=scan_linearly)
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
