"""Swin Transformers, v1 and v2, of timm and transformers, and GC ViT: stages, between which the width doubles.

The stream is `(batch, height, width, channels)` in timm and `(batch, length, channels)` in transformers; either way the
channels come last. The mixer sees windows, those of one image next to one another.
"""

from torch import nn

from residual_steer.backbone import Backbone, blocks_at, first_of, parts
from residual_steer.registry import register_backbone


@register_backbone(
    "swin",
    matches=[
        "timm.SwinTransformer",
        "timm.SwinTransformerV2",
        "timm.GlobalContextVit",
        "transformers.SwinModel",
        "transformers.Swinv2Model",
        "transformers.DonutSwinModel",
    ],
)
def swin(model: nn.Module) -> Backbone:
    """Describe the blocks of all stages; the merging of patches between stages changes the width and is no block."""
    blocks = [block for stage in blocks_at(model, "layers", "encoder.layers", "stages") for block in stage.blocks]
    norms = [first_of(block, "norm1", "layernorm_before") for block in blocks]
    return Backbone(
        blocks=blocks,
        width=[norm.normalized_shape[0] for norm in norms],
        mixer=parts(blocks, "attn", "attention"),
        mlp=parts(blocks, "mlp"),
    )
