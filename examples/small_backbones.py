"""Small backbones, pre-trained here from scratch, and kept in the user's cache.

A byte-level GPT-2 and a byte-level Mamba learn Python source, a ViT learns the digits 0–4. On two CPU cores that takes
about a minute and a half; afterwards they are read from the cache. `compare_transformer_mamba.py` uses them.

A cached backbone is used only if it was made by the same recipe from the same data by the same version of this code,
and if its bytes are the ones that were written; else it is made again.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import residual_steer as rs
from backbone_cache import cached
from residual_steer.data import ByteBlocks, digits, python_source
from residual_steer.training import evaluate

VERSION = 1  # raise it when the code below changes what a recipe gives
LENGTH = 64  # bytes of a window
SOURCE = 4_000_000  # bytes of Python source


@dataclass(frozen=True)
class Recipe:
    """How a backbone is made.

    Attributes:
        name: what it is called in the table.
        config: arguments of the model's configuration.
        steps: optimizer steps of the pre-training.
        batch: windows, or images, of a step.
        lr: peak learning rate.
        seed: of the initial weights and the data's order.
    """

    name: str
    config: dict[str, Any]
    steps: int
    batch: int
    lr: float
    seed: int = 0


RECIPES = {
    "GPT-2": Recipe(
        "GPT-2",
        {"n_embd": 128, "n_layer": 3, "n_head": 4, "n_positions": LENGTH, "initializer_range": 0.1},
        steps=550,
        batch=16,
        lr=4e-3,
    ),
    "Mamba": Recipe(
        "Mamba",
        {"hidden_size": 128, "num_hidden_layers": 4, "expand": 1, "state_size": 4},
        steps=400,
        batch=16,
        lr=4e-3,
    ),
    "ViT": Recipe("ViT", {"embed_dim": 64, "depth": 4, "num_heads": 4, "patch_size": 2}, steps=300, batch=64, lr=2e-3),
}


@dataclass(frozen=True)
class Pretrained:
    """A backbone from the cache.

    Attributes:
        model: in evaluation mode.
        quality: what it reaches on held-out data of its own: bits per byte, or accuracy in %.
        seconds: how long its pre-training took, when it took place.
        was_cached: whether it was there already.
    """

    model: nn.Module
    quality: float
    seconds: float
    was_cached: bool


def build_gpt2(config: dict[str, Any]) -> nn.Module:
    """Return an untrained GPT-2 over bytes."""
    from transformers import GPT2Config, GPT2LMHeadModel

    tokens = {"vocab_size": 256, "bos_token_id": 0, "eos_token_id": 0, "use_cache": False}
    return GPT2LMHeadModel(GPT2Config(**tokens, embd_pdrop=0.0, resid_pdrop=0.0, attn_pdrop=0.0, **config))


def build_mamba(config: dict[str, Any]) -> nn.Module:
    """Return an untrained Mamba over bytes."""
    from transformers import MambaConfig, MambaForCausalLM

    tokens = {"vocab_size": 256, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "use_cache": False}
    return MambaForCausalLM(MambaConfig(**tokens, **config))


def build_vit(config: dict[str, Any]) -> nn.Module:
    """Return an untrained ViT for grey images of 8 × 8 pixels and five classes."""
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(img_size=8, in_chans=1, num_classes=5, class_token=True, **config)


BUILDERS: dict[str, Callable[[dict[str, Any]], nn.Module]] = {
    "GPT-2": build_gpt2,
    "Mamba": build_mamba,
    "ViT": build_vit,
}


def get_backbone(recipe: Recipe, cache: Path) -> Pretrained:
    """Return the backbone of `recipe`, from the cache or pre-trained now.

    Args:
        recipe: what to make.
        cache: folder of the cache.

    Raises:
        SteerError: the cache cannot be written, or the data is not there.
    """
    train, valid = pretraining_data(recipe.name)
    model, record, found = cached(
        cache / f"{recipe.name.lower()}-{key_of(recipe, train)}",
        lambda: build(recipe),
        lambda model: pretrain(model, recipe, train, valid),
    )
    return Pretrained(model, record["quality"], record["seconds"], found)


def pretraining_data(name: str) -> tuple[Dataset[Any], Dataset[Any]]:
    """Return training and validation data for the backbone called `name`."""
    if name == "ViT":
        return digits(range(5), "train"), digits(range(5), "valid")
    source = python_source(SOURCE)
    held_out = ByteBlocks(source, LENGTH, "valid")
    some = torch.utils.data.Subset(held_out, range(0, len(held_out), max(1, len(held_out) // 128)))
    return ByteBlocks(source, LENGTH, "train"), some


def build(recipe: Recipe) -> nn.Module:
    """Return the untrained backbone of a recipe."""
    torch.manual_seed(recipe.seed)
    return BUILDERS[recipe.name](recipe.config)


def pretrain(model: nn.Module, recipe: Recipe, train: Dataset[Any], valid: Dataset[Any]) -> dict[str, Any]:
    """Pre-train a backbone; return its recipe, and what it reaches on held-out data of its own."""
    scan_linearly(model)
    held_out = DataLoader(valid, batch_size=64)
    started = time.perf_counter()
    rs.fit(
        model,
        DataLoader(train, batch_size=recipe.batch, shuffle=True),
        steps=recipe.steps,
        lr=recipe.lr,
        weight_decay=0.05,
        warmup=0.1,
        seed=recipe.seed,
    )
    seconds = time.perf_counter() - started
    result = evaluate(model, held_out)
    quality = 100 * result["accuracy"] if "accuracy" in result else result["loss"] / math.log(2)
    return {**asdict(recipe), "quality": quality, "seconds": seconds}


def scan_linearly(model: nn.Module) -> None:
    """Let transformers' Mamba train through a linear scan; `steer` does so itself, all other training needs this."""
    backbone = rs.find_backbone(model)
    if backbone.prepare is not None:
        backbone.prepare(backbone.blocks)


def key_of(recipe: Recipe, data: Dataset[Any]) -> str:
    """Return a short key of the recipe, the data it is trained on and the version of this code."""
    tensors: tuple[Tensor, ...] = data.windows if isinstance(data, ByteBlocks) else data.tensors  # type: ignore
    tensors = (tensors,) if isinstance(tensors, Tensor) else tensors
    key = hashlib.sha256(json.dumps([VERSION, LENGTH, asdict(recipe)], sort_keys=True).encode())
    for tensor in tensors:
        key.update(tensor.contiguous().numpy().tobytes())
    return key.hexdigest()[:12]
