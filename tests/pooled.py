"""A small ViT whose every token counts for its output: with a class token, a random one hardly sees its patches."""

import torch
from timm.models.vision_transformer import VisionTransformer


def pooled_vit():
    torch.manual_seed(0)
    shape = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 3}
    return VisionTransformer(**shape, class_token=False, global_pool="avg")


def images(rows, seed):
    return torch.randn(rows, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
