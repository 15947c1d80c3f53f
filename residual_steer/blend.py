"""Several fields at one point, computed as one.

Fields side by side are one field of rank Σr: their projections are concatenated, and every segment of the hidden units
is multiplied by its field's coefficient. Selecting, composing, negating and routing by row are then the same two matrix
products with another table of coefficients.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .field import ACTIVATIONS, HRes, add_product
from .mix import Mix, row_factor

__all__ = ["Blend", "Tables"]

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
        """Return y + Σ_f c_f·λ_f·H_f(z), where the coefficients c may differ from row to row (eq. 1).

        Args:
            y: the stream that leaves, `(batch, length, width)` or `(batch, width, height, width)`.
            z: the stream that entered, of the same shape.
            dtype: what the frozen block computes in.
            fields: the point's fields, by name.

        Raises:
            SteerError: the batch does not fit the rows of the table.
        """
        chosen: list[HRes] = [fields[name] for name in self.names]  # type: ignore[misc]
        table, gates = self.table, self.gates
        if len(table) > 1:
            factor = row_factor(len(table), y.shape[0])
            if factor != 1:
                table, gates = table.repeat_interleave(factor, 0), gates.repeat_interleave(factor, 0)
        channels = chosen[0].channels
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
    return table.to(like.device), table[:, units].to(like.device)


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
    biases = torch.stack([fields[place].up.bias for place in biased])
    return (table if len(biased) == len(fields) else table[:, biased]).to(biases.dtype) @ biases


def _kind(field: HRes) -> tuple[str, float]:
    return field.activation, field.dropout
