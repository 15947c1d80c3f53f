"""What was selected when a forward pass ran, for what happens after it: recomputation, and rows that are checked.

Activation checkpointing runs a part of the forward pass again inside `backward()`. What it computes then must be what
it computed before, whatever has been selected since. So the outputs of a pass remember its selection: the gradient that
arrives there says to which selection the backward pass belongs.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from functools import partial
from typing import Any

from torch import Tensor
from torch.utils.hooks import unserializable_hook

from ._internals import backward_pass
from .routing import OFF, Mix

__all__ = [
    "Call",
    "Selection",
    "current_call",
    "enter_call",
    "leave_call",
    "remember",
    "selection_of_backward",
    "tensors_in",
]

_KEPT = 64  # backward passes whose selection is known, of which rarely more than one runs


@dataclass(frozen=True, eq=False)
class Selection:
    """What one `use` selected.

    Attributes:
        mix: which fields act.
        trains: the fields that train.
        points: where they stand: name, site and block index.
        inner: the fields that train tensors inside the blocks, which a selection puts in place.
    """

    mix: Mix = OFF
    trains: frozenset[str] = frozenset()
    points: frozenset[tuple[str, str, int]] = frozenset()
    inner: frozenset[str] = frozenset()


_selections: OrderedDict[int, Selection] = OrderedDict()
_lock = threading.Lock()


def remember(output: Any, selection: Selection) -> None:
    """Let the backward passes that begin at the tensors of an output know their selection."""
    for tensor in tensors_in(output):
        if tensor.requires_grad and not tensor.is_leaf:
            hook = unserializable_hook(partial(_arrive, selection))  # type: ignore[no-untyped-call]
            tensor.register_hook(hook)  # type: ignore[no-untyped-call]


def _arrive(selection: Selection, gradient: Tensor) -> None:
    with _lock:
        _selections[backward_pass()] = selection
        while len(_selections) > _KEPT:
            _selections.popitem(last=False)


def selection_of_backward() -> tuple[bool, Selection | None]:
    """Return whether a backward pass is running in this thread, and the selection of its forward pass, if known."""
    number = backward_pass()
    return number != -1, _selections.get(number)


@dataclass
class Call:
    """One call of a steered model whose rows differ.

    Attributes:
        batch: rows of the batch, None where they could not be found among what the model was given.
        met: ids of the modules with versions by row that were called.
    """

    batch: int | None
    met: set[int] = field(default_factory=set)


class _Calls(threading.local):
    """The calls that are running in this thread, the innermost last."""

    def __init__(self) -> None:
        self.stack: list[Call] = []


_calls = _Calls()


def enter_call(call: Call) -> None:
    """Begin a call in this thread."""
    _calls.stack.append(call)


def leave_call() -> Call | None:
    """End the innermost call of this thread and return it, None if there is none."""
    return _calls.stack.pop() if _calls.stack else None


def current_call() -> Call | None:
    """Return the innermost call that is running in this thread."""
    return _calls.stack[-1] if _calls.stack else None


def tensors_in(value: Any, depth: int = 5) -> Iterator[Tensor]:
    """Yield the tensors in an argument or output, whatever dicts, lists and dataclasses they are nested in."""
    if isinstance(value, Tensor):
        yield value
    elif depth:
        parts: Any = ()
        if isinstance(value, Mapping):
            parts = value.values()
        elif isinstance(value, (tuple, list)):
            parts = value
        elif is_dataclass(value) and not isinstance(value, type):
            parts = [getattr(value, each.name) for each in fields(value)]
        for part in parts:
            yield from tensors_in(part, depth - 1)
