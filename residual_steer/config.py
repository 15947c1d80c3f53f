"""What a user asks of one field, checked against the backbone before anything is changed."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import accumulate
from numbers import Integral
from typing import Any

from torch import Tensor, nn

from ._checks import check_choice, check_integer
from .backbone import SITES, Backbone, site_of
from .errors import SteerError
from .field import HRes

__all__ = ["FieldConfig", "Place", "check_name", "check_ranks", "check_sites", "in_order", "match_train"]

Place = tuple[str, int]  # a site and the index of a block
Rank = int | Mapping[int, int] | Mapping[str, int | Mapping[int, int]]


@dataclass(frozen=True)
class FieldConfig:
    """One field as it was asked for: everything needed to build it again, and what is stored of it besides tensors.

    Attributes:
        name: how users select it.
        sites: site to block index to rank, for every point at which it runs.
        scale: λ.
        activation: σ.
        bias: whether its projections have biases.
        dropout: of its hidden units, in training mode.
        train: the base parameters and buffers that train with it, by full name.
    """

    name: str
    sites: Mapping[str, Mapping[int, int]]
    scale: float = 1.0
    activation: str = "gelu"
    bias: bool = True
    dropout: float = 0.0
    train: tuple[str, ...] = ()

    @property
    def site(self) -> str | tuple[str, ...]:
        """Where it runs: a site, or several."""
        return next(iter(self.sites)) if len(self.sites) == 1 else tuple(self.sites)

    @property
    def ranks(self) -> dict[int, int]:
        """Block index to rank, that of all its sites together."""
        blocks = sorted({index for ranks in self.sites.values() for index in ranks})
        return {index: sum(ranks.get(index, 0) for ranks in self.sites.values()) for index in blocks}

    @property
    def places(self) -> tuple[Place, ...]:
        """Every site and block index at which it runs."""
        return tuple((site, index) for site, ranks in self.sites.items() for index in ranks)

    def point(self, place: Place) -> str:
        """Return what a file calls a place: `blocks.3`, and `blocks.3.after` where there are several sites."""
        site, index = place
        return f"blocks.{index}" if len(self.sites) == 1 else f"blocks.{index}.{site}"

    def build(self, place: Place, backbone: Backbone, **factory: Any) -> HRes:
        """Make the field of a place; `factory` is the device and dtype of its parameters."""
        site, index = place
        width, out_width = backbone.features(index, site)
        return HRes(
            width,
            self.sites[site][index],
            out_width=out_width,
            scale=self.scale,
            activation=self.activation,
            bias=self.bias,
            dropout=self.dropout,
            channels=-1 if site_of(site).projection else backbone.channels,
            **factory,
        )


def check_name(name: str, taken: Iterable[str]) -> None:
    """Raise if a new field cannot have a name, or the name is in use."""
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", name) or hasattr(nn.ModuleDict(), name):
        raise SteerError(
            f"a field's `name` has 1 to 64 letters, digits, '_' or '-', and is no module attribute; received {name!r}."
        )
    if name in taken:
        raise SteerError(f"the name {name!r} is in use; fields here: {', '.join(taken)}. Choose another `name`.")


def check_sites(
    site: str | Sequence[str] | None, rank: Rank, layers: Sequence[int] | None, backbone: Backbone
) -> dict[str, dict[int, int]]:
    """Return site to block index to rank, a rank that is given for several sites split over them.

    Raises:
        SteerError: what is no site of the backbone, or named twice; a table of ranks with other sites; a rank too small
            to be split; or as `check_ranks`.
    """
    site = backbone.site if site is None else site
    if not isinstance(site, (str, Sequence)) or not len(site):
        raise SteerError(f"`site` is one of {', '.join(SITES)}, or a list of several; received {site!r}.")
    sites = [site] if isinstance(site, str) else list(site)
    for each in sites:
        _check_site(each, backbone)
    if len(set(sites)) < len(sites):
        raise SteerError(f"a site is named once; received {sites}.")
    blocks = len(backbone.blocks)
    by_site: Any = rank
    if isinstance(rank, Mapping) and rank and all(isinstance(key, str) for key in rank):
        if set(by_site) != set(sites):
            raise SteerError(f"`rank` by site names every site, {', '.join(sites)}; received {dict(rank)}.")
        return in_order({each: check_ranks(by_site[each], layers, blocks) for each in sites})
    number, table = len(sites), check_ranks(rank, layers, blocks)
    if number > 1:
        for total in table.values():
            check_integer("rank", total, number, meaning=f"1 or more for each of {number} sites")
    return in_order(
        {
            each: {i: r if number == 1 else _share(r, number, n) for i, r in table.items()}
            for n, each in enumerate(sites)
        }
    )


def _share(rank: int, number: int, place: int) -> int:
    """Return the part of a rank that falls to one of several sites: one more at the first ones if it is uneven."""
    return rank // number + (place < rank % number)


def in_order(sites: Mapping[str, dict[int, int]]) -> dict[str, dict[int, int]]:
    """Return sites in the order of the table, in which a field's parameters stand, wherever it was read from."""
    every = list(SITES)
    return dict(sorted(sites.items(), key=lambda one: (every.index(one[0]) if one[0] in SITES else len(every), one[0])))


def _check_site(site: str, backbone: Backbone) -> None:
    """Raise if a site is none, or one that no block of the backbone has."""
    if isinstance(site, str) and "." in site:
        part = site.partition(".")[0]
        there = [each for each in backbone.projections if part not in ("mixer", "mlp") or each.startswith(f"{part}.")]
        if site not in there:
            raise SteerError(
                f"a site with a dot is a linear map inside a mixer or mlp; those of backbone {backbone.name!r} are "
                f"{', '.join(there) or 'none'}; received {site!r}. Experts, which see some tokens each, are none."
            )
        return
    check_choice("site", site, SITES)
    if site not in backbone.sites:
        raise SteerError(f"backbone {backbone.name!r} has the sites {', '.join(backbone.sites)}; received {site!r}.")


def check_ranks(rank: int | Mapping[Any, Any], layers: Sequence[int] | None, blocks: int) -> dict[int, int]:
    """Return block index to rank in the order of the stream; raise if a block is none, is named twice or missing."""
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
    """Return the tensors that patterns select, names or globs of them or modules around; raise if one finds none."""
    if not isinstance(patterns, (Sequence, Set)):
        raise SteerError(f"`train` is a list of names or globs of base modules; received {patterns!r}.")
    found: dict[str, None] = {}
    for pattern in (patterns,) if isinstance(patterns, str) else patterns:
        if not isinstance(pattern, str) or not pattern:
            raise SteerError(f"a `train` pattern is the name or glob of a module or parameter; received {pattern!r}.")
        # `a.b.w` stands in `a` and in `a.b`
        within = {name: accumulate(name.split("."), "{}.{}".format) for name in tensors}
        hits = [name for name, parts in within.items() if any(fnmatch.fnmatchcase(part, pattern) for part in parts)]
        if not any(isinstance(tensors[name], nn.Parameter) for name in hits):
            heads = ", ".join(dict.fromkeys(name.partition(".")[0] for name in tensors))
            raise SteerError(
                f"the `train` pattern {pattern!r} matches no parameter of the model; its top modules are: {heads}."
            )
        found.update(dict.fromkeys(hits))
    return tuple(found)
