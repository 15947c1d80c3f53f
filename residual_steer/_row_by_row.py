"""Many fields in one batch, each multiplied with its own rows alone.

Side by side, as one field of rank Σr, every row pays for every field. Here a row pays for its own, whatever else the
batch holds: on a CPU one product after the other, without a copy of any weight; elsewhere all of them at once, as a
batched product of weights that are gathered by row. It is the same sum, rounded otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from ._internals import is_plainly_called
from .field import ACTIVATIONS, HRes

_PRODUCT = 2**16  # multiplications that take as long as what a product of its own takes more; measured on a CPU


class Run(NamedTuple):
    """Consecutive units of a batch, rows or tokens, with the same field."""

    start: int
    stop: int
    name: str


class _Parts(NamedTuple):
    """What a field computes with, found once a call: to find a module's attributes takes as long as a small product."""

    down: Tensor
    down_bias: Tensor | None
    up: Tensor
    up_bias: Tensor | None
    scale: float
    activation: Callable[[Tensor], Tensor]


def runs_of(names: Sequence[str | None]) -> tuple[Run, ...]:
    """Return where each field acts, given which one does on every unit.

    >>> runs_of(["law", "law", None, "art"])
    (Run(start=0, stop=2, name='law'), Run(start=3, stop=4, name='art'))
    """
    found, start = [], 0
    for name, units in groupby(names):
        stop = start + sum(1 for _ in units)
        if name is not None:
            found.append(Run(start, stop, name))
        start = stop
    return tuple(found)


def saves_time(z: Tensor, runs: int, ranks: Sequence[int]) -> bool:
    """Return whether as many products are faster than one with all fields, whose width is Σr: the work that it spares.

    The stream z is `(batch, …)`, its width in any dimension.
    """
    return z.numel() * (sum(ranks) - max(ranks)) > runs * _PRODUCT


def add_runs(
    y: Tensor, z: Tensor, runs: Sequence[Run], units: int, fields: Mapping[str, HRes], dtype: torch.dtype
) -> Tensor:
    """Return y + λ·H(z) in y's own dtype, with each unit's own field (eq. 1).

    Args:
        y: the stream that leaves, `(batch, length, width)` or `(batch, width, height, width)`.
        z: the stream that entered, of the same shape.
        runs: which field acts where, in ascending order, from unit 0 to `units`.
        units: into how many equal parts the rows of the batch, or its tokens, fall.
        fields: the fields, by name.
        dtype: what the frozen block computes in.
    """
    first = fields[runs[0].name]
    last = first.channels == -1 and y.is_contiguous()
    alike = _alike(runs, fields) if last else None
    if alike is not None:
        if y.device.type != "cpu" and units <= len(y):
            return _gathered(y, z, runs, units, alike, dtype)
        plain = y.dtype == dtype == alike[runs[0].name].up.dtype and not torch.is_autocast_enabled("cpu")
        if plain and not torch.is_grad_enabled():
            return _in_place(y, z, runs, units, alike)
    return _one_by_one(y, z, runs, units, fields, dtype)


def _alike(runs: Sequence[Run], fields: Mapping[str, HRes]) -> dict[str, _Parts] | None:
    """Return the tensors of the fields that act, by name, if their shapes and activation are the same; else None.

    Nor may there be dropout at present, or what another library hung on a projection.
    """
    kinds, found = set(), {}
    for name in {run.name for run in runs}:
        field = fields[name]
        down, up = field.down, field.up
        if not (is_plainly_called(down) and is_plainly_called(up)) or (field.drop is not None and field.drop.training):
            return None
        parts = found[name] = _Parts(
            down.weight, down.bias, up.weight, up.bias, field.scale, ACTIVATIONS[field.activation]
        )
        kinds.add((field.rank, field.activation, parts.down_bias is None, parts.up_bias is None, parts.up.dtype))
    return found if len(kinds) == 1 else None


def _one_by_one(
    y: Tensor, z: Tensor, runs: Sequence[Run], units: int, fields: Mapping[str, HRes], dtype: torch.dtype
) -> Tensor:
    """Add any fields, one after the other, as each would be added alone."""
    by_token = units > len(y)
    shape = y.shape
    if by_token:
        y, z = y.flatten(0, 1), z.flatten(0, 1)
    size, at, parts = len(y) // units, 0, []
    for run in runs:
        start, stop = run.start * size, run.stop * size
        parts += [y[at:start], fields[run.name].add_to(y[start:stop], z[start:stop], dtype)]
        at = stop
    parts.append(y[at:])
    return torch.cat([part for part in parts if len(part)] or [y]).view(shape)


def _in_place(y: Tensor, z: Tensor, runs: Sequence[Run], units: int, fields: Mapping[str, _Parts]) -> Tensor:
    """Add fields that are alike by products that write straight into the result, without gradients."""
    width, rank = y.shape[-1], len(fields[runs[0].name].down)
    before, entered = y.view(-1, width), z.reshape(-1, z.shape[-1]).to(y.dtype)
    left, hidden, size = torch.empty_like(before), entered.new_empty(len(before), rank), len(before) // units
    placed, at = [(slice(run.start * size, run.stop * size), fields[run.name]) for run in runs], 0
    for place, field in placed:
        if place.start > at:
            left[at : place.start], hidden[at : place.start] = before[at : place.start], 0
        at = place.stop
        if field.down_bias is None:
            torch.mm(entered[place], field.down.t(), out=hidden[place])
        else:
            torch.addmm(field.down_bias, entered[place], field.down.t(), out=hidden[place])
    left[at:], hidden[at:] = before[at:], 0
    hidden = placed[0][1].activation(hidden)
    for place, field in placed:
        to = left[place]
        if field.up_bias is None:
            torch.addmm(before[place], hidden[place], field.up.t(), alpha=field.scale, out=to)
        else:
            torch.add(before[place], field.up_bias, alpha=field.scale, out=to)
            to.addmm_(hidden[place], field.up.t(), alpha=field.scale)
    return left.view(y.shape)


def _gathered(
    y: Tensor, z: Tensor, runs: Sequence[Run], units: int, fields: Mapping[str, _Parts], dtype: torch.dtype
) -> Tensor:
    """Add fields that are alike by two batched products of their weights, gathered by unit."""
    own: list[_Parts | None] = [None] * units
    for run in runs:
        own[run.start : run.stop] = [fields[run.name]] * (run.stop - run.start)

    def gather(some: Tensor, part: int) -> Tensor:
        """Stack the weights or biases of all units, zeros where no field acts."""
        none = None if all(own) else torch.zeros_like(some)
        return torch.stack([none if parts is None else parts[part] for parts in own]).to(dtype)  # type: ignore[misc]

    down, down_bias, up, up_bias, scale, activation = fields[runs[0].name]
    entered = z.reshape(units, -1, z.shape[-1]).to(dtype)
    hidden = torch.bmm(entered, gather(down, 0).transpose(1, 2))
    if down_bias is not None:
        hidden = hidden + gather(down_bias, 1).unsqueeze(1)
    hidden = activation(hidden)
    moved = torch.bmm(hidden, gather(up, 2).transpose(1, 2))
    if up_bias is not None:
        moved = moved + gather(up_bias, 3).unsqueeze(1)
    scales = [0.0 if parts is None else parts.scale for parts in own]
    if len({*scales} - {0.0}) > 1:
        moved = moved * torch.tensor(scales, dtype=torch.float64, device="cpu").to(moved).view(-1, 1, 1)
        return (y + moved.view(y.shape)).to(y.dtype)
    return torch.add(y, moved.view(y.shape), alpha=scale).to(y.dtype)
