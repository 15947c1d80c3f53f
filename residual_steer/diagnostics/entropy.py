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

from residual_steer._checks import check_choice
from residual_steer.stream import class_token

from ._moments import Sums, exact
from ._results import Axes, Figure, Table, layer_table, lines
from .attention import Attention, attentions_of, queries_of, values_of
from .compare import SIDES, compare, require_tokens

__all__ = ["AttentionEntropy", "attention_entropy"]


@dataclass(frozen=True, eq=False)
class AttentionEntropy:
    """Entropies in nats. A layer is an attention, in the order in which they are called.

    Attributes:
        query: which tokens attend: "first" (CLS in a ViT), "last" or "all".
        blocks: the block of every layer: in a hybrid not every one has attention.
        frozen, adapted: −Σ a·ln a over the keys, a prompt's too, averaged over rows and queries, `(layers, heads)`.
        frozen_by_position, adapted_by_position: averaged over rows and heads for each place of a query among those of
            the frozen model, `(layers, positions)`; NaN where none counts.
        frozen_keys, adapted_keys: how many keys a query may attend to, on average, `(layers,)`.
        frozen_bound, adapted_bound: the average logarithm of that number, the highest entropy possible, `(layers,)`.
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
        columns = {
            "frozen": ("frozen, nats", self.frozen.mean(1)),
            "adapted": ("adapted, nats", self.adapted.mean(1)),
            "change": ("change, nats", self.change),
            "frozen_keys": ("keys, frozen", self.frozen_keys),
            "adapted_keys": ("keys, adapted", self.adapted_keys),
            "equal": ("equal maps", ["yes" if same else "no" for same in self.equal]),
        }
        return layer_table(
            "Attention entropy",
            self.blocks,
            columns,
            f"Averaged over {self.frozen.shape[1]} heads and {self.queries} queries ({self.query}).",
            f"The maps of the first {self.untouched} of {len(self.blocks)} layers are equal, bit for bit.",
        )

    def plot(self, ax: Axes | None = None) -> Figure:
        """Draw the entropy over the layers, averaged over heads."""
        series = {"frozen": self.frozen.mean(1), "adapted": self.adapted.mean(1)}
        return lines(ax, "Attention entropy by layer", "layer", "attention entropy, nats", series)


def attention_entropy(
    model: nn.Module, loader: Iterable[Any], *, reference: nn.Module | None = None, query: str = "auto"
) -> AttentionEntropy:
    """Measure the entropy of attention in every layer and head, frozen against adapted.

    `query` says which tokens attend: "first", "last", "all", or "auto", the first where that is a class token of images
    and all elsewhere. Tokens that a method put in are keys alone. Maps are taken as a layer computes them, in its
    precision, from attention that gives them: fused and flash implementations are switched meanwhile. The share of a
    learned sink (gpt-oss) is not in them. All maps of a batch are kept at once, `(batch, heads, length, length)` a
    layer: choose its size accordingly.

    Raises:
        SteerError: besides what all raise, an unknown `query`, an encoder-decoder, attention that gives no maps or maps
            of windows (Swin), layers of different numbers of heads, or no attention: an SSM has a memory length.
    """
    check_choice("query", query, ("auto", "first", "last", "all"))
    sums = Sums()
    with compare(model, reference) as pair:
        if query == "auto":
            query = "first" if class_token(pair.inner) else "all"
        for batch in pair.batches(loader):
            found = attentions_of(pair, batch, keys=False)
            counts = queries_of(batch, found, query)
            sums.add("counted", counts.sum(0))
            for layer, both in enumerate(zip(*found.values(), strict=True)):
                for side, one in zip(SIDES, both, strict=True):
                    _add(sums, (side, layer), one, counts, pair.prefix)
                sums.add(("differ", layer), torch.tensor(not torch.equal(*(one.seen[0] for one in both))))
    queries = require_tokens(sums["counted"].sum())
    means: dict[str, Any] = {}
    for side in SIDES:
        means[side] = sums.layers("entropy", side) / queries
        means[f"{side}_by_position"] = sums.layers("positions", side) / sums["counted"]
        means[f"{side}_keys"], means[f"{side}_bound"] = (sums.layers("keys", side) / queries).unbind(1)
    means["equal"] = tuple((sums.layers("differ") == 0).tolist())
    return AttentionEntropy(query, tuple(one.block for one in found["frozen"]), queries=queries, **means)


def _add(sums: Sums, key: tuple[str, int], one: Attention, counts: Tensor, prefix: int) -> None:
    """Add the map of a layer, for the tokens that count, `(rows, length)`."""
    (weights,), share, length = one.seen, exact(counts)[:, None], counts.shape[1]
    entropy = values_of(torch.special.entr(exact(weights)).sum(-1), length, prefix)
    entropy = torch.where(share > 0, entropy, 0.0)  # which is NaN for padding that sees nothing
    keys = torch.full_like(entropy, weights.shape[3])
    if one.visible is not None:
        visible = one.visible.expand(*weights.shape[:1], -1, *weights.shape[2:])
        keys = values_of(exact(visible.sum(-1)).clamp(min=1), length, prefix)  # a query that sees none is padding
    sums.add(("entropy", *key), entropy.sum((0, 2)))
    sums.add(("positions", *key), entropy.mean(1).sum(0))
    sums.add(("keys", *key), torch.stack([(x.mean(1, keepdim=True) * share).sum() for x in (keys, keys.log())]))
