"""How widely attention spreads, frozen against adapted: the Shannon entropy of its maps.

Lemma 1 of arXiv 2606.24396 says that prompts raise it, lemma 2 that a field leaves it untouched. A field at block l
changes what block l + 1 reads, so that lemma 2 can be exact only up to the first steered block: `untouched` counts.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from residual_steer.errors import SteerError
from residual_steer.report import Axis, Column, Plot, Series, Table
from residual_steer.tokens import prefix_tokens

from .attention import counts_of, maps_of, real
from .looks import Map
from .pairs import SIDES, compared
from .queries import query_of

__all__ = ["AttentionEntropy", "attention_entropy"]


@dataclass(frozen=True)
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
        return self.equal.index(False) if False in self.equal else len(self.equal)

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
        columns = (
            Column("layer", "layer"),
            Column("block", "block"),
            *(Column(key, key, "nats", digits=4) for key in ("frozen", "adapted", "change")),
            Column("frozen_keys", "keys, frozen", digits=1),
            Column("adapted_keys", "keys, adapted", digits=1),
            Column("equal", "equal maps"),
        )
        rows = [
            {
                "layer": layer,
                "block": self.blocks[layer],
                "frozen": float(self.frozen[layer].mean()),
                "adapted": float(self.adapted[layer].mean()),
                "change": float(self.change[layer]),
                "frozen_keys": float(self.frozen_keys[layer]),
                "adapted_keys": float(self.adapted_keys[layer]),
                "equal": "yes" if self.equal[layer] else "no",
            }
            for layer in range(len(self.blocks))
        ]
        heads = self.frozen.shape[1]
        notes = (f"Averaged over {heads} heads and {self.queries} queries ({self.query}).", self._untouched())
        return Table("Attention entropy", columns, tuple(rows), notes)

    def plot(self) -> Plot:
        """Return lines over the layers, averaged over heads."""
        layers = tuple(range(len(self.blocks)))
        series = [
            Series(name, layers, tuple(values.mean(1).tolist()))
            for name, values in (("frozen", self.frozen), ("adapted", self.adapted))
        ]
        axes = (Axis("layer"), Axis("attention entropy", "nats"))
        return Plot("Attention entropy by layer", "lines", *axes, tuple(series), (self._untouched(),))

    def _untouched(self) -> str:
        return f"The maps of the first {self.untouched} of {len(self.blocks)} layers are equal, bit for bit."


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
    tally: _Tally | None = None
    with compared(model, reference) as pair:
        query, prefix = query_of(query, pair.inner("frozen")), prefix_tokens(pair.inner("frozen"))
        for batch in pair.batches(loader):
            maps = maps_of(pair, batch)
            tally = tally or _Tally.of(maps["frozen"])
            tally.add(maps, counts_of(batch, maps, query), prefix)
    if tally is None or not tally.queries:
        raise SteerError("no token of the data counts as a query: every one is padding. Look at the attention mask.")
    return tally.result(query)


@dataclass
class _Side:
    """Sums over queries, in fp64."""

    entropy: Tensor  # (layers, heads)
    keys: Tensor  # (layers, 2): their number and its logarithm
    positions: list[Tensor]  # by layer, (positions,): over rows and heads

    @classmethod
    def of(cls, layers: int, heads: int) -> _Side:
        """Begin with nothing."""
        entropy, keys = (torch.zeros(shape, dtype=torch.float64) for shape in ((layers, heads), (layers, 2)))
        return cls(entropy, keys, [torch.zeros(0, dtype=torch.float64)] * layers)

    def add(self, layer: int, look: Map, counts: Tensor, prefix: int) -> None:
        """Add the map of a layer, for the tokens that count, `(rows, length)`."""
        length, share = counts.shape[1], counts[:, None].double()
        entropy = real(torch.special.entr(look.weights.double()).sum(-1), length, prefix) * share
        keys = real(_visible_keys(look), length, prefix)
        self.entropy[layer] += entropy.sum((0, 2)).cpu()
        self.keys[layer] += torch.stack([(x.mean(1, keepdim=True) * share).sum() for x in (keys, keys.log())]).cpu()
        self.positions[layer] = _plus(self.positions[layer], entropy.mean(1).sum(0).cpu())


@dataclass
class _Tally:
    """What is known of both models so far."""

    blocks: tuple[int, ...]
    sides: dict[str, _Side]
    equal: list[bool]
    queries: int = 0
    counted: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))

    @classmethod
    def of(cls, maps: list[Map]) -> _Tally:
        """Begin, with the layers that are there."""
        layers, heads = len(maps), maps[0].weights.shape[1]
        sides = {side: _Side.of(layers, heads) for side in SIDES}
        return cls(tuple(look.block for look in maps), sides, [True] * layers)

    def add(self, maps: dict[str, list[Map]], counts: Tensor, prefix: int) -> None:
        """Add a batch."""
        for side, looks in maps.items():
            for layer, look in enumerate(looks):
                self.sides[side].add(layer, look, counts, prefix)
        for layer, (one, other) in enumerate(zip(maps["frozen"], maps["adapted"], strict=True)):
            self.equal[layer] &= torch.equal(one.weights, other.weights)
        self.queries += int(counts.sum())
        self.counted = _plus(self.counted, counts.sum(0).double().cpu())

    def result(self, query: str) -> AttentionEntropy:
        """Divide."""
        means = {}
        for name, side in self.sides.items():
            means[name] = side.entropy / self.queries
            means[f"{name}_by_position"] = torch.stack(side.positions) / self.counted
            means[f"{name}_keys"], means[f"{name}_bound"] = (side.keys / self.queries).unbind(1)
        return AttentionEntropy(query, self.blocks, equal=tuple(self.equal), queries=self.queries, **means)


def _visible_keys(look: Map) -> Tensor:
    """Return how many keys each query may attend to, `(rows, 1 or heads, queries)`, in fp64."""
    rows, _, queries, keys = look.weights.shape
    if look.visible is None:
        return torch.full((rows, 1, queries), float(keys), dtype=torch.float64, device=look.weights.device)
    visible = look.visible.expand(rows, -1, queries, keys)
    return visible.sum(-1).double().clamp(min=1)  # a query that sees none is padding


def _plus(one: Tensor, other: Tensor) -> Tensor:
    """Add two rows of numbers of different lengths."""
    total = torch.zeros(max(len(one), len(other)), dtype=torch.float64)
    total[: len(one)] += one
    total[: len(other)] += other
    return total
