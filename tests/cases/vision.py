"""Vision Transformers, and hierarchical ones."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from .case import WIDTH, Case, before, floats, of_timm, of_transformers, pair, points, text, tokens


def _timm_vit(module: str, name: str, **more: Any) -> nn.Module:
    shape = {"img_size": 16, "patch_size": 8, "embed_dim": WIDTH, "depth": 2, "num_heads": 2, "num_classes": 3}
    return of_timm(module, name, **shape, **more)


def _vision(model: str, config: str, **more: Any) -> nn.Module:
    shape = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
    ratio = {"mlp_ratio": 2} if "Dinov2" in config else {"intermediate_size": 32}
    return of_transformers(model, config, **shape, **ratio, num_labels=3, **more)


def _swin(module: str, name: str) -> nn.Module:
    shape = {"img_size": 16, "patch_size": 2, "embed_dim": 8, "depths": (1, 2), "num_heads": (2, 4), "window_size": 2}
    model = of_timm(module, name, **shape, num_classes=3, drop_path_rate=0.0)
    for part in model.modules():
        if isinstance(part, nn.LayerNorm):
            nn.init.ones_(part.weight)  # v2 begins with zeros behind every part, and so without parts
    return model


def _masked() -> dict[str, Tensor]:
    """Return images, and the noise by which a masked autoencoder picks patches."""
    return {"pixel_values": torch.randn(2, 3, 16, 16), "noise": torch.rand(2, 4)}


def _gcvit() -> nn.Module:
    shape = {"img_size": 32, "window_size": (4, 2), "embed_dim": 8, "depths": (2, 2)}
    return of_timm("gcvit", "GlobalContextVit", **shape, num_heads=(2, 2), num_classes=3, drop_path_rate=0.0)


def _tnt() -> nn.Module:
    shape = {"img_size": 16, "patch_size": 8, "first_stride": 4, "embed_dim": WIDTH, "inner_dim": 8, "depth": 2}
    return of_timm("tnt", "TNT", **shape, num_heads_inner=2, num_heads_outer=2, num_classes=3)


CHECKPOINT = "'function' object has no attribute 'checkpoint'"
SWIN = ["layers.0.blocks.0", "layers.1.blocks.0", "layers.1.blocks.1"]

VISION = [
    Case(
        "timm-vit",
        functools.partial(_timm_vit, "vision_transformer", "VisionTransformer", init_values=0.1),
        floats("x", 3, 16, 16),
        pair("blocks.{}", "attn"),
        "head",
    ),
    Case(
        "timm-eva",
        functools.partial(_timm_vit, "eva", "Eva", use_rot_pos_emb=True, swiglu_mlp=True),
        floats("x", 3, 16, 16),
        pair("blocks.{}", "attn"),
        "head",
    ),
    Case(
        "timm-deit",
        functools.partial(_timm_vit, "deit", "VisionTransformerDistilled"),
        floats("x", 3, 16, 16),
        pair("blocks.{}", "attn"),
        "head*",
    ),
    Case(
        "hf-vit",
        functools.partial(_vision, "ViTForImageClassification", "ViTConfig"),
        floats("pixel_values", 3, 16, 16),
        pair("vit.layers.{}", "attention"),
        "classifier",
    ),
    Case(
        "hf-deit",
        functools.partial(_vision, "DeiTForImageClassification", "DeiTConfig"),
        floats("pixel_values", 3, 16, 16),
        pair("deit.layers.{}", "attention"),
        "classifier",
        untraced="its blocks are those of hf-vit",
    ),
    Case(
        "hf-dinov2",
        functools.partial(_vision, "Dinov2Model", "Dinov2Config"),
        floats("pixel_values", 3, 16, 16),
        pair("encoder.layer.{}", "attention"),
        "layernorm",
    ),
    Case(
        "hf-clip",
        functools.partial(_vision, "CLIPVisionModel", "CLIPVisionConfig"),
        floats("pixel_values", 3, 16, 16),
        pair("encoder.layers.{}", "self_attn"),
        "pre_layrnorm",
    ),
    Case(
        "timm-beit",
        functools.partial(_timm_vit, "beit", "Beit", init_values=0.1),
        floats("x", 3, 16, 16),
        pair("blocks.{}", "attn"),
        "head",
        untraced="its blocks are those of timm-vit with relative positions",
    ),
    Case(
        "hf-mae",
        functools.partial(_vision, "ViTMAEModel", "ViTMAEConfig", mask_ratio=0.5),
        _masked,
        pair("layers.{}", "attention"),
        "layernorm",
        untraced="its blocks are those of hf-vit",
    ),
    Case(
        "siglip-text",
        functools.partial(text, "SiglipTextModel", "SiglipTextConfig", max_position_embeddings=16, projection_size=3),
        tokens,
        pair("encoder.layers.{}", "self_attn"),
        "final_layer_norm",
        untraced="its blocks are those of hf-clip",
    ),
    Case(
        "timm-swin",
        functools.partial(_swin, "swin_transformer", "SwinTransformer"),
        floats("x", 3, 16, 16),
        points(SWIN, "attn", "mlp"),
        "head",
    ),
    Case(
        "timm-swin-v2",
        functools.partial(_swin, "swin_transformer_v2", "SwinTransformerV2"),
        floats("x", 3, 16, 16),
        points(SWIN, "attn", "mlp"),
        "head",
        untraced="its stages are those of timm-swin",
        broken=before("timm", "1.0.16", checkpoint=CHECKPOINT),
    ),
    Case(
        "timm-gcvit",
        _gcvit,
        floats("x", 3, 32, 32),
        points([f"stages.{stage}.blocks.{index}" for stage in range(2) for index in range(2)], "attn", "mlp"),
        "head",
        untraced="its stages are those of timm-swin, beside convolutions for what all windows ask",
        broken=before("timm", "1.0.16", checkpoint=CHECKPOINT),
    ),
    Case(
        "timm-tnt",
        _tnt,
        floats("x", 3, 16, 16),
        pair("blocks.{}", "attn_out"),
        "head",
        enter=lambda args, kwargs: args[1],
        leave=lambda output: output[1],
        untraced="its patches go through the blocks of timm-vit",
    ),
    Case(
        "hf-swin",
        functools.partial(
            of_transformers,
            "SwinForImageClassification",
            "SwinConfig",
            image_size=16,
            patch_size=2,
            embed_dim=8,
            depths=[1, 2],
            num_heads=[2, 4],
            window_size=2,
            drop_path_rate=0.0,
            num_labels=3,
        ),
        floats("pixel_values", 3, 16, 16),
        points([f"swin.encoder.{path}" for path in SWIN], "attention", "mlp"),
        "classifier",
        untraced="its stages are those of timm-swin",
    ),
]
