"""Measuring a model on validation data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from residual_steer.errors import SteerError
from residual_steer.training.losses import Loss, counting, counts, counts_first, measure
from residual_steer.training.processes import to_device
from residual_steer.training.undisturbed import apart, as_before

__all__ = ["Evaluation", "evaluate"]


def evaluate(model: nn.Module, loader: Iterable[Any], loss: Loss | None = None) -> dict[str, float]:
    """Measure a model in evaluation mode, on its own device; modes and random generators are left as they were.

    Args:
        model: any model.
        loader: batches as in `fit`.
        loss: as in `fit`.

    Returns:
        `loss`, the mean over all batches' labels that count, those that are not -100 and, in a causal model, not the
        first of their row; over rows where there are no labels. For `(x, y)` pairs also `accuracy` from 0 to 1.

    Raises:
        SteerError: the loader is empty, no label counts, or a batch is unusable.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    return Evaluation(model, loss, device).over((batch, True) for batch in loader)


class Evaluation:
    """Measure a model again and again.

    Args:
        model: whose modes and random generators are left as they were.
        loss: as in `fit`.
        device: where batches go.
        autocast: makes the context that batches run in.
        sum: from sums of this process to sums of all.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss | None,
        device: torch.device,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
        sum: Callable[[Tensor], Tensor] = lambda sums: sums,
    ) -> None:
        self._model, self._loss, self._device, self._autocast, self._sum = model, loss, device, autocast, sum
        self.first: bool | None = None  # whether the first label of a row counts, once that is known

    def over(self, batches: Iterable[tuple[Any, bool]]) -> dict[str, float]:
        """Return the means over batches, each with whether it counts.

        Raises:
            SteerError: there is nothing that counts.
        """
        with as_before(self._model), apart(), torch.no_grad():
            self._model.eval()
            sums, sample = self._totals(batches)
            found = self._sum(sums)
            return self._means(found, sample)

    def settle(self, batch: Any) -> None:
        """Find out whether the first label of a row counts, if that is not known yet; on all processes at once."""
        if self.first is None:
            batch = to_device(batch, self._device)
            here = counts_first(self._model, batch, lambda changed: self._run(changed).loss, self._loss)
            self.first = bool(self._sum(torch.tensor([float(here)])) > 0)

    def _run(self, batch: Any) -> Any:
        with self._autocast():
            return measure(self._model, batch, self._loss)

    def _totals(self, batches: Iterable[tuple[Any, bool]]) -> tuple[Tensor, Any]:
        """Return the sums of loss · weight and of weight, by either way to weigh; of correct and of classified labels.

        Of two ways to weigh a batch, one is right: which one is asked for at the end, if it makes a difference.
        """
        dtype = torch.float32 if self._device.type == "mps" else torch.float64
        sums, sample = torch.zeros(6, dtype=dtype, device=self._device), None
        for batch, here in batches:
            count = counts(batch, self._loss)
            sample = batch if sample is None or count.behind < count.all else sample
            outcome = self._run(to_device(batch if count.all else counting(batch, self._loss), self._device))
            if not here or not count.all:
                continue
            value = outcome.loss.to(dtype)
            sums[:2] += torch.stack([value * count.all, value.new_tensor(count.all)])
            if count.behind:
                sums[2:4] += torch.stack([value * count.behind, value.new_tensor(count.behind)])
            if outcome.correct is not None:
                sums[4] += outcome.correct
                sums[5] += count.all
        return sums, sample

    def _means(self, sums: Tensor, sample: Any) -> dict[str, float]:
        total, weight, behind, less, correct, classified = sums.tolist()
        alike = weight and less and math.isclose(total / weight, behind / less, rel_tol=1e-9)
        if weight and not alike:
            self.settle(sample)
        if not alike and not self.first:
            total, weight = behind, less
        if not weight:
            raise SteerError("the loader gave nothing to evaluate: no batch, or no label that counts.")
        return {"loss": total / weight, **({"accuracy": correct / classified} if classified else {})}
