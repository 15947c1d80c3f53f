"""summary and fields: what a user sees of a steered model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import SupportsIndex, overload

from torch import nn

from ._controller import steering_of
from .config import FieldConfig
from .errors import SteerError
from .routing import Asked


@dataclass(frozen=True, kw_only=True)
class FieldInfo(FieldConfig):
    """One field of a model: as it was asked for (`name`, `sites`, `scale`, …), and what it does at present.

    Attributes:
        parameters: number of its own parameters.
        acting: whether it acts at present, on any row.
        trains: whether it trains at present.
        frozen: whether `freeze` keeps it from training.
    """

    parameters: int
    acting: bool
    trains: bool
    frozen: bool

    @property
    def layers(self) -> tuple[int, ...]:
        """The steered blocks."""
        return tuple(sorted(self.ranks))

    @property
    def rank(self) -> int | tuple[int, ...]:
        """The rank, that of all sites together; one for every steered block where they differ."""
        ranks = tuple(self.ranks[index] for index in self.layers)
        return ranks[0] if len(set(ranks)) == 1 else ranks

    @property
    def state(self) -> str:
        """What it does at present: `acts` or `off`, and `trains` or `frozen` if so."""
        more = ", trains" if self.trains else ", frozen" if self.frozen else ""
        return ("acts" if self.acting else "off") + more

    def __str__(self) -> str:
        """Describe it in one line."""
        places = [_place(site, ranks) for site, ranks in self.sites.items()]
        opened = f", with {', '.join(self.train)}" if self.train else ""
        return (
            f"{self.name}: {' and '.join(places)}, scale {self.scale:g}, "
            f"{self.parameters:,} parameters{opened} ({self.state})"
        )


class Fields(tuple[FieldInfo, ...]):
    """The fields of a model, in the order in which it got them; `fields["law"]` finds one by name."""

    @overload
    def __getitem__(self, key: SupportsIndex | str) -> FieldInfo: ...
    @overload
    def __getitem__(self, key: slice) -> Fields: ...
    def __getitem__(self, key: SupportsIndex | str | slice) -> FieldInfo | Fields:
        """Return a field by name or position.

        Raises:
            SteerError: no field has that name.
        """
        if isinstance(key, slice):
            return Fields(super().__getitem__(key))
        if not isinstance(key, str):
            return super().__getitem__(key)
        for field in self:
            if field.name == key:
                return field
        raise SteerError(f"no field is called {key!r}; fields here: {', '.join(field.name for field in self)}.")

    def __contains__(self, field: object) -> bool:
        return super().__contains__(field) or field in [each.name for each in self]

    def __str__(self) -> str:
        """Print one line for every field."""
        return "\n".join(map(str, self))


@dataclass(frozen=True)
class Summary:
    """What `summary` found; printed, it is a short text."""

    backbone: str  # its registered name
    path: str  # where in the model it stands
    blocks: int
    width: int | tuple[int, ...]  # of the stream; a tuple where it changes
    fields: Fields
    acting: Asked  # what acts, as `use` takes it
    trainable: int  # parameters that train at present
    total: int  # all parameters, fields included
    on: str = "all"  # on which tokens it acts, as `use` takes it

    @property
    def share(self) -> float:
        """Trainable share of all parameters, from 0 to 1."""
        return self.trainable / self.total if self.total else 0.0

    def __str__(self) -> str:
        """Print as a few aligned lines."""
        width = str(self.width) if isinstance(self.width, int) else ", ".join(map(str, self.width))
        where = self.path or "the model itself"
        lines = [f"backbone   {self.backbone} at {where}, {self.blocks} blocks, width {width}"]
        lines += [f"field      {field}" for field in self.fields]
        if self.acting is not None and not (isinstance(self.acting, str) and self.on == "all"):
            lines.append(f"mix        {self.acting}" + f" on the {self.on}" * (self.on != "all"))
        lines.append(f"trainable  {self.trainable:,} of {self.total:,} parameters ({self.share:.2%})")
        return "\n".join(lines)


def summary(model: nn.Module) -> Summary:
    """Return which backbone was found, what steers it, and how many parameters train.

    Raises:
        SteerError: the model is not steered.
    """
    base, state = steering_of(model)
    widths, every = state.backbone.widths, list(base.parameters())
    return Summary(
        backbone=state.backbone.name,
        path=state.backbone.path,
        blocks=len(widths),
        width=widths[0] if len(set(widths)) == 1 else widths,
        fields=fields(base),
        acting=state.mix.asked(),
        trainable=sum(p.numel() for p in every if p.requires_grad),
        total=sum(p.numel() for p in every),
        on=state.mix.on,
    )


def fields(model: nn.Module) -> Fields:
    """List the fields of a model, with rank, site, layers, number of parameters and state.

    Raises:
        SteerError: the model is not steered.
    """
    _, state = steering_of(model)
    return Fields(
        FieldInfo(
            **vars(spec),
            parameters=sum(p.numel() for p in state.parameters(name)),
            acting=name in state.mix.names,
            trains=state.trains(name),
            frozen=not state.wish.get(name, True),
        )
        for name, spec in state.specs.items()
    )


def _place(site: str, by_block: Mapping[int, int]) -> str:
    """Write where and with what rank a field runs: `rank 4 beside the mixer of blocks 0–3`."""
    ranks = sorted(set(by_block.values()))
    rank = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    return f"rank {rank} {'after' if site == 'after' else f'beside the {site} of'} {_ranges(sorted(by_block))}"


def _ranges(indices: Sequence[int]) -> str:
    """Write indices briefly: `blocks 0–3, 7`."""
    runs = [list(run) for _, run in groupby(enumerate(indices), lambda pair: pair[1] - pair[0])]  # what follows on
    parts = [f"{run[0][1]}–{run[-1][1]}" if len(run) > 1 else str(run[0][1]) for run in runs]
    return f"block{'s' if len(indices) > 1 else ''} {', '.join(parts)}"
