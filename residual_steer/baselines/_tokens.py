"""Learned tokens in a sequence: where they stand, how they get in and out, and what is as long as the sequence.

A place is a position that all rows share, or a tensor `(batch,)` with one for each: tokens go before a row's first real
one, behind its padding on the left. So a padded row is what it is without padding, also in an SSM, whose state would
forget in a long padding what stood before it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from residual_steer._caches import cache_of
from residual_steer.errors import SteerError

from ._attach import Subject

__all__ = ["Place", "behind_padding", "embedding_of", "insert", "lengthened_mask", "take_out"]

Place = int | Tensor


def behind_padding(mask: Tensor) -> Tensor:
    """Return how many positions of padding each row begins with, `(batch,)`, from a mask `(batch, length)`."""
    return (mask != 0).cumsum(1).eq(0).sum(1)


def insert(x: Tensor, new: Tensor, place: Place) -> Tensor:
    """Return x with `new` inserted in every row.

    Args:
        x: `(batch, length, ...)`.
        new: `(tokens, ...)`, the same for every row; it takes x's type.
        place: before which position.

    Returns:
        `(batch, length + tokens, ...)`.
    """
    new, tokens = new.to(x.dtype), new.shape[0]
    if isinstance(place, int):
        return torch.cat([x[:, :place], new.expand(x.shape[0], *new.shape), x[:, place:]], dim=1)
    room = x.new_zeros(x.shape[0], tokens, *x.shape[2:])
    position = torch.arange(x.shape[1] + tokens, device=x.device) - place[:, None]
    fresh = new[position.clamp(0, tokens - 1)]
    position = position.view(*position.shape, *[1] * (x.dim() - 2))
    later = torch.where(position < tokens, fresh, torch.cat([room, x], dim=1))
    return torch.where(position < 0, torch.cat([x, room], dim=1), later)


def take_out(y: Tensor, tokens: int, place: Place) -> Tensor:
    """Return y, `(batch, length + tokens, ...)`, without what `insert` put in."""
    if isinstance(place, int):
        return torch.cat([y[:, :place], y[:, place + tokens :]], dim=1) if place else y[:, tokens:]
    before = torch.arange(y.shape[1] - tokens, device=y.device) < place[:, None]
    return torch.where(before.view(*before.shape, *[1] * (y.dim() - 2)), y[:, :-tokens], y[:, tokens:])


def lengthened_mask(call: Mapping[str, Any], tokens: int, method: str, place: Place | None = None) -> Tensor | None:
    """Return the attention mask of a model's call with ones for tokens, behind the padding if no place is given.

    Raises:
        SteerError: the mask is not `(batch, length)`, or the call has a cache of a fixed size.
    """
    mask = call.get("attention_mask")
    if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
        raise SteerError(f"{method!r} lengthens an attention mask (batch, length); this call has another kind of mask.")
    if getattr(cache_of(call), "is_compileable", False):
        raise SteerError(
            f"a static cache has no room for the {method}, whose length it does not know. Use a dynamic one."
        )
    if mask is None:
        return None
    return insert(mask, mask.new_ones(tokens), behind_padding(mask) if place is None else place)


def embedding_of(subject: Subject) -> nn.Embedding | None:
    """Return the embedding of a language model's words."""
    inner: Any = subject.inner
    found = inner.get_input_embeddings() if hasattr(inner, "get_input_embeddings") else None
    found = getattr(inner, "embedding", None) if found is None else found  # mamba_ssm's
    fits = isinstance(found, nn.Embedding) and found.embedding_dim == subject.backbone.widths[0]
    return found if fits else None
