"""What is seen of an attention: its map, or its queries and keys."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Keys", "Looks", "Map", "visible_in"]


@dataclass(frozen=True)
class Map:
    """One attention in one call of a block: which share of its attention each query gives to each key.

    Attributes:
        block: index of the block.
        weights: `(rows, heads, queries, keys)`.
        visible: which keys a query may attend to, booleans that broadcast to the weights; None is all of them.
    """

    block: int
    weights: Tensor
    visible: Tensor | None = None

    @property
    def seen(self) -> tuple[Tensor, ...]:
        """What was seen, queries in the third dimension of the first."""
        return (self.weights,)


@dataclass(frozen=True)
class Keys:
    """One attention in one call of a block: its queries and keys.

    Attributes:
        block: index of the block.
        query: `(rows, heads, queries, head width)`.
        key: `(rows, heads, keys, head width)`; heads that share a key have it each.
        scale: what the products of queries and keys are multiplied by.
        visible: which keys a query may attend to, booleans that broadcast to `(rows, heads, queries, keys)`; None is
            all of them.
    """

    block: int
    query: Tensor
    key: Tensor
    scale: float
    visible: Tensor | None = None

    @property
    def seen(self) -> tuple[Tensor, ...]:
        """What was seen, queries in the third dimension of the first."""
        return (self.query, self.key)


@dataclass
class Looks:
    """What was seen in the blocks of a model, in the order of the calls.

    Attributes:
        keys: whether queries and keys are looked at, instead of maps.
        block: index of the block that is being called, None outside of them, where nothing is looked at.
        found: what was seen.
    """

    keys: bool
    block: int | None = None
    found: list[Map | Keys] = field(default_factory=list)

    def see(self, weights: Tensor, visible: Tensor | None = None) -> None:
        """Take note of a map, `(rows, heads, queries, keys)`."""
        if self.block is not None:
            self.found.append(Map(self.block, weights.detach(), visible))

    def see_keys(self, query: Tensor, key: Tensor, scale: float | None, visible: Tensor | None) -> None:
        """Take note of queries and keys, which several heads may share; the scale is 1/√(head width) if not given."""
        if self.block is not None:
            key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
            scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
            self.found.append(Keys(self.block, query.detach(), key.detach(), scale, visible))

    def around(self, index: int) -> tuple[Callable[..., None], Callable[..., None]]:
        """Return hooks for before and after the call of a block."""

        def enter(block: nn.Module, args: Any) -> None:
            self.block = index

        def leave(block: nn.Module, args: Any, output: Any) -> None:
            self.block = None

        return enter, leave


def visible_in(mask: Any, keys: int) -> Tensor | None:
    """Read a mask, boolean or added to the scores, whose low end is the lowest number of its type or -inf.

    Returns:
        Booleans in four dimensions, that broadcast to `(rows, heads, queries, keys)`.
    """
    if not isinstance(mask, Tensor):
        return None
    shown: Tensor = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    return shown[(None,) * (4 - shown.dim())][..., :keys]
