"""The tokens that a model of images puts before those of an image: a class token, a distillation token, registers."""

from __future__ import annotations

from typing import Any

from torch import nn

__all__ = ["class_token", "prefix_tokens"]

_CLASS = ("cls_token", "class_embedding")
_PREFIX = (*_CLASS, "distillation_token")


def class_token(model: nn.Module) -> bool:
    """Say whether a model of images puts a class token before them."""
    return any(name.rpartition(".")[2] in _CLASS for name, _ in model.named_parameters())


def prefix_tokens(model: nn.Module) -> int:
    """Return how many tokens stand before those of an image, 0 in a text; timm says it, transformers' are counted."""
    for module in model.modules():
        said: Any = getattr(module, "num_prefix_tokens", None)
        if isinstance(said, int):
            return said
    named = [(name.rpartition(".")[2], parameter) for name, parameter in model.named_parameters()]
    return sum(1 if name in _PREFIX else p.shape[-2] if name == "register_tokens" else 0 for name, p in named)
