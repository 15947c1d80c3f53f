"""How far back a state-space model remembers: the counterpart of attention entropy where there is no attention."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from residual_steer.errors import SteerError
from residual_steer.passes import Batch
from residual_steer.report import Axis, Column, Plot, Series, Table
from residual_steer.tokens import prefix_tokens

from .pairs import SIDES, compared
from .queries import chosen, places
from .steps import Steps, steps_of

__all__ = ["MemoryLength", "memory_length"]


@dataclass(frozen=True)
class MemoryLength:
    """Effective memory lengths, in tokens. A layer is an SSM, in the order of the blocks.

    A state h of a selective SSM decays by h_t = exp(Δ_t·A)·h_{t−1} + …; Δ_t depends on the token, A < 0 does not. Its
    memory length is τ = −1 / mean_t(Δ_t·A), the mean being over all tokens of the data: over τ tokens of average Δ a
    state falls to 1/e.

    Attributes:
        blocks: the block of every layer: in a hybrid not every one has an SSM.
        frozen_states: τ of every state, `(layers, channels, states)`; Mamba-2 has one decay for each head, so that its
            channels are heads with a single state.
        adapted_states: the same.
        frozen_step: the average Δ, `(layers, channels)`.
        adapted_step: the same.
        equal: of every layer, whether both models had equal Δ, bit for bit, and equal A.
        tokens: how many were averaged over.
    """

    blocks: tuple[int, ...]
    frozen_states: Tensor
    adapted_states: Tensor
    frozen_step: Tensor
    adapted_step: Tensor
    equal: tuple[bool, ...]
    tokens: int

    @property
    def frozen(self) -> Tensor:
        """The memory length of each channel, that of its slowest state, `(layers, channels)`."""
        return self.frozen_states.amax(2)

    @property
    def adapted(self) -> Tensor:
        """The same of the adapted model."""
        return self.adapted_states.amax(2)

    @property
    def change(self) -> Tensor:
        """The median over channels of adapted / frozen, `(layers,)`: 1 is no change, 2 remembers twice as far."""
        return (self.adapted / self.frozen).median(1).values

    @property
    def untouched(self) -> int:
        """How many layers, from the first, decay exactly as in the frozen model."""
        return self.equal.index(False) if False in self.equal else len(self.equal)

    def table(self) -> Table:
        """Return a row for every layer, with quartiles over channels."""
        told = (("low", "lower quartile"), ("middle", "median"), ("high", "upper quartile"))
        quartiles = {
            f"{side}_{key}": values.quantile(share, dim=1)
            for side, values in (("frozen", self.frozen), ("adapted", self.adapted))
            for (key, _), share in zip(told, (0.25, 0.5, 0.75), strict=True)
        }
        columns = (
            Column("layer", "layer"),
            Column("block", "block"),
            *(Column(f"{side}_{key}", f"{text}, {side}", "tokens", digits=2) for side in SIDES for key, text in told),
            Column("change", "adapted / frozen"),
            Column("equal", "equal decay"),
        )
        rows = [
            {
                "layer": layer,
                "block": block,
                **{key: float(values[layer]) for key, values in quartiles.items()},
                "change": float(self.change[layer]),
                "equal": "yes" if self.equal[layer] else "no",
            }
            for layer, block in enumerate(self.blocks)
        ]
        return Table("Effective memory length", columns, tuple(rows), (self._note(),))

    def plot(self) -> Plot:
        """Return lines over the layers: the median of the channels."""
        layers = tuple(range(len(self.blocks)))
        series = [
            Series(name, layers, tuple(values.median(1).values.tolist()))
            for name, values in (("frozen", self.frozen), ("adapted", self.adapted))
        ]
        axes = (Axis("layer"), Axis("memory length, median of channels", "tokens", log=True))
        return Plot("Effective memory length by layer", "lines", *axes, tuple(series), (self._note(),))

    def _note(self) -> str:
        return (
            f"Of the slowest state of each of {self.frozen.shape[1]} channels, over {self.tokens} tokens; equal in the "
            f"first {self.untouched} of {len(self.blocks)} layers."
        )


def memory_length(model: nn.Module, loader: Iterable[Any], *, reference: nn.Module | None = None) -> MemoryLength:
    """Measure how far back each state of a Mamba remembers, frozen against adapted.

    Δ is read where a mixer computes it, behind softplus and the limits of Mamba-2, and A is −exp(`A_log`). In a hybrid
    the layers with an SSM are measured, and those of a gated DeltaNet (Qwen3-Next) by their gate, without what the
    delta rule takes away. Compiled CUDA kernels compute Δ inside themselves, where it cannot be read: on a GPU that has
    them, move the model to the CPU for this.

    Args:
        model: a steered model, or any with a `reference`: Mamba, Mamba-2 and FalconMamba of transformers, the SSMs in
            its hybrids, and those of `mamba_ssm` where its reference functions run.
        loader: batches, of which labels are not needed. Padding is left out, as are tokens that a method put in.
        reference: the frozen model; None is the same model with its fields off.

    Raises:
        SteerError: nothing to compare with, no data, NaN or infinity in Δ, a Δ that was not seen, layers of different
            shapes, or a model without a state that decays: attention has an entropy instead.
    """
    tally: _Tally | None = None
    with compared(model, reference) as pair:
        prefix = prefix_tokens(pair.inner("frozen"))
        for batch in pair.batches(loader):
            frozen, adapted = (steps_of(pair, side, batch) for side in SIDES)
            tally = tally or _Tally.of(frozen, adapted)
            tally.add(batch, frozen, adapted, prefix)
    if tally is None or not tally.tokens:
        raise SteerError("no token of the data counts: every one is padding. Look at the attention mask.")
    return tally.result()


@dataclass
class _Tally:
    """Sums of Δ over tokens, `(layers, channels)` in fp64, and A."""

    blocks: tuple[int, ...]
    decay: dict[str, Tensor]
    steps: dict[str, Tensor]
    equal: list[bool]
    tokens: int = 0

    @classmethod
    def of(cls, frozen: list[Steps], adapted: list[Steps]) -> _Tally:
        """Begin, with the layers that are there.

        Raises:
            SteerError: they differ in shape.
        """
        shapes = [tuple(step.decay.shape) for step in (*frozen, *adapted)]
        if len(set(shapes)) > 1 or len(frozen) != len(adapted):
            told = ", ".join(map(str, dict.fromkeys(shapes)))
            raise SteerError(
                f"memory lengths are compared layer by layer and state by state; there are {len(frozen)} and "
                f"{len(adapted)} SSMs, with (channels, states) of {told}."
            )
        decay = {
            side: torch.stack([step.decay.cpu() for step in steps])
            for side, steps in zip(SIDES, (frozen, adapted), strict=True)
        }
        zeros = {side: torch.zeros(decay[side].shape[:2], dtype=torch.float64) for side in SIDES}
        same = [torch.equal(one, other) for one, other in zip(decay["frozen"], decay["adapted"], strict=True)]
        return cls(tuple(step.block for step in frozen), decay, zeros, same)

    def add(self, batch: Batch, frozen: list[Steps], adapted: list[Steps], prefix: int) -> None:
        """Add a batch."""
        for layer, (one, other) in enumerate(zip(frozen, adapted, strict=True)):
            length, device = one.delta.shape[1], one.delta.device
            counts = chosen(batch, length, "all", device)
            for side, step in zip(SIDES, (one, other), strict=True):
                delta = step.delta.double().index_select(1, places(length, step.delta.shape[1], prefix, device))
                self.steps[side][layer] += (delta * counts[..., None]).sum((0, 1)).cpu()
            self.equal[layer] &= torch.equal(one.delta, other.delta)
        self.tokens += int(counts.sum())

    def result(self) -> MemoryLength:
        """Divide."""
        step = {side: self.steps[side] / self.tokens for side in SIDES}
        length = {side: -1 / (step[side][..., None] * self.decay[side]) for side in SIDES}
        return MemoryLength(
            self.blocks,
            length["frozen"],
            length["adapted"],
            step["frozen"],
            step["adapted"],
            tuple(self.equal),
            self.tokens,
        )
