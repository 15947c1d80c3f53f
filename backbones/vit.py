"""Vision Transformers of timm and transformers, and the text towers of CLIP and SigLIP, which have the same blocks.

Blocks are pre-norm. A model with two towers is two backbones: steer one of them, `steer(model.vision_model)`.
"""

from torch import nn

from residual_steer.backbone import Backbone, blocks_at, parts
from residual_steer.registry import register_backbone

TIMM = "VisionTransformer Eva Beit"
TRANSFORMERS = (
    "ViTModel DeiTModel BeitModel Dinov2Model Dinov2Backbone Dinov2WithRegistersModel DINOv3ViTModel "
    "IJepaModel ViTMAEModel ViTMSNModel ASTModel VivitModel VideoMAEModel YolosModel DPTModel "
    "CLIPVisionModel CLIPVisionTransformer CLIPTextModel CLIPTextTransformer SiglipVisionModel SiglipTextModel "
    "Siglip2VisionModel Siglip2TextModel "
    "ChineseCLIPVisionModel MetaClip2VisionModel MetaClip2TextModel BlipVisionModel Blip2VisionModel"
)
LISTS = ("blocks", "layers", "encoder.layers", "encoder.layer", "vision_model.encoder.layers", "model.layer")


@register_backbone(
    "vit",
    matches=[
        *(f"timm.{name}" for name in TIMM.split()),
        *(f"transformers.{name}" for name in TRANSFORMERS.split()),
    ],
)
def vit(model: nn.Module) -> Backbone:
    """Describe a stack of encoder blocks over patches, or the tokens of a text."""
    blocks = blocks_at(model, *LISTS)
    width = model.embed_dim if isinstance(getattr(model, "embed_dim", None), int) else model.config.hidden_size
    # timm's parallel blocks have several attentions, or one fused with the feed-forward: their site is the block
    return Backbone(
        blocks=blocks,
        width=width,
        mixer=parts(blocks, "attn", "attention", "self_attn"),
        mlp=parts(blocks, "mlp"),
    )
