"""summary and fields: what there is to see of a steered model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import overload

from torch import nn

from ._controller import steering_of
from .errors import SteerError
from .routing import Asked

__all__ = ["FieldInfo", "Fields", "Summary", "fields", "summary"]


@dataclass(frozen=True)
class FieldInfo:
    """One field of a model.

    Attributes:
        name: how `use` selects it.
        site: at which point of a block it runs.
        layers: the steered blocks.
        ranks: block index to rank.
        scale: λ.
        activation: σ.
        bias: whether its projections have biases.
        dropout: of its hidden units, in training mode.
        train: the base tensors that it trained along, by name.
        parameters: number of its own parameters.
        acting: whether it acts at present, on any row.
        trains: whether it trains at present.
        frozen: whether `freeze` keeps it from training.
    """

    name: str
    site: str
    layers: tuple[int, ...]
    ranks: Mapping[int, int]
    scale: float
    activation: str
    bias: bool
    dropout: float
    train: tuple[str, ...]
    parameters: int
    acting: bool
    trains: bool
    frozen: bool

    @property
    def rank(self) -> int | tuple[int, ...]:
        """The rank; one for every steered block where they differ."""
        ranks = tuple(self.ranks[index] for index in self.layers)
        return ranks[0] if len(set(ranks)) == 1 else ranks

    @property
    def state(self) -> str:
        """What it does at present: `acts` or `off`, and `trains` or `frozen` if so."""
        more = ", trains" if self.trains else ", frozen" if self.frozen else ""
        return ("acts" if self.acting else "off") + more

    def __str__(self) -> str:
        """Describe it in one line."""
        ranks = sorted(set(self.ranks.values()))
        rank = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
        opened = f", with {', '.join(self.train)}" if self.train else ""
        return (
            f"{self.name}: rank {rank} beside the {self.site} of {_ranges(self.layers)}, scale {self.scale:g}, "
            f"{self.parameters:,} parameters{opened} ({self.state})"
        )


class Fields(Sequence[FieldInfo]):
    """The fields of a model, in the order in which it got them; `fields["law"]` finds one by name."""

    def __init__(self, found: Sequence[FieldInfo]) -> None:
        self._found = tuple(found)

    @overload
    def __getitem__(self, key: int | str) -> FieldInfo: ...
    @overload
    def __getitem__(self, key: slice) -> Fields: ...
    def __getitem__(self, key: int | str | slice) -> FieldInfo | Fields:
        """Return a field by name or position.

        Raises:
            SteerError: no field has that name.
        """
        if isinstance(key, slice):
            return Fields(self._found[key])
        if isinstance(key, int):
            return self._found[key]
        for field in self._found:
            if field.name == key:
                return field
        raise SteerError(f"no field is called {key!r}; fields here: {', '.join(field.name for field in self._found)}.")

    def __len__(self) -> int:
        return len(self._found)

    def __contains__(self, field: object) -> bool:
        return field in self._found or field in {each.name for each in self._found}

    def __str__(self) -> str:
        """Print one line for every field."""
        return "\n".join(map(str, self._found))

    def __repr__(self) -> str:
        return f"Fields({list(self._found)!r})"


@dataclass(frozen=True)
class Summary:
    """What `summary` found; printed, it is a short text.

    Attributes:
        backbone: registered name of the backbone.
        path: where in the model it stands.
        blocks: number of blocks.
        width: width of the stream; a tuple where it changes.
        fields: the fields.
        acting: what acts, as `use` takes it.
        trainable: parameters that train at present.
        total: all parameters, fields included.
    """

    backbone: str
    path: str
    blocks: int
    width: int | tuple[int, ...]
    fields: Fields
    acting: Asked
    trainable: int
    total: int

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
        if self.acting is not None and not isinstance(self.acting, str):
            lines.append(f"mix        {self.acting}")
        lines.append(f"trainable  {self.trainable:,} of {self.total:,} parameters ({self.share:.2%})")
        return "\n".join(lines)


def summary(model: nn.Module) -> Summary:
    """Say which backbone was found, what steers it, and how many parameters train.

    Raises:
        SteerError: the model is not steered.
    """
    base, state = steering_of(model)
    widths = state.backbone.widths
    every = list(base.parameters())
    return Summary(
        backbone=state.backbone.name,
        path=state.backbone.path,
        blocks=len(widths),
        width=widths[0] if len(set(widths)) == 1 else widths,
        fields=fields(base),
        acting=state.mix.asked(),
        trainable=sum(p.numel() for p in every if p.requires_grad),
        total=sum(p.numel() for p in every),
    )


def fields(model: nn.Module) -> Fields:
    """List the fields of a model, with rank, site, layers, number of parameters and state.

    Raises:
        SteerError: the model is not steered.
    """
    _, state = steering_of(model)
    return Fields(
        [
            FieldInfo(
                name=name,
                site=spec.site,
                layers=tuple(sorted(spec.ranks)),
                ranks=dict(spec.ranks),
                scale=spec.scale,
                activation=spec.activation,
                bias=spec.bias,
                dropout=spec.dropout,
                train=spec.train,
                parameters=sum(p.numel() for module in state.fields(name).values() for p in module.parameters()),
                acting=name in state.mix.names,
                trains=state.trains(name),
                frozen=not state.wish.get(name, True),
            )
            for name, spec in state.specs.items()
        ]
    )


def _ranges(indices: Sequence[int]) -> str:
    """Write indices briefly: `blocks 0–3, 7`."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][-1] + 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    text = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in runs)
    return f"block{'s' if len(indices) > 1 else ''} {text}"
