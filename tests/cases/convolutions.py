"""Residual ConvNets, whose stream has its channels in front, and only whose blocks with a skip are steered."""

from __future__ import annotations

from typing import Any

from torch import nn

from .case import Case, floats, of_timm, of_transformers, points


def _resnet() -> nn.Module:
    from timm.models.resnet import Bottleneck

    return of_timm("resnet", "ResNet", Bottleneck, (2, 2, 1, 1), channels=(4, 6, 6, 6), num_classes=3, stem_width=8)


def _mobilenet() -> nn.Module:
    from timm.models._efficientnet_builder import decode_arch_def

    stages = decode_arch_def([["ds_r2_k3_s1_e1_c8"], ["ir_r2_k3_s2_e2_c12_se0.25"]])
    return of_timm("mobilenetv3", "MobileNetV3", stages, num_classes=3, stem_size=8, num_features=16)


def _convnext(**more: Any) -> nn.Module:
    shape = {"hidden_sizes": [8, 12], "depths": [1, 2], "num_stages": 2, "patch_size": 2, "num_labels": 3}
    return of_transformers(
        "ConvNextForImageClassification", "ConvNextConfig", **shape, layer_scale_init_value=0.1, **more
    )


CONVNEXT = [f"convnext.encoder.stages.{path}" for path in ("0.layers.0", "1.layers.0", "1.layers.1")]

BY_RESNET = {"untraced": "timm-resnet goes through both"}
IMAGES, MOBILENET = floats("x", 3, 32, 32), points(["blocks.0.0", "blocks.0.1", "blocks.1.1"], None, None)
CONVOLUTIONS = [
    Case("timm-resnet", _resnet, IMAGES, points(["layer1.1", "layer2.1"], None, None), "fc", mixes_rows=True),
    Case("timm-mobilenet", _mobilenet, IMAGES, MOBILENET, "classifier", mixes_rows=True, **BY_RESNET),
    Case(
        "hf-convnext",
        _convnext,
        floats("pixel_values", 3, 32, 32),
        points(CONVNEXT, "dwconv", None),
        "classifier",
        **BY_RESNET,
    ),
]
