"""How widely attention spreads, frozen against adapted: the Shannon entropy of its maps.

Lemma 1 of arXiv 2606.24396 says that prompts raise it, lemma 2 that a field leaves it untouched. A field at block l
changes what block l + 1 reads, so that lemma 2 can be exact only up to the first steered block: `untouched` counts.
"""

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
from .attention import Attention, attentions_of, chosen, of_queries, query_of
from .compare import SIDES, compare, layer_table

__all__ = ["AttentionEntropy", "attention_entropy"]


@dataclass(frozen=True, eq=False)
class AttentionEntropy:
    """Entropies in nats. A layer is an attention, in the order in which they are called.

    Attributes:
        query: which tokens attend: "first" (CLS in a ViT), "last" or "all".
        blocks: the block of every layer: in a hybrid not every one has attention.
        frozen: −Σ a·ln a over the keys, averaged over rows and queries, `(layers, heads)`.
        adapted: the same of the adapted model, over all its keys, those of a prompt too.
        frozen_by_position: averaged over rows and heads for each place of a query in the batch, `(layers, positions)`,
            NaN where none counts.
        adapted_by_position: the same; what a method put in has no place.
        frozen_keys: how many keys a query may attend to, on average, `(layers,)`.
        adapted_keys: the same.
        frozen_bound: the average of the logarithm of that number, the highest entropy there can be, `(layers,)`.
        adapted_bound: the same.
        equal: of every layer, whether both models had equal maps, bit for bit, in every row.
        queries: how many were averaged over.
    """

    query: str
    blocks: tuple[int, ...]
    frozen: Tensor
    adapted: Tensor
    frozen_by_position: Tensor
    adapted_by_position: Tensor
    frozen_keys: Tensor
    adapted_keys: Tensor
    frozen_bound: Tensor
    adapted_bound: Tensor
    equal: tuple[bool, ...]
    queries: int

    @property
    def change(self) -> Tensor:
        """How much wider the adapted model attends, averaged over heads, `(layers,)`, in nats."""
        return (self.adapted - self.frozen).mean(1)

    @property
    def untouched(self) -> int:
        """How many layers, from the first, have exactly equal maps (lemma 2)."""
        return [*self.equal, False].index(False)

    @property
    def frozen_normalised(self) -> Tensor:
        """The share of the bound, `(layers, heads)`, 0 to 1 but for rounding; NaN where queries see a single key."""
        return self.frozen / self.frozen_bound[:, None]

    @property
    def adapted_normalised(self) -> Tensor:
        """The same of the adapted model."""
        return self.adapted / self.adapted_bound[:, None]

    def table(self) -> Table:
        """Return a row for every layer, averaged over heads."""
        numbers = {
            "frozen": ("frozen, nats", self.frozen.mean(1)),
            "adapted": ("adapted, nats", self.adapted.mean(1)),
            "change": ("change, nats", self.change),
            "frozen_keys": ("keys, frozen", self.frozen_keys),
            "adapted_keys": ("keys, adapted", self.adapted_keys),
        }
        notes = (
            f"Averaged over {self.frozen.shape[1]} heads and {self.queries} queries ({self.query}).",
            f"The maps of the first {self.untouched} of {len(self.blocks)} layers are equal, bit for bit.",
        )
        return layer_table("Attention entropy", self.blocks, numbers, notes, ("equal maps", self.equal))

    def plot(self, ax: Axes | None = None) -> Figure:
        """Draw the entropy over the layers, averaged over heads."""
        series = {"frozen": self.frozen.mean(1).tolist(), "adapted": self.adapted.mean(1).tolist()}
        return lines(ax, "Attention entropy by layer", "layer", "attention entropy, nats", series)


def attention_entropy(
    model: nn.Module, loader: Iterable[Any], *, reference: nn.Module | None = None, query: str = "auto"
) -> AttentionEntropy:
    """Measure the entropy of attention in every layer and head, frozen against adapted.

    Both models see each batch before the next, with attention that gives its maps: fused and flash implementations are
    switched for the measurement and put back. Maps are taken as a layer computes them, in its precision; the share that
    a learned sink takes (gpt-oss) is not in them. All maps of a batch are held at once, `(batch, heads, length,
    length)` a layer: choose its size accordingly.

    Args:
        model: a steered model, or any with a `reference`.
        loader: batches, of which labels are not needed.
        reference: the frozen model; None is the same model with its fields off.
        query: which tokens attend: "first", "last", "all", or "auto", the first where that is a class token of images
            and all elsewhere. Padding never counts, nor do tokens that a method put in, which are keys alone: they are
            told apart by their number, the queries that the reference does not have, and by their one place, before a
            text (behind its padding on the left) or behind the prefix tokens of an image.

    Raises:
        SteerError: nothing to compare with, an unknown `query`, no data, NaN or infinity in a map, an encoder-decoder,
            attention that gives no maps or maps of windows (Swin), layers of different numbers of heads, or a model
            without attention: an SSM has a memory length instead.
    """
    sums, equal, blocks = Sums(), list[bool](), tuple[int, ...]()
    with compare(model, reference) as pair:
        query = query_of(query, pair.inner)
        for batch in pair.batches(loader):
            found = attentions_of(pair, batch, keys=False)
            counts = chosen(batch, found, query)
            for side, layers in found.items():
                for layer, one in enumerate(layers):
                    _add(sums, (side, layer), one, counts, pair.prefix)
            sums.add("counted", counts.sum(0))
            both = zip(*found.values(), strict=True)
            same = [torch.equal(one.seen[0], other.seen[0]) for one, other in both]
            equal = [one and other for one, other in zip(equal or same, same, strict=True)]
            blocks = tuple(one.block for one in found["frozen"])
    queries = int(sums["counted"].sum())
    if not queries:
        raise SteerError("no token of the data counts as a query: every one is padding. Look at the attention mask.")
    means: dict[str, Tensor] = {}
    for side in SIDES:
        means[side] = sums.layers("entropy", side) / queries
        means[f"{side}_by_position"] = sums.layers("positions", side) / sums["counted"]
        means[f"{side}_keys"], means[f"{side}_bound"] = (sums.layers("keys", side) / queries).unbind(1)
    return AttentionEntropy(query, blocks, equal=tuple(equal), queries=queries, **means)


def _add(sums: Sums, key: tuple[str, int], one: Attention, counts: Tensor, prefix: int) -> None:
    """Add the map of a layer, for the tokens that count, `(rows, length)`."""
    (weights,), share = one.seen, exact(counts)[:, None]
    entropy = of_queries(torch.special.entr(exact(weights)).sum(-1), counts.shape[1], prefix)
    entropy = torch.where(share > 0, entropy, 0.0)  # which is NaN for padding that sees nothing
    if one.visible is None:
        keys = torch.full_like(entropy, weights.shape[3])
    else:
        visible = one.visible.expand(*weights.shape[:1], -1, *weights.shape[2:])
        keys = exact(visible.sum(-1)).clamp(min=1)  # a query that sees none is padding
        keys = of_queries(keys, counts.shape[1], prefix)
    sums.add(("entropy", *key), entropy.sum((0, 2)))
    sums.add(("positions", *key), entropy.mean(1).sum(0))
    sums.add(("keys", *key), torch.stack([(x.mean(1, keepdim=True) * share).sum() for x in (keys, keys.log())]))
