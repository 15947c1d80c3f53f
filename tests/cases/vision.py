"""Vision Transformers, and hierarchical ones."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .case import WIDTH, Case, Points, before, floats, of_text, of_timm, of_transformers, pair, points


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


def _hf_swin() -> nn.Module:
    shape = {"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [1, 2], "num_heads": [2, 4], "window_size": 2}
    return of_transformers("SwinForImageClassification", "SwinConfig", **shape, drop_path_rate=0.0, num_labels=3)


def _of_timm(name: str, make: Callable[[], nn.Module], points: Points, head: str = "head", **more: Any) -> Case:
    return Case(name, make, more.pop("batch", floats("x", 3, 16, 16)), points, head, **more)


def _of_hf(name: str, kind: str, points: Points, head: str, untraced: str = "", **settings: Any) -> Case:
    make = functools.partial(_vision, kind, f"{kind.partition('For')[0].removesuffix('Model')}Config", **settings)
    return Case(name, make, floats("pixel_values", 3, 16, 16), points, head, untraced=untraced)


VIT = functools.partial(_timm_vit, "vision_transformer", "VisionTransformer", init_values=0.1)
EVA = functools.partial(_timm_vit, "eva", "Eva", use_rot_pos_emb=True, swiglu_mlp=True)
BLOCKS = pair("blocks.{}", "attn")
SWIN = ["layers.0.blocks.0", "layers.1.blocks.0", "layers.1.blocks.1"]
GCVIT = [f"stages.{stage}.blocks.{index}" for stage in range(2) for index in range(2)]
BY_SWIN = {"untraced": "its stages are those of timm-swin"}
BROKEN = before("timm", "1.0.16", checkpoint="'function' object has no attribute 'checkpoint'")
PATCHES = {"enter": lambda args, kwargs: args[1], "leave": lambda output: output[1]}
BY_TIMM, BY_VIT = "timm-vit goes through both", "hf-vit goes through both"
BY_PATCHES = "its patches go through the blocks of timm-vit"
BEIT = "its blocks are those of timm-vit with relative positions"
ASKED = "its stages are those of timm-swin, beside convolutions for what all windows ask"

VISION = [
    _of_timm("timm-vit", VIT, BLOCKS),
    _of_timm("timm-eva", EVA, BLOCKS, untraced=BY_TIMM),
    _of_timm(
        "timm-deit",
        functools.partial(_timm_vit, "deit", "VisionTransformerDistilled"),
        BLOCKS,
        "head*",
        untraced=BY_TIMM,
    ),
    _of_hf("hf-vit", "ViTForImageClassification", pair("vit.layers.{}", "attention"), "classifier"),
    _of_hf("hf-deit", "DeiTForImageClassification", pair("deit.layers.{}", "attention"), "classifier", BY_VIT),
    _of_hf("hf-dinov2", "Dinov2Model", pair("encoder.layer.{}", "attention"), "layernorm", BY_VIT),
    _of_hf("hf-clip", "CLIPVisionModel", pair("encoder.layers.{}", "self_attn"), "pre_layrnorm", BY_VIT),
    _of_timm("timm-beit", functools.partial(_timm_vit, "beit", "Beit", init_values=0.1), BLOCKS, untraced=BEIT),
    Case(
        "hf-mae",
        functools.partial(_vision, "ViTMAEModel", "ViTMAEConfig", mask_ratio=0.5),
        _masked,
        pair("layers.{}", "attention"),
        "layernorm",
        untraced=BY_VIT,
    ),
    of_text(
        *("siglip-text", "SiglipTextModel", pair("encoder.layers.{}", "self_attn"), "final_layer_norm"),
        "max_position_embeddings=16 projection_size=3",
        config="SiglipTextConfig",
        untraced=BY_VIT,
    ),
    _of_timm("timm-swin", functools.partial(_swin, "swin_transformer", "SwinTransformer"), points(SWIN, "attn", "mlp")),
    _of_timm(
        "timm-swin-v2",
        functools.partial(_swin, "swin_transformer_v2", "SwinTransformerV2"),
        points(SWIN, "attn", "mlp"),
        broken=BROKEN,
        **BY_SWIN,
    ),
    _of_timm(
        "timm-gcvit",
        _gcvit,
        points(GCVIT, "attn", "mlp"),
        batch=floats("x", 3, 32, 32),
        untraced=ASKED,
        broken=BROKEN,
    ),
    _of_timm("timm-tnt", _tnt, pair("blocks.{}", "attn_out"), untraced=BY_PATCHES, **PATCHES),
    Case(
        "hf-swin",
        _hf_swin,
        floats("pixel_values", 3, 16, 16),
        points([f"swin.encoder.{path}" for path in SWIN], "attention", "mlp"),
        "classifier",
        **BY_SWIN,
    ),
]
