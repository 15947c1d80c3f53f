"""From a batch to a loss: what `fit` and `evaluate` do when they are given no loss of the user's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from residual_steer.errors import SteerError

__all__ = ["IGNORE", "Loss", "Outcome", "measure", "next_token_loss", "rows_of"]

IGNORE = -100  # labels with this value count for nothing, as everywhere in transformers

Loss = Callable[[nn.Module, Any], Tensor]


@dataclass(frozen=True)
class Outcome:
    """One batch, measured.

    Attributes:
        loss: mean loss, a scalar with a graph where gradients are on.
        weight: what that mean was taken over: labels that count, or rows.
        correct: number of rows classified correctly, for `(x, y)` pairs; else None.
        rows: rows of the batch.
    """

    loss: Tensor
    weight: int
    correct: Tensor | None
    rows: int


def measure(model: nn.Module, batch: Any, loss: Loss | None = None) -> Outcome:
    """Run one batch.

    Args:
        model: gives `.loss` for a dict, logits `(batch, classes)` or an output with `.logits` for a pair.
        batch: a dict, which becomes keywords, or a pair `(x, y)` with class indices y.
        loss: takes the model and the batch and returns a scalar, in place of all that.

    Raises:
        SteerError: the batch is neither, the model returned no loss, or the loss is no scalar.
    """
    rows = rows_of(batch)
    if loss is not None:
        return Outcome(_scalar(loss(model, batch)), _weight(batch, rows), None, rows)
    if isinstance(batch, Mapping):
        output = model(**batch)
        value = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
        if value is None:
            raise SteerError(
                f"a dict batch is run as model(**batch).loss; {type(model).__name__} returned no loss for the keys "
                f"{', '.join(batch)}. Add 'labels' to the batch, or give `loss=`."
            )
        return Outcome(_scalar(value), _weight(batch, rows), None, rows)
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        x, y = batch
        logits = model(x)
        logits = logits if isinstance(logits, Tensor) else logits.logits
        return Outcome(F.cross_entropy(logits, y), rows, (logits.argmax(-1) == y).sum(), rows)
    raise SteerError(
        f"a batch is a dict or a pair (x, y); this one is a {type(batch).__name__}. Give `loss=`, a function of the "
        "model and the batch."
    )


def next_token_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Return the causal language model's loss where the model computes none itself, as `mamba_ssm`'s.

    Args:
        model: maps `input_ids`, `(batch, length)`, to an output with `.logits`, `(batch, length, vocabulary)`.
        batch: has `input_ids` and, optionally, `labels` of the same shape; labels of -100 do not count.
    """
    ids = batch["input_ids"]
    logits = model(input_ids=ids).logits[:, :-1]
    labels = batch.get("labels", ids)[:, 1:]
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORE)


def rows_of(batch: Any) -> int:
    """Return the number of rows, the first dimension of the first tensor in the batch; 1 if there is none."""
    values = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (tuple, list)) else (batch,)
    for value in values:
        if isinstance(value, Tensor) and value.dim():
            return value.shape[0]
    return 1


def _weight(batch: Any, rows: int) -> int:
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    if isinstance(labels, Tensor) and labels.dim() > 1 and not labels.is_floating_point():
        return int((labels != IGNORE).sum())
    return rows


def _scalar(value: Any) -> Tensor:
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.dtype.is_floating_point:
        shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise SteerError(f"a loss is a scalar tensor; received {shape}.")
    return torch.squeeze(value)
