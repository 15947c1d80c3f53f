"""Sums, means and covariances of what comes in batches, in fp64, the same however the batches are cut.

Batches are merged as in Chan, Golub and LeVeque 1983: no sum of squares is taken about a point far from the mean.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def exact(tensor: Tensor) -> Tensor:
    """Return a tensor in fp64, on the CPU where its own device has no such numbers."""
    return tensor.detach().to("cpu" if tensor.device.type == "mps" else tensor.device, torch.float64)


class Sums(dict[Any, Tensor]):
    """Sums by key, on the CPU. Tensors whose last dimension is shorter are filled up with zeros."""

    def add(self, key: Any, values: Tensor) -> None:
        """Add values to the sum of a key, which begins with them."""
        values = exact(values).cpu()
        before = self.get(key)
        if before is not None and values.dim():
            longer = max(before.shape[-1], values.shape[-1])
            before, values = (F.pad(x, (0, longer - x.shape[-1])) for x in (before, values))
        self[key] = values if before is None else before + values

    def layers(self, *key: Any) -> Tensor:
        """Return the sums of the keys `(*key, 0)`, `(*key, 1)`, … as one tensor, a layer each."""
        return torch.stack([self[one] for one in sorted(one for one in self if one[:-1] == key)])


class Moments:
    """The means of x and y, and their scatter Σ (x − x̄)(y − ȳ)ᵀ; y is x itself where none is given.

    Attributes:
        count: how many pairs were added.
        mean: x̄, `(width,)`.
        other: ȳ, `(width of y,)`.
        scatter: `(width, width of y)`; divided by `count` it is the covariance.
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean = self.other = self.scatter = torch.zeros(0)

    def add(self, x: Tensor, y: Tensor | None = None) -> None:
        """Add a batch, x `(rows, width)` and y `(rows, width of y)`, in fp64."""
        y = x if y is None else y
        if not len(x):
            return
        mean, other = x.mean(0), y.mean(0)
        scatter = (x - mean).T @ (y - other)
        if self.count:
            total = self.count + len(x)
            step, step_other = mean - self.mean, other - self.other
            scatter = self.scatter + scatter + torch.outer(step, step_other) * (self.count * len(x) / total)
            mean, other = self.mean + step * (len(x) / total), self.other + step_other * (len(x) / total)
        self.count += len(x)
        self.mean, self.other, self.scatter = mean, other, scatter


class ClassMoments:
    """The mean of every class, and the scatter of rows about the mean of their class.

    Attributes:
        counts: rows of each class, `(classes,)`.
        means: `(classes, width)`; 0 for a class without rows.
        within: Σ (h − μ_c)(h − μ_c)ᵀ over all rows, `(width, width)`.
    """

    def __init__(self, classes: int, width: int, device: torch.device) -> None:
        shapes = (classes,), (classes, width), (width, width)
        self.counts, self.means, self.within = (torch.zeros(s, dtype=torch.float64, device=device) for s in shapes)

    def add(self, rows: Tensor, labels: Tensor) -> None:
        """Add a batch: rows `(rows, width)` in fp64, and their class indices, `(rows,)`."""
        counts = torch.zeros_like(self.counts).index_add_(0, labels, torch.ones_like(rows[:, 0]))
        means = torch.zeros_like(self.means).index_add_(0, labels, rows) / counts.clamp_min(1)[:, None]
        centred = rows - means[labels]
        step, total = means - self.means, (self.counts + counts).clamp_min(1)
        self.within += centred.T @ centred + (step * (self.counts * counts / total)[:, None]).T @ step
        self.means += step * (counts / total)[:, None]
        self.counts += counts
