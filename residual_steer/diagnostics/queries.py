"""Which tokens of a sequence count: those of the text or the image, and not padding or what a method put in."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from residual_steer.errors import SteerError
from residual_steer.passes import Batch

__all__ = ["QUERIES", "chosen", "class_token", "places", "prefix_tokens", "query_of"]

QUERIES = ("auto", "first", "last", "all")

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


def query_of(query: str, model: nn.Module) -> str:
    """Return which queries count, with what "auto" means for a model.

    Raises:
        SteerError: it is none of `QUERIES`.
    """
    if query not in QUERIES:
        raise SteerError(f"`query` is one of {', '.join(QUERIES)}; received {query!r}.")
    if query != "auto":
        return query
    return "first" if class_token(model) else "all"


def chosen(batch: Batch, length: int, query: str, device: torch.device) -> Tensor:
    """Return which tokens of the batch count as queries, `(rows, length)` of booleans; padding never does."""
    mask = batch.mask
    fits = mask is not None and mask.shape == (batch.rows, length)
    real = mask if mask is not None and fits else torch.ones(batch.rows, length, dtype=torch.bool, device=device)
    if query == "first":
        return real & (real.cumsum(1) == 1)
    if query == "last":
        return real & (real.flip(1).cumsum(1).flip(1) == 1)
    return real


def places(length: int, longer: int, prefix: int, device: torch.device) -> Tensor:
    """Return where each token stands in a sequence that a method has made longer, `(length,)`.

    Methods put their tokens in one place: in a text before its first token, in an image behind the `prefix` tokens,
    such as CLS. Padding on the left stays before them, and is not followed: it never counts.

    Raises:
        SteerError: the sequence is shorter.
    """
    if longer < length:
        raise SteerError(
            f"the adapted model attends from {longer} tokens where the reference attends from {length}. Queries are "
            "compared one by one: give a reference that sees the same tokens."
        )
    position = torch.arange(length, device=device)
    return position + (longer - length) * (position >= prefix)
