"""What a user asks of one field, checked against the backbone before anything is changed."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from numbers import Integral
from typing import Any

from torch import Tensor, nn

from ._checks import check_choice
from .backbone import SITES, Backbone
from .errors import SteerError
from .field import HRes

__all__ = ["FieldConfig", "check_name", "check_ranks", "check_site", "match_train"]


@dataclass(frozen=True)
class FieldConfig:
    """One field as it was asked for: everything needed to build it again, and what is stored of it besides tensors.

    Attributes:
        name: how users select it.
        site: at which point of a block it runs.
        ranks: block index to rank, for every steered block.
        scale: λ.
        activation: σ.
        bias: whether its projections have biases.
        dropout: of its hidden units, in training mode.
        train: the base parameters and buffers that train with it, by full name.
    """

    name: str
    site: str
    ranks: Mapping[int, int]
    scale: float = 1.0
    activation: str = "gelu"
    bias: bool = True
    dropout: float = 0.0
    train: tuple[str, ...] = ()

    def build(self, index: int, backbone: Backbone, **factory: Any) -> HRes:
        """Make the field of block `index`; `factory` is the device and dtype of its parameters."""
        return HRes(
            backbone.widths[index],
            self.ranks[index],
            scale=self.scale,
            activation=self.activation,
            bias=self.bias,
            dropout=self.dropout,
            channels=backbone.channels,
            **factory,
        )


def check_name(name: str, taken: Iterable[str]) -> None:
    """Check the name of a new field.

    Raises:
        SteerError: it cannot name a field, or is in use.
    """
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", name) or hasattr(nn.ModuleDict(), name):
        raise SteerError(
            f"a field's `name` has 1 to 64 letters, digits, '_' or '-', and is no module attribute; received {name!r}."
        )
    if name in taken:
        raise SteerError(f"the name {name!r} is in use; fields here: {', '.join(taken)}. Choose another `name`.")


def check_site(site: str, backbone: Backbone) -> str:
    """Return `site`.

    Raises:
        SteerError: it is no site, or the backbone has no such part.
    """
    check_choice("site", site, SITES)
    if site not in backbone.sites:
        raise SteerError(f"backbone {backbone.name!r} has the sites {', '.join(backbone.sites)}; received {site!r}.")
    return site


def check_ranks(rank: int | Mapping[int, int], layers: Sequence[int] | None, blocks: int) -> dict[int, int]:
    """Return block index to rank, in the order of the stream.

    Raises:
        SteerError: a block that is not there, named twice, or missing in a table of ranks.
    """
    chosen = _check_layers(range(blocks) if layers is None else layers, blocks)
    if not isinstance(rank, Mapping):
        return dict.fromkeys(chosen, rank)
    if not rank:
        raise SteerError("`rank` as a table names every steered block; received an empty one.")
    table = dict(zip(_check_layers(list(rank), blocks), rank.values(), strict=True))
    if layers is None:
        chosen = sorted(table)
    for index in chosen:
        if index not in table:
            raise SteerError(f"`rank` as a table names every steered block; block {index} is missing in {dict(rank)}.")
    return {index: table[index] for index in chosen}


def _check_layers(layers: Sequence[int], blocks: int) -> list[int]:
    if not isinstance(layers, (Sequence, Set)) or isinstance(layers, str) or not len(layers):
        raise SteerError(f"`layers` is a non-empty list of block indices, or None for all; received {layers!r}.")
    for index in layers:
        if not isinstance(index, Integral) or isinstance(index, bool) or not -blocks <= index < blocks:
            raise SteerError(f"a layer is an integer from {-blocks} to {blocks - 1}; received {index!r}.")
    found = [int(index) % blocks for index in layers]
    if len(set(found)) < len(found):
        raise SteerError(f"a layer is named once; received {list(layers)}.")
    return found


def match_train(tensors: Mapping[str, Tensor], patterns: Sequence[str] | str) -> tuple[str, ...]:
    """Return the names of the tensors that the patterns select: names or globs of tensors or of modules around them.

    Raises:
        SteerError: a pattern that matches no parameter, or is no string.
    """
    if not isinstance(patterns, (Sequence, Set)):
        raise SteerError(f"`train` is a list of names or globs of base modules; received {patterns!r}.")
    found: dict[str, None] = {}
    for pattern in (patterns,) if isinstance(patterns, str) else patterns:
        if not isinstance(pattern, str) or not pattern:
            raise SteerError(f"a `train` pattern is the name or glob of a module or parameter; received {pattern!r}.")
        hits = [name for name in tensors if any(fnmatch.fnmatchcase(part, pattern) for part in _prefixes(name))]
        if not any(isinstance(tensors[name], nn.Parameter) for name in hits):
            heads = ", ".join(dict.fromkeys(name.partition(".")[0] for name in tensors))
            raise SteerError(
                f"the `train` pattern {pattern!r} matches no parameter of the model; its top modules are: {heads}."
            )
        found.update(dict.fromkeys(hits))
    return tuple(found)


def _prefixes(name: str) -> list[str]:
    """Return a tensor's name and those of all modules around it: `a.b.w` gives `a`, `a.b`, `a.b.w`."""
    parts = name.split(".")
    return [".".join(parts[: end + 1]) for end in range(len(parts))]
