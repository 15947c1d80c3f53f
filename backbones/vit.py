"""Vision Transformers: timm's VisionTransformer and EVA, transformers' ViT, DeiT, DINOv2 and CLIP vision tower."""

from torch import nn

from residual_steer.backbone import Backbone
from residual_steer.errors import SteerError
from residual_steer.registry import register_backbone


@register_backbone(
    "vit",
    matches=[
        "timm.VisionTransformer",
        "timm.Eva",
        "transformers.ViTModel",
        "transformers.DeiTModel",
        "transformers.Dinov2Model",
        "transformers.Dinov2Backbone",
        "transformers.CLIPVisionModel",
        "transformers.CLIPVisionTransformer",
    ],
)
def vit(model: nn.Module) -> Backbone:
    """Describe a stack of pre-norm encoder blocks over patch tokens."""
    blocks = _blocks(model)
    width = model.embed_dim if isinstance(getattr(model, "embed_dim", None), int) else model.config.hidden_size
    # timm's parallel blocks have several attentions, or one fused with the feed-forward: their site is the block
    mixer = next((name for name in ("attn", "attention", "self_attn") if hasattr(blocks[0], name)), None)
    return Backbone(blocks=blocks, width=width, mixer=mixer, mlp="mlp" if hasattr(blocks[0], "mlp") else None)


def _blocks(model: nn.Module) -> nn.ModuleList:
    """Find the list of blocks: timm's `blocks`, transformers' `layers` or, inside an encoder, `layer`.

    Raises:
        SteerError: the blocks are in none of these places.
    """
    for path in ("blocks", "layers", "encoder.layers", "encoder.layer", "vision_model.encoder.layers"):
        holder = model
        for part in path.split("."):
            holder = getattr(holder, part, None)
        if holder is not None:
            return holder
    raise SteerError(f"{type(model).__name__} has no list of encoder blocks where this family keeps them.")
