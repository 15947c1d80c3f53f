"""The energy of each token's state against the patterns that its layer stores: modern Hopfield networks.

Ramsauer et al. 2020, "Hopfield Networks is All You Need", arXiv 2008.02217, eq. 2. Attention is one step down this
energy: ξ ← X·softmax(β·Xᵀξ) (eq. 3) never raises it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from residual_steer._checks import check_number

from ._moments import Moments, Sums, exact
from ._results import Axes, Figure, Table, layer_table, lines
from .attention import attentions_of, queries_of, values_of
from .compare import SIDES, compare, require_tokens

__all__ = ["StreamEnergy", "hopfield_energy", "stream_energy"]


@dataclass(frozen=True, eq=False)
class StreamEnergy:
    """Energies; they have no unit. A layer is an attention, in the order in which they are called.

    Attributes:
        blocks: the block of every layer.
        beta: β of every layer, the inverse temperature.
        frozen, adapted: averaged over tokens, `(layers, heads)`.
        frozen_spread, adapted_spread: standard deviation over tokens and heads, `(layers,)`.
        tokens: how many tokens were averaged over.
    """

    blocks: tuple[int, ...]
    beta: tuple[float, ...]
    frozen: Tensor
    adapted: Tensor
    frozen_spread: Tensor
    adapted_spread: Tensor
    tokens: int

    @property
    def change(self) -> Tensor:
        """How much higher the adapted model's energy is, averaged over heads, `(layers,)`."""
        return (self.adapted - self.frozen).mean(1)

    def table(self) -> Table:
        """Return a row for every layer, averaged over heads."""
        columns = {
            "frozen": ("frozen", self.frozen.mean(1)),
            "frozen_spread": ("spread, frozen", self.frozen_spread),
            "adapted": ("adapted", self.adapted.mean(1)),
            "adapted_spread": ("spread, adapted", self.adapted_spread),
            "change": ("change", self.change),
        }
        note = f"Over {self.tokens} tokens and {self.frozen.shape[1]} heads; the spread is a standard deviation."
        return layer_table("Hopfield energy of the stream", self.blocks, columns, note)

    def plot(self, ax: Axes | None = None) -> Figure:
        """Draw the energy along the layers, with the spread over tokens and heads."""
        series = {"frozen": self.frozen.mean(1), "adapted": self.adapted.mean(1)}
        spread = {"frozen": self.frozen_spread, "adapted": self.adapted_spread}
        return lines(ax, "Hopfield energy of the stream by layer", "layer", "Hopfield energy", series, spread=spread)


def hopfield_energy(state: Tensor, patterns: Tensor, beta: float, visible: Tensor | None = None) -> Tensor:
    """Return E(ξ) = −lse(β, Xᵀξ) + ½·ξᵀξ + β⁻¹·ln N + ½·M² (eq. 2 of arXiv 2008.02217), which is never negative.

    lse(β, x) = β⁻¹·ln Σ exp(β·x_i), N is the number of patterns that a state sees, and M the largest norm of those.

    Args:
        state: ξ, `(..., states, d)`.
        patterns: the columns of X, `(..., patterns, d)`.
        beta: β > 0.
        visible: which patterns a state sees, booleans that broadcast to `(..., states, patterns)`; None is all.

    Returns:
        `(..., states)`, in fp64; infinite for a state that sees none.
    """
    state, patterns = exact(state), exact(patterns)
    scores = beta * state @ patterns.transpose(-1, -2)
    norms = patterns.square().sum(-1).unsqueeze(-2).expand_as(scores)
    count = torch.full_like(scores[..., 0], scores.shape[-1])
    if visible is not None:
        seen = visible.to(scores.device).expand_as(scores)
        scores, norms = scores.masked_fill(~seen, -torch.inf), norms.masked_fill(~seen, 0.0)
        count = exact(seen.sum(-1))
    lse = scores.logsumexp(-1) / beta
    return -lse + state.square().sum(-1) / 2 + count.clamp(min=1).log() / beta + norms.amax(-1) / 2


def stream_energy(
    model: nn.Module, loader: Iterable[Any], *, reference: nn.Module | None = None, beta: float | None = None
) -> StreamEnergy:
    """Measure the energy of every token in every layer and head, frozen against adapted.

    The state of a token is its query, the stored patterns are the keys that it may attend to, a prompt's too, as the
    layer hands both to transformers' AttentionInterface or torch's scaled_dot_product_attention, behind rotary
    positions and norms. β is `beta`, or what the layer multiplies their products by: 1/√(head width) in most, 1 where
    the model scales its queries itself (OPT). Eq. 2 knows masks, but no bias of positions, soft cap or learned sink.
    Energies of different layers or models have different norms: compare frozen with adapted. A batch takes `(batch,
    heads, length, length)` in fp64, layer by layer.

    Raises:
        SteerError: besides what all raise, a β that is not positive, an encoder-decoder, queries and keys that cannot
            be read (transformers without the interface, `nn.MultiheadAttention`) or are of windows (Swin), or no
            attention: an SSM has a memory length.
    """
    if beta is not None:
        beta = check_number("beta", beta, above=0, meaning="the inverse temperature")
    sums, moments = Sums(), dict[tuple[str, int], Moments]()
    with compare(model, reference) as pair:
        for batch in pair.batches(loader):
            found = attentions_of(pair, batch, keys=True)
            counts = queries_of(batch, found)
            sums.add("tokens", counts.sum())
            betas = tuple(one.scale if beta is None else beta for one in found["frozen"])
            for side, layers in found.items():
                for layer, (one, warmth) in enumerate(zip(layers, betas, strict=True)):
                    query, key = one.seen
                    energy = hopfield_energy(query, key, warmth, one.visible)
                    energy = values_of(energy, counts.shape[1], pair.prefix).movedim(1, 2)[counts.to(energy.device)]
                    sums.add((side, layer), energy.sum(0))
                    moments.setdefault((side, layer), Moments()).add(energy.reshape(-1, 1))
    tokens = require_tokens(sums["tokens"])
    means = {side: sums.layers(side) / tokens for side in SIDES}
    for side in SIDES:
        each = [moments[side, layer] for layer in range(len(betas))]
        means[f"{side}_spread"] = torch.stack([(one.scatter / one.count).sqrt()[0, 0].cpu() for one in each])
    return StreamEnergy(tuple(one.block for one in found["frozen"]), betas, tokens=tokens, **means)
