"""Measuring a model on validation data."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from residual_steer.errors import SteerError
from residual_steer.training import randomness
from residual_steer.training.environment import to_device
from residual_steer.training.losses import Loss, measure
from residual_steer.training.modes import as_before

__all__ = ["evaluate", "means", "totals"]


def evaluate(model: nn.Module, loader: Iterable[Any], loss: Loss | None = None) -> dict[str, float]:
    """Measure a model in evaluation mode, on its own device; modes and random generators are left as they were.

    Args:
        model: any model.
        loader: batches as in `fit`.
        loss: as in `fit`.

    Returns:
        `loss`, the mean over batches weighed by their labels that count (before a causal model shifts them), by their
        rows where they have no labels of their own; and for `(x, y)` pairs `accuracy` from 0 to 1.

    Raises:
        SteerError: the loader is empty, or a batch is unusable.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with as_before(model), randomness.apart():
        return means(totals(model, loader, loss, device))


@torch.no_grad()
def totals(model: nn.Module, loader: Iterable[Any], loss: Loss | None, device: torch.device) -> Tensor:
    """Return the sums of loss · weight, weight, correct rows, classified rows; in fp64 where the device has it."""
    model.eval()
    dtype = torch.float32 if device.type == "mps" else torch.float64
    totals = torch.zeros(4, dtype=dtype, device=device)
    for batch in loader:
        outcome = measure(model, to_device(batch, device), loss)
        totals[0] += outcome.loss.to(dtype) * outcome.weight
        totals[1] += outcome.weight
        if outcome.correct is not None:
            totals[2] += outcome.correct
            totals[3] += outcome.rows
    return totals


def means(sums: Tensor) -> dict[str, float]:
    """Return the means that `totals` gave the sums of.

    Raises:
        SteerError: nothing was summed.
    """
    loss, weight, correct, rows = sums.tolist()
    if not weight:
        raise SteerError("the loader gave nothing to evaluate: no batch, or no label that counts.")
    return {"loss": loss / weight, **({"accuracy": correct / rows} if rows else {})}
