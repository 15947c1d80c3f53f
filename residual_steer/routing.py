"""Routing: which fields act, on which rows of a batch, how strongly, and their sum as two matrix products.

Fields side by side at one point are one field of rank Σr: their projections are concatenated, and every segment of the
hidden units is multiplied by its field's coefficient in a table `(1 or rows, fields)`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import groupby
from operator import itemgetter
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._checks import check_choice, check_number
from ._row_by_row import Run, add_runs, runs_of, saves_time
from ._segments import Finder, Segments
from .errors import SteerError
from .field import ACTIVATIONS, HRes, add_product

__all__ = ["OFF", "SIDE_BY_SIDE", "Asked", "Blend", "Mix", "Route", "Tables", "misfit", "route", "row_factor"]

Asked = str | Mapping[str, float] | Sequence[str | None] | None


@dataclass(frozen=True)
class Mix:
    """What `use` was given, as a table of coefficients."""

    names: tuple[str, ...] = ()  # the fields with a coefficient other than 0, sorted
    table: tuple[tuple[float, ...], ...] = ((),)  # (rows, fields); one row stands for all rows of any batch
    rows: int | None = None  # number of rows, where it was given row by row
    by_name: bool = True  # whether it was given as a name or None
    on: str = "all"  # on which tokens the fields act, "all" or "prompt"
    segments: Segments | Finder | None = field(default=None, compare=False)  # where rows are tokens

    @classmethod
    def parse(cls, asked: Asked, known: Collection[str], on: str = "all", tokens: Tensor | None = None) -> Mix:
        """Return what `use` takes as a mix of known fields; raise if it is none."""
        mix = replace(cls._parse(asked, known), on=check_choice("on", on, ("all", "prompt")))
        if tokens is None:
            return mix
        if mix.rows is None or mix.on != "all":
            raise SteerError(
                "`tokens` is for a list with a name or None for every text in the batch, and on='all'; received "
                f"{asked!r:.200} and on={on!r}."
            )
        return replace(mix, segments=Segments.of(tokens, mix.by_row))

    def again(self, known: Collection[str]) -> Mix:
        """Return the same mix, if its fields are still there; raise if they are not."""
        return replace(Mix.parse(self.asked(), known, self.on), segments=self.segments)

    @classmethod
    def _parse(cls, asked: Asked, known: Collection[str]) -> Mix:
        if asked is None or isinstance(asked, str):
            return cls() if asked is None else cls((_known(asked, known),), ((1.0,),))
        if isinstance(asked, Mapping):
            weights = {
                _known(name, known): check_number(name, weight, meaning="a weight") for name, weight in asked.items()
            }
            names = tuple(sorted(name for name, weight in weights.items() if weight))
            return cls(names, (tuple(weights[name] for name in names),), by_name=False)
        if not isinstance(asked, Sequence) or isinstance(asked, (bytes, bytearray)):
            raise SteerError(
                "`use` takes None, a field's name, weights {name: weight}, or a list with a name or None for every row "
                f"of the batch; received {asked!r}."
            )
        rows = [None if name is None else _known(name, known) for name in asked]
        if not rows:
            raise SteerError("a list for `use` has a name or None for every row of the batch; received an empty one.")
        names = tuple(sorted({name for name in rows if name is not None}))
        table = tuple(tuple(float(row == name) for name in names) for row in rows)
        return cls(names, table, rows=len(rows), by_name=False)

    @property
    def differs(self) -> bool:
        """Whether some rows of a batch meet other fields than other rows do."""
        return len(set(self.table)) > 1

    @cached_property
    def columns(self) -> dict[str, tuple[float, ...]]:
        """The coefficients of each field that acts, one for every row of the table."""
        return dict(zip(self.names, zip(*self.table, strict=True), strict=True))

    @cached_property
    def by_row(self) -> list[str | None]:
        """The field of each row of the table, where there is one at most."""
        return [next((name for name, on in zip(self.names, row, strict=True) if on), None) for row in self.table]

    @cached_property
    def runs(self) -> tuple[Run, ...]:
        """Where each field acts, row by row; empty where every row gets the same."""
        return runs_of(self.by_row) if self.differs else ()

    def asked(self) -> Asked:
        """Return what `use` takes to select this mix again."""
        if self.rows is not None:
            return list(self.by_row)
        if self.by_name:
            return self.names[0] if self.names else None
        return dict(zip(self.names, self.table[0], strict=True))

    @property
    def watched(self) -> bool:
        """Whether every call has to be looked at."""
        return self.rows is not None or self.by_token

    @property
    def by_token(self) -> bool:
        """Whether other fields act on some tokens of a row than on others."""
        return self.on != "all" or self.segments is not None

    def check_whole(self, what: str) -> None:
        """Raise if the fields act on some tokens alone, which `what` cannot follow."""
        if self.on != "all":
            raise SteerError(f"{what} has its fields act on every token; now they act on the {self.on} alone.")
        if self.segments is not None:
            raise SteerError(f"{what} has fields act by row; now they act on the `tokens` of one batch.")

    def __str__(self) -> str:
        """Write it briefly, with rows counted rather than listed."""
        return self._brief() + f" on the {self.on}" * (self.on != "all") + " by token" * (self.segments is not None)

    def _brief(self) -> str:
        if self.rows is None:
            return str(self.asked())
        counts = [f"{int(sum(self.columns[name]))} {name}" for name in self.names]
        silent = sum(not any(row) for row in self.table)
        return f"rows: {', '.join(counts + [f'{silent} None'] * bool(silent))}"


OFF = Mix()
SIDE_BY_SIDE = 16  # as many fields at one point are computed together in a compiled graph


def _known(name: object, known: Collection[str]) -> str:
    if not isinstance(name, str) or name not in known:
        raise SteerError(f"`use` takes names of fields of this model ({', '.join(known)}); received {name!r}.")
    return name


def misfit(rows: int, batch: int, more: str = "") -> SteerError:
    """Return the error of a batch that has not the rows of the list that `use` was given."""
    given = f"the list given to `use` has {rows} rows, and this batch has {batch}"
    return SteerError(f"{given}. Give one name or None for every row{more}.")


def row_factor(rows: int, batch: int) -> int:
    """Return how many consecutive rows of a batch one row of a table stands for; raise if that is no whole number."""
    # more than 1 where `generate` repeats rows, and in models that flatten (rows, choices) or (rows, tokens) into one
    if batch % rows:
        raise misfit(rows, batch)
    return batch // rows


_EMPTY = torch.empty(0, device="cpu")
Tables = dict[Any, tuple[Tensor, Tensor]]  # those made for one selection: most points of a model hold the same fields


@dataclass(frozen=True)
class Blend:
    """Fields at one point side by side, as one of rank Σr, those with the same activation and dropout in a row."""

    names: tuple[str, ...]
    ranks: tuple[int, ...]
    kinds: tuple[tuple[str, float], ...]  # activation and dropout of each
    runs: tuple[tuple[str, int, int], ...]  # activation, first field and number of units of each run of like fields
    table: Tensor  # coefficients times λ, (1 or rows, fields)
    gates: Tensor  # the same for every hidden unit, (1 or rows, Σ rank)
    rows: tuple[Run, ...] = ()  # which field acts on which rows, where they differ

    @classmethod
    def of(cls, fields: Mapping[str, HRes]) -> Blend:
        """Put fields side by side, without coefficients."""
        chosen = sorted((_kind(field), name, field.rank) for name, field in fields.items())
        kinds, names, ranks = zip(*chosen, strict=True)
        alike = [(kind, sum(rank for _, _, rank in run)) for kind, run in groupby(chosen, itemgetter(0))]
        runs = tuple((kind[0], kinds.index(kind), size) for kind, size in alike)
        return cls(names, ranks, kinds, runs, table=_EMPTY, gates=_EMPTY)

    def fits(self, fields: Mapping[str, HRes]) -> bool:
        """Return whether some of the fields are still of the kind that they were of."""
        return all(self.kinds[self.names.index(name)] == _kind(field) for name, field in fields.items())

    def weighed(self, mix: Mix, acting: Mapping[str, HRes], tables: Tables, like: Tensor) -> Blend:
        """Return it with the coefficients of a mix, 0 for fields that do not act, on the device of a weight."""
        key = (self.names, self.ranks, tuple(field.scale for field in acting.values()), like.dtype, like.device)
        if key not in tables:
            dtype = torch.promote_types(like.dtype, torch.float32)
            table = torch.zeros(len(mix.table), len(self.names), dtype=dtype, device="cpu")
            for name, field in acting.items():
                column = [weight * field.scale for weight in mix.columns[name]]
                table[:, self.names.index(name)] = torch.tensor(column, dtype=dtype, device="cpu")
            gates = table.repeat_interleave(torch.tensor(self.ranks, device="cpu"), 1)
            device = torch.device("cpu") if like.is_meta else like.device  # offloaded weights come when they are used
            tables[key] = table.to(device), gates.to(device)
        here = mix.runs
        if len(acting) < len(mix.names):
            here = tuple(run for run in here if run.name in acting)
        return replace(self, table=tables[key][0], gates=tables[key][1], rows=here)

    def add_to(self, y: Tensor, z: Tensor, dtype: torch.dtype, fields: nn.ModuleDict) -> Tensor:
        """Return y + Σ_f c_f·λ_f·H_f(z) in y's own dtype, where the coefficients c may differ from row to row (eq. 1).

        Args:
            y: the stream that leaves, `(batch, length, width)` or `(batch, width, height, width)`.
            z: the stream that entered, of the same shape.
            dtype: what the frozen block computes in.
            fields: the point's fields, by name.

        Raises:
            SteerError: the batch does not fit the rows of the table.
        """
        chosen: list[HRes] = [fields[name] for name in self.names]  # type: ignore[misc]
        if not torch.compiler.is_compiling() and self.rows and saves_time(z, len(self.rows), self.ranks):
            row_factor(len(self.table), len(y))
            return add_runs(y, z, self.rows, len(self.table), dict(zip(self.names, chosen, strict=True)), dtype)
        table, gates = self.table.to(y.device), self.gates.to(y.device)
        if len(table) > 1:
            factor = row_factor(len(table), y.shape[0])
            if factor != 1:
                table, gates = table.repeat_interleave(factor, 0), gates.repeat_interleave(factor, 0)
        channels = chosen[0].channels
        if not torch.compiler.is_compiling() and not all(field.plain for field in chosen):
            for field, column in zip(chosen, table.unbind(1), strict=True):
                moved = field.up(field.hidden(z.movedim(channels, -1), dtype), dtype).movedim(-1, channels)
                y = (y + column.view(-1, *[1] * (y.dim() - 1)).to(moved.dtype) * moved).to(y.dtype)
            return y
        hidden = F.linear(z.movedim(channels, -1).to(dtype), *_down(chosen, dtype))
        hidden = self._activate(hidden, chosen)
        hidden = hidden * gates.view(-1, *[1] * (z.dim() - 2), gates.shape[-1]).to(hidden.dtype)
        weight = torch.cat([field.up.weight for field in chosen], dim=1)
        return add_product(y, hidden, weight, _bias(chosen, table), channels=channels)

    def _activate(self, hidden: Tensor, fields: Sequence[HRes]) -> Tensor:
        """Apply each run's activation and dropout to its units."""
        done = []
        for (activation, first, _), part in zip(
            self.runs, torch.split(hidden, [size for _, _, size in self.runs], dim=-1), strict=True
        ):
            unit = ACTIVATIONS[activation](part)
            drop = fields[first].drop
            done.append(unit if drop is None else drop(unit))
        return done[0] if len(done) == 1 else torch.cat(done, dim=-1)


class Route(NamedTuple):
    """What a mix asks of one point."""

    on: bool = False  # whether anything is added there
    rows: int | None = None  # for how many rows of a batch, None where all rows are alike
    alone: tuple[str, float] | None = None  # the one field that acts, on every row alike, and its coefficient
    some: Blend | None = None  # the fields that act, otherwise
    every: Blend | None = None  # all that stand there, for `torch.compile`: other weights and rows are the same graph
    many: bool = False  # whether too many stand there for that
    segments: Segments | None = None  # which of them acts on which tokens, where rows are tokens
    tokens: Tensor | None = None  # where they act in this call, (batch, length); None is everywhere

    @property
    def names(self) -> tuple[str, ...]:
        """The fields that act there."""
        return self.some.names if self.some else self.alone[:1] if self.alone else ()


def route(
    mix: Mix, acting: Mapping[str, HRes], every: Blend | None, tables: Tables, like: Tensor, *, many: bool = False
) -> Route:
    """Return what a mix asks of a point, where those fields of it act, and every one stands that may be computed."""
    alone, some = None, None
    if mix.segments is not None:
        here = mix.segments if isinstance(mix.segments, Segments) else None
        return Route(bool(acting), some=Blend.of(acting) if acting else None, segments=here)
    if len(acting) == 1 and len(set(mix.columns[next(iter(acting))])) == 1:
        alone = next((name, mix.columns[name][0]) for name in acting)
    elif acting:
        some = Blend.of(acting).weighed(mix, acting, tables, like)
    whole = None if every is None else every.weighed(mix, acting, tables, like)
    return Route(bool(acting or whole or many), mix.rows, alone, some, whole, many)


def _down(fields: Sequence[HRes], dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Return W_down and b_down of all fields side by side, `(Σ rank, width)` and `(Σ rank,)`, None without biases."""
    weight = torch.cat([field.down.weight for field in fields])
    if all(field.down.bias is None for field in fields):
        return weight.to(dtype), None
    none = weight.new_zeros(max(field.rank for field in fields))
    parts: list[Tensor] = [none[: field.rank] if field.down.bias is None else field.down.bias for field in fields]
    return weight.to(dtype), torch.cat(parts).to(dtype)


def _bias(fields: Sequence[HRes], table: Tensor) -> Tensor | None:
    """Return Σ_f c_f·λ_f·b_up of every row, `(1 or batch, width)`, or None without biases."""
    biased = [place for place, field in enumerate(fields) if field.up.bias is not None]
    if not biased:
        return None
    biases = torch.stack([cast(Tensor, fields[place].up.bias) for place in biased])
    return (table if len(biased) == len(fields) else table[:, biased]).to(biases.dtype) @ biases


def _kind(field: HRes) -> tuple[str, float]:
    return field.activation, field.dropout
