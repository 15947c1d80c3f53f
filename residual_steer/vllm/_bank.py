"""Many fields of one model as stacked tensors: a slot for each, and which slot every token of a step has.

All slots are one field of rank slots·rank: two matrix products, between which the units of a token that are not its
own are set to zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from residual_steer.config import Place
from residual_steer.field import ACTIVATIONS

from ._requests import Units


class Bank:
    """Slots for fields at every place of a model, and the table of the step that is being computed."""

    def __init__(self, width: int, slots: int, rank: int, *, device: torch.device | str, dtype: torch.dtype) -> None:
        self.width, self.slots, self.rank, self.dtype, self.device = width, slots, rank, dtype, device
        self.tables: dict[Place, tuple[Tensor, ...]] = {}  # as in `Units`, of all slots
        self.runs: list[dict[Place, Sequence[tuple[str, int]]]] = [{} for _ in range(slots)]  # of each slot
        self.rest()

    @torch.inference_mode()  # vLLM computes steps in it, and loads fields outside of it
    def put(self, slot: int, field: Mapping[Place, Units]) -> None:
        """Put a field into a slot, in the place of what was there."""
        places = *(slice(slot * self.rank, (slot + 1) * self.rank),) * 3, slice(slot, slot + 1)
        for place in field.keys() - self.tables.keys():
            sizes = (self.slots * self.rank, self.width), (self.slots * self.rank,)
            shapes = *sizes, sizes[0], (self.slots, self.width)
            self.tables[place] = tuple(torch.zeros(shape, device=self.device, dtype=self.dtype) for shape in shapes)
        for place, tables in self.tables.items():
            for rows, table in zip(places, tables, strict=True):
                table[rows] = 0
            if place in field:
                *values, up_bias, _ = field[place]
                for rows, table, value in zip(places, tables, (*values, up_bias[None]), strict=True):
                    table[rows][: len(value)] = value
        self.runs[slot] = {
            place: (*units.runs, (units.runs[-1][0], self.rank - len(units.down))) for place, units in field.items()
        }

    def rest(self) -> None:
        """Begin a step without fields."""
        self.idle, self.tokens, self.active = True, 0, tuple[int, ...]()

    def step(self, slots: Sequence[int]) -> None:
        """Begin a step: the slot of every token in the order of the batch, -1 for none."""
        self.active = tuple(sorted({*slots} - {-1}))
        self.idle, self.tokens = not self.active, len(slots)
        if self.active:
            self.span = slice(self.active[0], self.active[-1] + 1)
            own = torch.arange(self.span.start, self.span.stop) == torch.tensor(slots)[:, None]
            self.by_slot = own.to(self.device, self.dtype)  # (tokens, slots from the first to the last in use)
            self.by_unit = None if own.all() else own.repeat_interleave(self.rank, 1).to(self.device)

    def add_(self, y: Tensor, z: Tensor, place: Place) -> None:
        """Add to the stream y that leaves a block what the fields of a place make of z; both `(tokens, width)`.

        Tokens that only fill a batch up come last. y may be one of several parts that are summed.

        Raises:
            RuntimeError: fewer tokens than the step has.
        """
        acting = [slot for slot in self.active if place in self.runs[slot]]
        if not acting:
            return
        y, z = y.view(-1, self.width), z.reshape(-1, self.width)
        if len(y) < self.tokens:
            raise RuntimeError(f"a block has {len(y)} tokens of a step with {self.tokens}: vLLM has split the batch.")
        y, z, units = y[: self.tokens], z[: self.tokens], slice(self.span.start * self.rank, self.span.stop * self.rank)
        down, down_bias, up, up_bias = self.tables[place]
        hidden = self._activate(F.linear(z.to(self.dtype), down[units], down_bias[units]), acting, place)
        if self.by_unit is not None:
            hidden = torch.where(self.by_unit, hidden, 0)  # what overflows in one field stays out of other tokens
        moved = y if y.dtype == self.dtype else torch.zeros_like(y, dtype=self.dtype)
        moved.addmm_(self.by_slot, up_bias[self.span]).addmm_(hidden, up[units])
        if moved is not y:
            y.add_(moved)

    def _activate(self, hidden: Tensor, acting: Sequence[int], place: Place) -> Tensor:
        """Apply to every unit its activation, or any one where it is set to zero afterwards."""
        kinds = {kind for slot in acting for kind, _ in self.runs[slot][place]}
        if len(kinds) == 1:
            return ACTIVATIONS[kinds.pop()](hidden)
        other = ((kinds.pop(), self.rank),)
        runs = [run for slot in range(self.span.start, self.span.stop) for run in self.runs[slot].get(place, other)]
        parts = torch.split(hidden, [size for _, size in runs], dim=1)
        return torch.cat([ACTIVATIONS[kind](part) for (kind, _), part in zip(runs, parts, strict=True)], dim=1)
