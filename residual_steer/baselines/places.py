"""Where learned tokens stand in a sequence: inserted into it, taken out again, and told to what is as long as it.

A place is a position that all rows share, or a tensor `(batch,)` with one for each: tokens go before a row's first real
one, behind its padding on the left. So a padded row is what it is without padding, also in an SSM, whose state would
forget in a long padding what stood before it.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["Place", "behind_padding", "insert", "take_out"]

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
