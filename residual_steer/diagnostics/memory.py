"""How far back a state-space model remembers: the counterpart of attention entropy where there is no attention."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from residual_steer.errors import SteerError

from ._moments import Sums, exact
from ._plots import Axes, Figure, lines
from ._table import Table
from .compare import SIDES, compare, layer_table, places
from .ssm import Steps, steps_of

__all__ = ["MemoryLength", "memory_length"]

_QUARTILES = {"low": ("lower quartile", 0.25), "middle": ("median", 0.5), "high": ("upper quartile", 0.75)}


@dataclass(frozen=True, eq=False)
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
        return [*self.equal, False].index(False)

    def table(self) -> Table:
        """Return a row for every layer, with quartiles over channels."""
        numbers = {
            f"{side}_{key}": (f"{head}, {side}, tokens", values.quantile(share, dim=1))
            for side, values in zip(SIDES, (self.frozen, self.adapted), strict=True)
            for key, (head, share) in _QUARTILES.items()
        }
        numbers["change"] = "adapted / frozen", self.change
        note = (
            f"Of the slowest state of each of {self.frozen.shape[1]} channels, over {self.tokens} tokens; equal in the "
            f"first {self.untouched} of {len(self.blocks)} layers."
        )
        return layer_table("Effective memory length", self.blocks, numbers, (note,), ("equal decay", self.equal))

    def plot(self, ax: Axes | None = None) -> Figure:
        """Draw the median of the channels over the layers."""
        values = zip(SIDES, (self.frozen, self.adapted), strict=True)
        series = {side: each.median(1).values.tolist() for side, each in values}
        label = "memory length, median of channels, tokens"
        return lines(ax, "Effective memory length by layer", "layer", label, series, log=True)


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
    sums, tokens, equal = Sums(), 0, list[bool]()
    found: dict[str, list[Steps]] = {}
    with compare(model, reference) as pair:
        for batch in pair.batches(loader):
            found = {side: steps_of(pair, side, batch) for side in SIDES}
            _require_alike(found)
            same = []
            for layer, (one, other) in enumerate(zip(*found.values(), strict=True)):
                length, device = one.delta.shape[1], one.delta.device
                counts = batch.real((batch.rows, length), device)
                for side, step in zip(SIDES, (one, other), strict=True):
                    at = places(length, step.delta.shape[1], pair.prefix, device)
                    sums.add((side, layer), exact(step.delta.index_select(1, at)[counts]).sum(0))
                same.append(torch.equal(one.delta, other.delta) and torch.equal(one.decay, other.decay))
            equal = [one and other for one, other in zip(equal or same, same, strict=True)]
            tokens += int(counts.sum())
    if not tokens:
        raise SteerError("no token of the data counts: every one is padding. Look at the attention mask.")
    means: dict[str, Tensor] = {}
    for side, steps in found.items():
        means[f"{side}_step"] = sums.layers(side) / tokens
        decay = torch.stack([step.decay.cpu() for step in steps])
        means[f"{side}_states"] = -1 / (means[f"{side}_step"][..., None] * decay)
    return MemoryLength(tuple(step.block for step in found["frozen"]), equal=tuple(equal), tokens=tokens, **means)


def _require_alike(found: dict[str, list[Steps]]) -> None:
    """Raise if the layers of both models differ in number, or any in shape."""
    frozen, adapted = found.values()
    shapes = [tuple(step.decay.shape) for step in (*frozen, *adapted)]
    if len(set(shapes)) > 1 or len(frozen) != len(adapted):
        raise SteerError(
            f"memory lengths are compared layer by layer and state by state; there are {len(frozen)} and "
            f"{len(adapted)} SSMs, with (channels, states) of {', '.join(map(str, dict.fromkeys(shapes)))}."
        )
