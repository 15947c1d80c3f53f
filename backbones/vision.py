"""Vision Transformers of timm and transformers; ViTs in stages (Swin), and with two streams (TNT)."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from residual_steer.backbone import Backbone, blocks_at, first_of, parts, stacked
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
STAGED = (
    "timm.SwinTransformer timm.SwinTransformerV2 timm.GlobalContextVit transformers.SwinModel transformers.Swinv2Model "
    "transformers.DonutSwinModel"
)


@register_backbone(
    "vit",
    matches=[
        *(f"timm.{name}" for name in TIMM.split()),
        *(f"transformers.{name}" for name in TRANSFORMERS.split()),
    ],
)
def vit(model: nn.Module) -> Backbone:
    """Describe pre-norm blocks over patches, or over the tokens of CLIP's and SigLIP's texts.

    A model with two towers is two backbones: steer one of them, `steer(model.vision_model)`. timm's parallel blocks
    have several attentions, or one fused with the feed-forward: their site is the block.
    """
    width = model.embed_dim if isinstance(getattr(model, "embed_dim", None), int) else model.config.hidden_size
    return stacked(model, *LISTS, mixer=("attn", "attention", "self_attn"), mlp=("mlp",), width=width)


@register_backbone("swin", matches=STAGED.split())
def swin(model: nn.Module) -> Backbone:
    """Describe the blocks of all stages of a Swin or a GC ViT, between which the merging of patches doubles the width.

    The stream is `(batch, height, width, channels)` in timm and `(batch, length, channels)` in transformers. The mixer
    sees windows, those of one image next to one another.
    """
    blocks = [block for stage in blocks_at(model, "layers", "encoder.layers", "stages") for block in stage.blocks]
    width = [first_of(block, "norm1", "layernorm_before").normalized_shape[0] for block in blocks]
    return Backbone(blocks=blocks, width=width, mixer=parts(blocks, "attn", "attention"), mlp=parts(blocks, "mlp"))


@register_backbone("tnt", matches=["timm.TNT"])
def tnt(model: nn.Module) -> Backbone:
    """Describe Transformer in Transformer: blocks with a stream of patches, and one of the pixels inside each.

    A block adds what it made of the pixels to the patches, and the model reads nothing but the patches in the end. So
    they are the stream: the second of the pair that a block takes and returns. The mixer is the attention among them.
    """
    places = {"read": _read_patches, "write": _write_patches}
    return Backbone(blocks=model.blocks, width=model.embed_dim, mixer="attn_out", mlp="mlp", **places)


def _read_patches(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """Return the patches that enter a block."""
    return kwargs["patch_embed"] if "patch_embed" in kwargs else args[1]


def _write_patches(output: tuple[Tensor, Tensor], f: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Move the patches, and leave the pixels."""
    pixels, patches = output
    return pixels, f(patches)
