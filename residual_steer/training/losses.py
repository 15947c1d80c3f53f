"""From a batch to a loss, and to what its mean was taken over, so that means can be put together."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from residual_steer.errors import SteerError

from .undisturbed import apart, as_before

__all__ = [
    "IGNORE",
    "Counts",
    "Loss",
    "Outcome",
    "counting",
    "counts",
    "counts_first",
    "measure",
    "next_token_loss",
    "rows_of",
]

IGNORE = -100  # labels with this value count for nothing, as everywhere in transformers

Loss = Callable[[nn.Module, Any], Tensor]


@dataclass(frozen=True)
class Counts:
    """What the mean loss of a batch may have been taken over.

    Attributes:
        all: the labels that count, those that are not -100; rows where there are no labels.
        behind: those behind the first of every row. A causal model predicts each label from what stands before it, so
            that the first counts for nothing.
    """

    all: int
    behind: int

    def weight(self, first: bool | None) -> int:
        """Return the count, by whether the first label of a row counts; where that is not known, it does not."""
        return self.all if first else self.behind


@dataclass(frozen=True)
class Outcome:
    """One batch, measured.

    Attributes:
        loss: mean loss, a scalar with a graph where gradients are on.
        counts: what that mean was taken over.
        correct: number of labels classified correctly, for `(x, y)` pairs; else None.
        rows: rows of the batch.
    """

    loss: Tensor
    counts: Counts
    correct: Tensor | None
    rows: int

    @property
    def weight(self) -> int:
        """What the mean was most likely taken over."""
        return self.counts.behind or self.counts.all


def measure(model: nn.Module, batch: Any, loss: Loss | None = None) -> Outcome:
    """Run one batch.

    Args:
        model: gives `.loss` for a dict, logits `(batch, classes, ...)` or an output with `.logits` for a pair.
        batch: a dict, which becomes keywords, or a pair `(x, y)` with class indices y, or shares of classes.
        loss: takes the model and the batch and returns a scalar, in place of all that.

    Raises:
        SteerError: the batch is neither, the model returned no loss, or the loss is no scalar.
    """
    rows, count = rows_of(batch), counts(batch, loss)
    if loss is not None:
        return Outcome(_scalar(loss(model, batch)), count, None, rows)
    if isinstance(batch, Mapping):
        output = model(**batch)
        value = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
        if value is None:
            raise SteerError(
                f"a dict batch is run as model(**batch).loss; {type(model).__name__} returned no loss for the keys "
                f"{', '.join(batch)}. Add 'labels' to the batch, or give `loss=`."
            )
        return Outcome(_scalar(value), count, None, rows)
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        x, y = batch
        logits = model(x)
        logits = logits if isinstance(logits, Tensor) else logits.logits
        classes = y.argmax(1) if y.is_floating_point() else y
        correct = (logits.argmax(1) == classes) & (classes != IGNORE)
        return Outcome(F.cross_entropy(logits, y), count, correct.sum(), rows)
    raise SteerError(
        f"a batch is a dict or a pair (x, y); this one is a {type(batch).__name__}. Give `loss=`, a function of the "
        "model and the batch."
    )


def counts(batch: Any, loss: Loss | None = None) -> Counts:
    """Return what the mean loss of a batch is taken over.

    Args:
        batch: as in `measure`.
        loss: as in `measure`; where its mean is taken over something else, it says so by an attribute `weight`, a
            function of the batch that returns a number.
    """
    own = getattr(loss, "weight", None)
    if callable(own):
        return Counts(int(own(batch)), int(own(batch)))
    labels = _labels(batch, loss)
    if labels is None:
        rows = rows_of(batch)
        return Counts(rows, rows)
    counted = labels != IGNORE
    behind = counted[:, 1:] if _may_shift(batch, labels, loss) else counted
    every = behind if loss is next_token_loss else counted
    return Counts(int(every.sum()), int(behind.sum()))


def counting(batch: Any, loss: Loss | None = None) -> Any:
    """Return a batch that weighs nothing with one label that counts, so that its mean is a number, to be left out."""
    labels = _labels(batch, loss)
    if labels is None:
        return batch
    labels = labels.clone()
    labels[..., -1] = 0
    return _with_labels(batch, labels)


@torch.no_grad()
def counts_first(model: nn.Module, batch: Any, run: Callable[[Any], Tensor], loss: Loss | None = None) -> bool:
    """Find out whether the first label of a row counts: whether the loss moves when these labels are others.

    Names do not tell: causal models shift their labels, masked ones and encoder-decoders do not, and behind a prompt
    that was put in front of the text the first one counts. It takes four passes in evaluation mode.

    Args:
        model: left as it was.
        batch: as in `measure`.
        run: from a batch to its loss.
        loss: as in `measure`.
    """
    labels = _labels(batch, loss)
    if labels is None or not _may_shift(batch, labels, loss) or loss is next_token_loss:
        return False
    valid = labels[labels != IGNORE]
    least, most = (valid.min(), valid.max()) if valid.numel() else (labels.new_zeros(()), labels.new_zeros(()))
    others = torch.where(labels == least, most, least)
    others = torch.where(labels == others, IGNORE, others)  # one label only
    first, rest = labels.clone(), others.clone()
    first[:, 0], rest[:, 0] = others[:, 0], labels[:, 0]
    with as_before(model), apart():
        model.eval()
        one, again, moved, control = (
            float(run(b)) for b in (batch, batch, _with_labels(batch, first), _with_labels(batch, rest))
        )
    if math.isnan(one) or math.isnan(moved):  # a mean over nothing, in a batch where no label but the first counts
        return not math.isnan(moved)
    noise = 2 * abs(again - one)
    return abs(moved - one) > noise or abs(control - one) <= noise  # a loss that no label moves is one over all


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


def _labels(batch: Any, loss: Loss | None) -> Tensor | None:
    """Return the labels that are class indices; None where there are none."""
    if isinstance(batch, Mapping):
        labels = batch.get("labels", batch.get("input_ids") if loss is next_token_loss else None)
    else:
        labels = batch[1] if isinstance(batch, (tuple, list)) and len(batch) == 2 else None
    whole = isinstance(labels, Tensor) and labels.dim() > 0 and not labels.is_floating_point()
    return labels if whole else None


def _may_shift(batch: Any, labels: Tensor, loss: Loss | None) -> bool:
    """Return whether there are labels for every token, by a model or a function that may leave out the first."""
    return labels.dim() == 2 and (isinstance(batch, Mapping) or loss is not None)


def _with_labels(batch: Any, labels: Tensor) -> Any:
    return {**batch, "labels": labels} if isinstance(batch, Mapping) else (batch[0], labels)


def _scalar(value: Any) -> Tensor:
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.dtype.is_floating_point:
        shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise SteerError(f"a loss is a scalar tensor; received {shape}.")
    return torch.squeeze(value)
