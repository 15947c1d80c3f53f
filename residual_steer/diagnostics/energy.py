"""The energy of each token's state against the patterns that its layer stores: modern Hopfield networks.

Ramsauer et al. 2020, "Hopfield Networks is All You Need", arXiv 2008.02217, eq. 2. Attention is one step down this
energy: ξ ← X·softmax(β·Xᵀξ) (eq. 3) never raises it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from residual_steer.errors import SteerError
from residual_steer.report import Axis, Column, Measured, Plot, Series, Table
from residual_steer.tokens import prefix_tokens

from .attention import counts_of, keys_of, real
from .looks import Keys
from .pairs import SIDES, compared

__all__ = ["StreamEnergy", "hopfield_energy", "stream_energy"]


@dataclass(frozen=True)
class StreamEnergy:
    """Energies; they have no unit. A layer is an attention, in the order in which they are called.

    Attributes:
        blocks: the block of every layer.
        beta: β of every layer, the inverse temperature.
        frozen: averaged over tokens, `(layers, heads)`.
        adapted: the same.
        frozen_spread: standard deviation over tokens and heads, `(layers,)`.
        adapted_spread: the same.
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
        columns = (
            Column("layer", "layer"),
            Column("block", "block"),
            Column("frozen", "frozen"),
            Column("frozen_spread", "spread, frozen"),
            Column("adapted", "adapted"),
            Column("adapted_spread", "spread, adapted"),
            Column("change", "change", digits=4),
        )
        numbers = {
            "frozen": self.frozen.mean(1),
            "frozen_spread": self.frozen_spread,
            "adapted": self.adapted.mean(1),
            "adapted_spread": self.adapted_spread,
            "change": self.change,
        }
        rows = [
            {"layer": layer, "block": block, **{name: float(values[layer]) for name, values in numbers.items()}}
            for layer, block in enumerate(self.blocks)
        ]
        return Table("Hopfield energy of the stream", columns, tuple(rows), (self._note(),))

    def plot(self) -> Plot:
        """Return lines along the layers, with the spread over tokens and heads."""
        count = self.tokens * self.frozen.shape[1]
        series = []
        for name, mean, spread in (
            ("frozen", self.frozen, self.frozen_spread),
            ("adapted", self.adapted, self.adapted_spread),
        ):
            pairs = zip(mean.mean(1).tolist(), spread.tolist(), strict=True)
            y = tuple(Measured(one, other if count > 1 else 0.0, count) for one, other in pairs)
            series.append(Series(name, tuple(range(len(self.blocks))), y))
        axes = (Axis("layer"), Axis("Hopfield energy"))
        return Plot("Hopfield energy of the stream by layer", "lines", *axes, tuple(series), (self._note(),))

    def _note(self) -> str:
        return f"Over {self.tokens} tokens and {self.frozen.shape[1]} heads; the spread is a standard deviation."


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
    state, patterns = state.double(), patterns.double()
    scores = beta * state @ patterns.transpose(-1, -2)
    norms = patterns.square().sum(-1).unsqueeze(-2).expand_as(scores)
    count = torch.full_like(scores[..., 0], scores.shape[-1])
    if visible is not None:
        seen = visible.expand_as(scores)
        scores, norms = scores.masked_fill(~seen, -torch.inf), norms.masked_fill(~seen, 0.0)
        count = seen.sum(-1).double()
    lse = scores.logsumexp(-1) / beta
    return -lse + state.square().sum(-1) / 2 + count.clamp(min=1).log() / beta + norms.amax(-1) / 2


def stream_energy(
    model: nn.Module, loader: Iterable[Any], *, reference: nn.Module | None = None, beta: float | None = None
) -> StreamEnergy:
    """Measure the energy of every token in every layer and head, frozen against adapted.

    The state of a token is its query, the stored patterns are the keys that it may attend to, a prompt's too. Both are
    what the layer hands to the attention function, behind rotary positions and norms: transformers' AttentionInterface
    or torch's scaled_dot_product_attention. A model that scales its queries itself (OPT) hands over scaled ones, with
    β = 1. Eq. 2 knows masks, but no bias of positions, soft cap or learned sink:
    those are not in the energy. Energies of different layers or models have different norms of queries and keys: what
    can be compared is frozen with adapted. A batch takes `(batch, heads, length, length)` in fp64, layer by layer.

    Args:
        model: a steered model, or any with a `reference`.
        loader: batches, of which labels are not needed. Padding is left out, as are tokens that a method put in.
        reference: the frozen model; None is the same model with its fields off.
        beta: β; None is what the layer multiplies products of queries and keys by, 1/√(head width) in most.

    Raises:
        SteerError: nothing to compare with, a β that is not positive, no data, NaN or infinity, an encoder-decoder,
            queries and keys that cannot be read (transformers without the interface, `nn.MultiheadAttention`) or are of
            windows (Swin), or a model without attention: an SSM has a memory length instead.
    """
    if beta is not None and not (isinstance(beta, (int, float)) and math.isfinite(beta) and beta > 0):
        raise SteerError(f"`beta` is a positive number, the inverse temperature; received {beta!r}.")
    sums: dict[str, Tensor] = {}
    betas: tuple[float, ...] = ()
    blocks: tuple[int, ...] = ()
    tokens = 0
    with compared(model, reference) as pair:
        prefix = prefix_tokens(pair.inner("frozen"))
        for batch in pair.batches(loader):
            keys = keys_of(pair, batch)
            counts = counts_of(batch, keys, "all")
            blocks = tuple(look.block for look in keys["frozen"])
            betas = tuple(look.scale if beta is None else float(beta) for look in keys["frozen"])
            for side, looks in keys.items():
                pairs = zip(looks, betas, strict=True)
                new = torch.stack([_sums(_energy(look, counts, prefix, b), counts) for look, b in pairs])
                sums[side] = sums[side] + new if side in sums else new
            tokens += int(counts.sum())
    if not tokens:
        raise SteerError("no token of the data counts: every one is padding. Look at the attention mask.")
    means = {side: sums[side][..., 0] / tokens for side in SIDES}
    squares = {side: (sums[side][..., 1] / tokens).mean(1) for side in SIDES}
    spread = {side: (squares[side] - means[side].mean(1).square()).clamp(min=0).sqrt() for side in SIDES}
    return StreamEnergy(blocks, betas, means["frozen"], means["adapted"], spread["frozen"], spread["adapted"], tokens)


def _energy(look: Keys, counts: Tensor, prefix: int, beta: float) -> Tensor:
    """Return the energy of every token of the batch, `(rows, heads, length)`."""
    return real(hopfield_energy(look.query, look.key, beta, look.visible), counts.shape[1], prefix)


def _sums(energy: Tensor, counts: Tensor) -> Tensor:
    """Return the sums of the energy and of its square over the tokens that count, `(heads, 2)`."""
    energy = torch.where(counts[:, None], energy, 0.0)  # padding may see nothing, which is infinite
    return torch.stack([energy.sum((0, 2)), energy.square().sum((0, 2))], dim=-1).cpu()
