"""The measures of a displacement field at points of it: whether neighbours move alike, and states come together."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["NEIGHBOURS", "Draw", "FieldMeasures", "measures_of"]

NEIGHBOURS = 8  # of a point, whose displacements its own is compared with


@dataclass(frozen=True)
class FieldMeasures:
    """The measures of a displacement field, in the stream or in the plane. None where it is not defined.

    Attributes:
        coherence: the mean cosine between the displacement of a point and those of its 8 nearest neighbours in the
            frozen stream: 1 for a smooth field, `chance` for one without order.
        chance: the same between any two points, which is what coherence comes to if displacements are dealt out anew
            at random. A field that moves all states alike has 1 in both.
        contraction: after ÷ before, of the root mean square distance of a state from the mean of its class; where rows
            have no class, of the mean distance between two states. Below 1 states come together.
        divergence: of the field's best linear fit by least squares, tr J, divided by the number of directions: 0 for a
            field that only shifts or turns, −1 where all states end in one point.
    """

    coherence: float | None
    chance: float | None
    contraction: float | None
    divergence: float | None


class Draw:
    """Some of the states that come in batches, each as likely as any other: those with the smallest random keys."""

    def __init__(self, size: int, seed: int) -> None:
        self._size, self._random = size, np.random.default_rng(seed)
        self._keys = torch.zeros(0, dtype=torch.float64)
        self.states = torch.zeros(0)
        self.labels: Tensor | None = torch.zeros(0, dtype=torch.long)

    def add(self, states: Tensor, labels: Tensor | None) -> None:
        """Add states, `(states, 1 + methods, width)`, with their labels; none at all unless every batch has them."""
        keys = torch.cat([self._keys, torch.from_numpy(self._random.random(len(states)))])
        states = torch.cat([self.states.to(states), states]) if len(self.states) else states
        kept = keys.argsort()[: self._size]
        self._keys, self.states = keys[kept], states[kept.to(states.device)]
        if labels is not None and self.labels is not None:
            self.labels = torch.cat([self.labels, labels.cpu()])[kept]
        else:
            self.labels = None

    def sort(self) -> None:
        """Put the states in the order of their labels."""
        if self.labels is not None:
            order = self.labels.argsort(stable=True)
            self.labels, self.states = self.labels[order], self.states[order.to(self.states.device)]


def measures_of(start: Tensor, shift: Tensor, labels: Tensor | None, divergence: float | None) -> FieldMeasures:
    """Return the measures of the field that moves `start` by `shift`, `(points, dimensions)` both."""
    coherence, chance = _coherence(start, shift)
    before, after = (_spread(states, labels) for states in (start, start + shift))
    return FieldMeasures(coherence, chance, after / before if before else None, divergence)


def _coherence(start: Tensor, shift: Tensor) -> tuple[float | None, float | None]:
    """Return the mean cosine of displacements with those of neighbours, and with those of any other point."""
    moving = shift.norm(dim=1) > 0
    start, unit = start[moving], F.normalize(shift[moving], dim=1, eps=0.0)
    count = len(start)
    if count <= NEIGHBOURS:
        return None, None
    distance = torch.cdist(start, start, compute_mode="donot_use_mm_for_euclid_dist").fill_diagonal_(torch.inf)
    near = distance.topk(NEIGHBOURS, largest=False).indices
    coherence = (unit[:, None] * unit[near]).sum(-1).mean()
    chance = (unit.sum(0).square().sum() - count) / (count * (count - 1))
    return float(coherence), float(chance)


def _spread(states: Tensor, labels: Tensor | None) -> float:
    """Return the root mean square distance from the mean of the class, or the mean distance between two states."""
    if labels is None:
        return float(torch.pdist(states).mean()) if len(states) > 1 else 0.0
    _, of = torch.unique(labels.to(states.device), return_inverse=True)
    counts = torch.bincount(of).to(states)
    means = torch.zeros(len(counts), states.shape[1]).to(states).index_add_(0, of, states) / counts[:, None]
    return float((states - means[of]).square().sum(1).mean().sqrt())
