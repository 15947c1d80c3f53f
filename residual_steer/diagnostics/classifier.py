"""The linear classifier at the end of a model, and the features that enter it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from residual_steer.errors import SteerError
from residual_steer.passes import Batch, require_finite

__all__ = ["Classifier", "Features", "find_classifier"]


@dataclass(frozen=True)
class Features:
    """What a classifier did with a batch.

    Attributes:
        entered: features, `(rows, width)`.
        left: logits, `(rows, classes)`.
    """

    entered: Tensor
    left: Tensor


@dataclass(frozen=True)
class Classifier:
    """The last linear layer of a model.

    Attributes:
        path: where it stands in the model.
        linear: the layer; its weight is `(classes, width)`.
        proved: whether it was found by its output, which is then looked for in every batch: it may run at every token,
            of which the model takes one for each row.
    """

    path: str
    linear: nn.Linear
    proved: bool

    def features(self, model: nn.Module, batch: Batch) -> Features:
        """Run the model and return what entered and left the classifier.

        Raises:
            SteerError: it was not called, or not with one vector per row of the batch; a value is NaN or infinite.
        """
        calls = _Calls({self.path: self.linear})
        with calls:
            logits = _logits(batch.run(model))
        seen = calls.seen.get(self.path)
        if self.proved and logits is not None:
            require_finite("the logits of a batch", logits)
        found = seen and _by_row(seen, logits if self.proved else None, batch.rows)
        if not found:
            shape = f"an input of shape {tuple(seen.entered.shape)}" if seen else "no input"
            raise SteerError(
                f"the classifier {self.path!r} takes one vector per row; for a batch of {batch.rows} rows it was given "
                f"{shape}. Name the right layer with `head`."
            )
        require_finite(f"what enters {self.path!r}", found.entered)
        return found


def find_classifier(model: nn.Module, batch: Batch, head: str | None) -> Classifier:
    """Find the last `nn.Linear` whose output is what the model returns as logits, or take the one that is named.

    Args:
        model: in evaluation mode.
        batch: to run it on.
        head: the path of an `nn.Linear`; None looks for it.

    Raises:
        SteerError: there is no such module, or none whose output is the model's; the logits are not
            `(rows, classes)`, NaN or infinite.
    """
    if head is not None:
        named = dict(model.named_modules()).get(head) if isinstance(head, str) else None
        if not isinstance(named, nn.Linear):
            paths = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
            raise SteerError(f"`head` is the path of an nn.Linear, such as {paths[-1:]}; received {head!r}.")
        return Classifier(head, named, False)
    logits = _logits(batch.run(model))
    if logits is None or logits.dim() != 2 or len(logits) != batch.rows:
        shape = "none" if logits is None else str(tuple(logits.shape))
        raise SteerError(
            f"neural collapse is measured on a classifier, whose logits are (rows, classes); for {batch.rows} rows "
            f"this {type(model).__name__} gave {shape}. Name a linear layer with one vector per row with `head`."
        )
    require_finite("the logits of a batch", logits)
    linears = {path: m for path, m in model.named_modules() if isinstance(m, nn.Linear)}
    calls = _Calls({path: linear for path, linear in linears.items() if linear.out_features == logits.shape[1]})
    with calls:
        logits = _logits(batch.run(model))
    found = [path for path, seen in calls.seen.items() if _by_row(seen, logits, batch.rows)]
    if not found:
        raise SteerError(
            f"the classifier is the last nn.Linear whose output is the model's logits, and no layer of this "
            f"{type(model).__name__} gives them (tried: {', '.join(calls.linears) or 'none has as many outputs'}). "
            "Name the layer with `head`."
        )
    return Classifier(found[-1], linears[found[-1]], True)


class _Calls:
    """The last call of each of some linear layers, in the order of the calls, while `with calls:`."""

    def __init__(self, linears: Mapping[str, nn.Linear]) -> None:
        self.linears = linears
        self.seen: dict[str, Features] = {}

    def __enter__(self) -> None:
        self._handles = [linear.register_forward_hook(self._note(path)) for path, linear in self.linears.items()]

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _note(self, path: str) -> Any:
        def note(linear: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            self.seen.pop(path, None)
            self.seen[path] = Features(args[0].detach(), output.detach())

        return note


def _logits(output: Any) -> Tensor | None:
    """Return the logits in a model's output: the tensor itself, or `.logits`."""
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    return logits if isinstance(logits, Tensor) else None


def _by_row(seen: Features, logits: Tensor | None, rows: int) -> Features | None:
    """Return one vector per row: all that entered, or, where every token did, the one whose output is the row's logits.

    Args:
        seen: of shape `(rows, …)` or `(rows, length, …)`.
        logits: what has to be found, None to take what entered as it is.
        rows: of the batch.
    """
    left = seen.left if logits is None else seen.left.to(logits.dtype)
    if len(left) != rows:
        return None
    if left.dim() == 2:
        return seen if logits is None or torch.equal(left, logits) else None
    if left.dim() != 3 or logits is None:
        return None
    same = (left == logits[:, None]).all(-1)
    if not bool(same.any(1).all()):
        return None
    at = torch.arange(rows, device=same.device), same.int().argmax(1)
    return Features(seen.entered[at], seen.left[at])
