"""From a batch to its loss, to what that mean was taken over, and to the mean over many batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from residual_steer._batches import call, check_loader, device_of, labels_of, rows_of, shown, to_device
from residual_steer._checks import check_number
from residual_steer._undisturbed import apart, as_before
from residual_steer.errors import SteerError

from .data_order import Share

IGNORE = -100  # labels with this value count for nothing, as everywhere in transformers
_SLACK = 0.02  # by which shares of classes, rounded to bf16, may miss their sum

Loss = Callable[[nn.Module, Any], Tensor]


class Counts(NamedTuple):
    """What the mean loss of a batch may have been taken over."""

    all: float  # labels that are not -100; rows where there are no labels; a number that the loss gives
    behind: float  # those of them behind the first of every row, which a causal model has nothing to predict from


class Outcome(NamedTuple):
    """One batch, measured."""

    loss: Tensor  # the mean, a scalar
    correct: Tensor | None  # for pairs, how many labels were classified correctly, and how many at all, `(2,)`


def measure(model: nn.Module, batch: Any, loss: Loss | None = None) -> Outcome:
    """Run one batch.

    Args:
        model: gives `.loss` for a dict, logits `(batch, classes, ...)` or an output with `.logits` for a pair.
        batch: a dict, which becomes keywords, or a pair `(x, y)` with class indices y, or shares of classes.
        loss: takes the model and the batch and returns a scalar, in place of all that.

    Raises:
        SteerError: the batch is neither, or no batch of this model, y is neither, the model returned no loss, or the
            loss is no scalar.
    """
    value: Any
    correct = None
    if loss is not None:
        value = loss(model, batch)
    elif isinstance(batch, Mapping):
        output = call(model, batch)
        value = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
        if value is None:
            raise SteerError(
                f"a dict batch is run as model(**batch).loss; {type(model).__name__} returned no loss for the keys "
                f"{', '.join(batch)}. Add 'labels' to the batch, or give `loss=`."
            )
    elif isinstance(batch, (tuple, list)) and len(batch) == 2:
        output = call(model, batch)
        logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
        value, correct = _classified(logits, batch[1])
    else:
        raise SteerError(
            f"a batch is a dict or a pair (x, y); this one is a {type(batch).__name__}. Give `loss=`, a function of "
            "the model and the batch."
        )
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.dtype.is_floating_point:
        shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise SteerError(f"a loss is a scalar tensor; received {shape}.")
    return Outcome(value.squeeze(), correct)


def _classified(logits: Any, y: Any) -> tuple[Tensor, Tensor]:
    """Return the cross-entropy, how many labels were classified correctly, and how many at all."""
    fits = isinstance(logits, Tensor) and logits.dim() > 1 and logits.shape[1] > 1 and isinstance(y, Tensor)
    if fits and y.is_floating_point():
        fits = y.shape == logits.shape and bool((y >= 0).all() and ((y.float().sum(1) - 1).abs() < _SLACK).all())
    elif fits:
        y = y.long()
        known = (y == IGNORE) | (y >= 0) & (y < logits.shape[1])
        fits = y.shape == (len(logits), *logits.shape[2:]) and bool(known.all())
    if not fits:
        raise SteerError(
            "a pair (x, y) goes through cross-entropy: logits (batch, classes, …) of at least two classes, and y the "
            f"index of each row's class, or its shares of all classes, which sum to 1; received logits {shown(logits)} "
            f"and y {shown(y)}. For regression, or several labels of a row, give `loss=`, a function of the model and "
            "the batch."
        )
    classes = y.argmax(1) if y.is_floating_point() else y
    classified = classes != IGNORE
    correct = torch.stack([((logits.argmax(1) == classes) & classified).sum(), classified.sum()])
    return F.cross_entropy(logits, y), correct


def counts(batch: Any, loss: Loss | None) -> Counts:
    """Return what the mean loss of a batch is taken over; a loss says that itself by an attribute `weight`."""
    own = getattr(loss, "weight", None)
    labels = _labels(batch, loss)
    if callable(own) or labels is None:
        weight = float(own(batch)) if callable(own) else rows_of(batch)
        number = check_number("loss.weight", weight, at_least=0, meaning="of a batch")
        return Counts(number, number)
    counted = labels != IGNORE
    behind = counted[:, 1:] if _may_shift(batch, labels, loss) else counted
    every = behind if loss is next_token_loss else counted
    return Counts(int(every.sum()), int(behind.sum()))


def counting(batch: Any, loss: Loss | None) -> Any:
    """Return a batch that weighs nothing with one label that counts, so that its mean is a number, to be left out."""
    labels = _labels(batch, loss)
    if labels is None or not labels.numel():
        return batch
    labels = labels.clone()
    labels[..., -1] = 0
    return _with_labels(batch, labels)


def _labels(batch: Any, loss: Loss | None) -> Tensor | None:
    """Return the labels that are class indices; None where there are none."""
    labels = labels_of(batch)
    if labels is None and loss is next_token_loss and isinstance(batch, Mapping):
        labels = batch.get("input_ids")
    return None if labels is None or not labels.dim() or labels.is_floating_point() else labels


def _may_shift(batch: Any, labels: Tensor, loss: Loss | None) -> bool:
    """Return whether there are labels for every token, by a model or a function that may leave out the first."""
    return labels.dim() == 2 and (isinstance(batch, Mapping) or loss is not None)


def _with_labels(batch: Any, labels: Tensor) -> Any:
    return {**batch, "labels": labels} if isinstance(batch, Mapping) else (batch[0], labels)


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
        SteerError: the loader is empty, no label counts, a batch is unusable, or the model is on the meta device.
    """
    check_loader("loader", loader)
    device = device_of(model)
    if device.type == "meta":
        raise SteerError("this model is on the meta device and has no values. Load its weights, then evaluate.")
    return MeanLoss(model, loss, device).over(Share(loader))  # which begins to read it where generators come back


class MeanLoss:
    """The mean loss over many batches, as that of one batch with all their rows.

    A batch weighs as much as labels count in it, with the first of every row or without: that is found out where it
    makes a difference. Batches run on `device` in the context of `autocast`; `sum` sums over all processes.
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
        self._first: bool | None = None  # whether the first label of a row counts, once that is known

    def shares(self, parts: Sequence[tuple[Any, bool]]) -> tuple[list[float], int]:
        """Return the shares of batches, each with whether it counts, in the mean over those of all processes.

        And the rows of all; no shares where nothing counts on any process.
        """
        found = [counts(batch, self._loss) if here else Counts(0, 0) for batch, here in parts]
        sums = [sum(c.all for c in found), sum(c.behind for c in found), sum(rows_of(b) for b, here in parts if here)]
        every, behind, rows = self._sum(torch.tensor(sums, dtype=torch.float64)).tolist()
        if self._first is None and every != behind:
            uneven = any(c.all * behind != c.behind * every or c.behind < 1 <= c.all for c in found)
            if self._sum(torch.tensor(float(uneven))) > 0:
                most = max(range(len(parts)), key=lambda part: found[part].all)
                self._settle(parts[most][0])
        total = every if self._first else behind
        weights = [c.all if self._first else c.behind for c in found]
        return [weight / total for weight in weights] if total else [], int(rows)

    def over(self, batches: Iterable[tuple[Any, bool]]) -> dict[str, float]:
        """Return the means over batches, each with whether it counts; modes and random generators stay as they were."""
        dtype = torch.float32 if self._device.type == "mps" else torch.float64
        sums, sample = torch.zeros(6, dtype=dtype, device=self._device), None
        with as_before(self._model), apart(), torch.no_grad():
            self._model.eval()
            for batch, here in batches:
                count = counts(batch, self._loss)
                sample = batch if sample is None or count.behind < count.all else sample
                outcome = self._run(batch if count.all else counting(batch, self._loss))
                if not here or not count.all:
                    continue
                for at, weight in ((0, count.all), (2, count.behind)):
                    if weight:  # a mean over nothing is NaN
                        sums[at] += outcome.loss.to(dtype) * weight
                        sums[at + 1] += weight
                if outcome.correct is not None:
                    sums[4:] += outcome.correct
            total, weight, behind, less, correct, classified = self._sum(sums).tolist()
            alike = weight and less and math.isclose(total / weight, behind / less, rel_tol=1e-9)
            if weight and not alike:
                self._settle(sample)
                total, weight = (total, weight) if self._first else (behind, less)
        if not weight:
            raise SteerError("the loader gave nothing to evaluate: no batch, or no label that counts.")
        return {"loss": total / weight, **({"accuracy": correct / classified} if classified else {})}

    def _run(self, batch: Any) -> Outcome:
        with self._autocast():
            return measure(self._model, to_device(batch, self._device), self._loss)

    def _settle(self, batch: Any) -> None:
        """Find out whether the first label of a row counts, if that is not known; on all processes at once."""
        if self._first is None:
            with as_before(self._model), apart(), torch.no_grad():
                self._model.eval()
                here = self._counts_first(batch)
            self._first = bool(self._sum(torch.tensor(float(here))) > 0)

    def _counts_first(self, batch: Any) -> bool:
        """Return whether the loss moves when the first label of every row is another, by four passes.

        Names do not tell: causal models shift their labels, masked ones and encoder-decoders do not, and behind a
        prompt that was put in front of the text the first one counts.
        """
        labels = _labels(batch, self._loss)
        if labels is None or not _may_shift(batch, labels, self._loss) or self._loss is next_token_loss:
            return False
        valid = labels[labels != IGNORE]
        least, most = (valid.min(), valid.max()) if valid.numel() else (labels.new_zeros(()), labels.new_zeros(()))
        others = torch.where(labels == least, most, least)
        others = torch.where(labels == others, IGNORE, others)  # one label only
        first, rest = labels.clone(), others.clone()
        first[:, 0], rest[:, 0] = others[:, 0], labels[:, 0]
        variants = (batch, batch, _with_labels(batch, first), _with_labels(batch, rest))
        one, again, moved, control = (float(self._run(variant).loss) for variant in variants)
        if math.isnan(one) or math.isnan(moved):  # a mean over nothing: all along, or without the first
            return not math.isnan(one)
        noise = 2 * abs(again - one)
        return abs(moved - one) > noise or abs(control - one) <= noise  # a loss that no label moves is one over all
