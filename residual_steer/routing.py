"""Routing: which fields act, on which rows of a batch, how strongly, and their sum as two matrix products.

What `use` takes becomes a `Mix`, a table of coefficients `(1 or rows, fields)`. Fields side by side at one point are
one field of rank Σr: their projections are concatenated, and every segment of the hidden units is multiplied by its
field's coefficient (`Blend`). Selecting, composing, negating and routing by row are then the same two products with
another table.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from numbers import Real
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import SteerError
from .field import ACTIVATIONS, HRes, add_product

__all__ = ["OFF", "Asked", "Blend", "Mix", "Route", "Tables", "route", "row_factor"]

Asked = str | Mapping[str, float] | Sequence[str | None] | None


@dataclass(frozen=True)
class Mix:
    """What `use` was asked for, as a table of coefficients.

    Attributes:
        names: the fields with a coefficient other than 0, in the order in which the model got them.
        table: coefficients, `(rows, len(names))`; one row stands for all rows of any batch.
        rows: number of rows, where the mix was given row by row; None where one row stands for all.
        by_name: whether it was given as a name or None.
    """

    names: tuple[str, ...] = ()
    table: tuple[tuple[float, ...], ...] = ((),)
    rows: int | None = None
    by_name: bool = True

    @classmethod
    def parse(cls, asked: Asked, known: Iterable[str]) -> Mix:
        """Turn what a user says into a table.

        Args:
            asked: None, a name, weights by name, or a name or None for every row.
            known: the model's fields.

        Raises:
            SteerError: it is none of these, names no field of the model, is empty, or has a weight that is no finite
                number.
        """
        known = tuple(known)
        if asked is None or isinstance(asked, str):
            return cls() if asked is None else cls((_known(asked, known),), ((1.0,),))
        if isinstance(asked, Mapping):
            weights = {_known(name, known): _weight(name, weight) for name, weight in asked.items()}
            names = tuple(name for name in known if weights.get(name))
            return cls(names, (tuple(weights[name] for name in names),), by_name=False)
        if not isinstance(asked, Sequence) or isinstance(asked, (bytes, bytearray)):
            raise SteerError(
                "`use` takes None, a field's name, weights {name: weight}, or a list with a name or None for every row "
                f"of the batch; received {asked!r}."
            )
        rows = [None if name is None else _known(name, known) for name in asked]
        if not rows:
            raise SteerError("a list for `use` has a name or None for every row of the batch; received an empty one.")
        names = tuple(name for name in known if name in set(rows))
        table = tuple(tuple(float(row == name) for name in names) for row in rows)
        return cls(names, table, rows=len(rows), by_name=False)

    @property
    def alone(self) -> str | None:
        """The one field that acts with weight 1 on every row, if that is all there is."""
        return self.names[0] if len(self.names) == 1 and set(self.table) == {(1.0,)} else None

    @property
    def differs(self) -> bool:
        """Whether some rows of a batch meet other fields than other rows do."""
        return len(set(self.table)) > 1

    @cached_property
    def columns(self) -> dict[str, tuple[float, ...]]:
        """The coefficients of each field that acts, one for every row of the table."""
        return dict(zip(self.names, zip(*self.table, strict=True), strict=True))

    def asked(self) -> Asked:
        """Return what `use` takes to select this mix again."""
        if self.rows is not None:
            return [next((name for name, on in zip(self.names, row, strict=True) if on), None) for row in self.table]
        if self.by_name:
            return self.alone
        return dict(zip(self.names, self.table[0], strict=True))

    def __str__(self) -> str:
        """Write it briefly, with rows counted rather than listed."""
        if self.rows is None:
            return str(self.alone) if self.by_name else repr(self.asked())
        counts = [f"{int(sum(self.columns[name]))} {name}" for name in self.names]
        silent = sum(not any(row) for row in self.table)
        return f"rows: {', '.join(counts + [f'{silent} None'] * bool(silent))}"


OFF = Mix()


def row_factor(rows: int, batch: int) -> int:
    """Return how many consecutive rows of a batch one row of a table stands for.

    It is 1, or more where each row was repeated in place: by `generate` for beams and `num_return_sequences`, by models
    that flatten `(rows, choices)` or `(rows, tokens)` into one dimension. A table of one row stands for all.

    Raises:
        SteerError: the batch has no multiple of that many rows.
    """
    if batch % rows:
        raise SteerError(
            f"the list given to `use` has {rows} rows, and this batch has {batch}. Give one name or None for every row."
        )
    return batch // rows


def _known(name: object, known: tuple[str, ...]) -> str:
    if not isinstance(name, str) or name not in known:
        raise SteerError(f"`use` takes names of fields of this model ({', '.join(known)}); received {name!r}.")
    return name


def _weight(name: str, weight: object) -> float:
    if isinstance(weight, bool) or not isinstance(weight, Real) or not math.isfinite(weight):
        raise SteerError(f"the weight of a field is a finite number; received {weight!r} for {name!r}.")
    return float(weight)


class Route(NamedTuple):
    """What a mix asks of one point.

    Attributes:
        on: whether anything is added there.
        rows: for how many rows of a batch, None where all rows are alike.
        alone: the one field that acts on every row alike, and its coefficient, where that is all.
        some: the fields that act, otherwise.
        every: all fields that stand there, as `torch.compile` computes them: neither other weights nor other rows make
            another graph.
    """

    on: bool = False
    rows: int | None = None
    alone: tuple[str, float] | None = None
    some: Blend | None = None
    every: Blend | None = None


def route(mix: Mix, fields: Mapping[str, HRes], tables: Tables) -> Route:
    """Return what a mix asks of a point with these fields. Points with the same fields share `tables`."""
    acting = {name: field for name, field in fields.items() if name in mix.names}
    alone, some, every = None, None, None
    if acting:
        name, *others = acting
        if not others and len(set(mix.columns[name])) == 1:
            alone = name, mix.columns[name][0]
        else:
            some = Blend.of(mix, acting, tables)
    if fields and not mix.by_name:
        every = some if some is not None and acting == fields else Blend.of(mix, fields, tables)
    return Route(bool(acting) or every is not None, mix.rows, alone, some, every)


Tables = dict[Any, tuple[Tensor, Tensor]]  # those made for one selection: most points of a model hold the same fields


@dataclass(frozen=True)
class Blend:
    """What a mix asks of the fields at one point, as tensors on their device.

    Attributes:
        names: which fields, those with the same activation and dropout in a row.
        table: coefficients times λ, `(1 or rows, fields)`.
        gates: the same for every hidden unit, `(1 or rows, Σ rank)`.
        runs: activation, dropout and number of units of each run of like fields.
    """

    names: tuple[str, ...]
    table: Tensor
    gates: Tensor
    runs: tuple[tuple[str, float, int], ...]

    @classmethod
    def of(cls, mix: Mix, fields: Mapping[str, HRes], tables: Tables) -> Blend:
        """Lay out the coefficients that `mix` has for `fields`, zero for those that it does not name."""
        names = tuple(sorted(fields, key=lambda name: _kind(fields[name])))  # stable: the order of the model otherwise
        chosen = [fields[name] for name in names]
        weight = chosen[0].down.weight
        key = (names, tuple((field.scale, field.rank) for field in chosen), weight.dtype, weight.device)
        if key not in tables:
            tables[key] = _tables(mix, names, chosen, weight)
        table, gates = tables[key]
        runs = tuple((*kind, sum(field.rank for field in run)) for kind, run in groupby(chosen, _kind))
        return cls(names, table, gates, runs)

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
        hidden = self._activate(hidden, chosen[0].training)
        hidden = hidden * gates.view(-1, *[1] * (z.dim() - 2), gates.shape[-1]).to(hidden.dtype)
        weight = torch.cat([field.up.weight for field in chosen], dim=1)
        return add_product(y, hidden, weight, _bias(chosen, table), channels=channels)

    def _activate(self, hidden: Tensor, training: bool) -> Tensor:
        """Apply each run's activation and dropout to its units."""
        done = []
        for (activation, dropout, _), part in zip(
            self.runs, torch.split(hidden, [size for _, _, size in self.runs], dim=-1), strict=True
        ):
            unit = ACTIVATIONS[activation](part)
            done.append(F.dropout(unit, dropout, training) if dropout else unit)
        return done[0] if len(done) == 1 else torch.cat(done, dim=-1)


@torch.inference_mode(False)  # or a backward pass could not keep them
def _tables(mix: Mix, names: Sequence[str], fields: Sequence[HRes], like: Tensor) -> tuple[Tensor, Tensor]:
    """Return coefficients times λ, by row, of fields and of their hidden units."""
    off = (0.0,) * len(mix.table)
    columns = [
        [weight * field.scale for weight in mix.columns.get(name, off)]
        for name, field in zip(names, fields, strict=True)
    ]
    dtype = torch.promote_types(like.dtype, torch.float32)
    table = torch.tensor(columns, dtype=dtype, device="cpu").t().contiguous()
    units = [place for place, field in enumerate(fields) for _ in range(field.rank)]
    device = torch.device("cpu") if like.is_meta else like.device  # an offloaded field's weights come when it is called
    return table.to(device), table[:, units].to(device)


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
