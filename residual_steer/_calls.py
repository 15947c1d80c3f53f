"""Calls of a steered model: whose rows they have, and to which selection a backward pass belongs.

Activation checkpointing runs a part of a forward pass again inside `backward()`, whatever was selected since. So the
gradient that arrives at the outputs of a pass says which selection they were computed under.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ._caches import cache_of
from ._frozen import Replaced
from ._internals import backward_pass
from ._segments import Segments
from .backbone import Handle
from .errors import SteerError
from .routing import OFF, Mix, Route, misfit

Given = tuple[nn.Module, tuple[tuple[Any, ...], Mapping[str, Any]], int]  # a module, its call, and how many rows

_KEPT = 64  # backward passes whose selection is known, of which rarely more than one runs
_FREE = ("position_ids", "cache_position")  # which may be one for all rows


@dataclass(frozen=True, eq=False)
class Selected:
    """What one `use` selected, as the outputs of a forward pass remember it."""

    mix: Mix = OFF
    trains: frozenset[str] = frozenset()  # the fields that train
    routes: Mapping[tuple[str, int], Route] = field(default_factory=dict)  # by site and block index
    inner: frozenset[str] = frozenset()  # the fields with tensors inside the blocks, which a selection puts in place
    prompt: bool | Tensor | None = None  # in a call whose fields act on the prompt alone: which tokens that is
    again: bool = False  # whether blocks ran without gradients in a call with them, to be computed again in backward
    removed: list[bool] = field(default_factory=list)  # not empty once the model is steered no more


_selections: OrderedDict[int, Selected] = OrderedDict()
_lock = threading.Lock()


def arrived(selected: Selected, gradient: Tensor) -> None:
    """Note that the backward pass that runs is of a forward pass under this selection: a hook of its outputs."""
    if selected.again and selected.removed and selected.mix.names:
        raise SteerError(
            "activation checkpointing computes a block again in `backward()`, and the model was unsteered since: the "
            f"field {selected.mix.names[0]!r} would be left out. Call backward() before `unsteer`."
        )
    with _lock:
        _selections[backward_pass()] = selected
        while len(_selections) > _KEPT:
            _selections.popitem(last=False)


def selection_of_backward() -> tuple[bool, Selected | None]:
    """Return whether a backward pass is running in this thread, and the selection of its forward pass, if known."""
    number = backward_pass()
    return number != -1, _selections.get(number)


@dataclass
class Call:
    """One call of a steered model whose rows or tokens differ."""

    owner: Any  # the steering of the model that was called
    mix: Mix  # what was selected then
    batch: int | None = None  # rows of the batch, where they were found among what the model was given
    met: set[int] = field(default_factory=set)  # ids of the modules with versions by row that were called
    segments: Segments | None = None  # which field acts on which tokens, where that is another in every call
    prompt: bool | Tensor = True  # which tokens are the prompt, (batch, length), or all or none
    given: Given | None = None  # the model, what it was called with, and its rows
    ordered: set[torch.Size] = field(default_factory=set)  # shapes of streams whose rows were seen to be the batch's


class _Running(threading.local):
    """What runs in this thread: calls, the innermost last, and what entered the blocks, by the id of their injector."""

    def __init__(self) -> None:
        self.calls: list[Call] = []  # those of models that are under way, unless an error kept their end from us
        self.entered: dict[int, Any] = {}
        self.again = False  # whether a field acted without gradients
        self.blocks: dict[int, Given] = {}  # around a part of a block, until the order of its rows was seen

    def end(self, owner: Any) -> Call | None:
        """Take away the calls of a model, and return the last one, None if there is none."""
        mine = [call for call in self.calls if call.owner is owner]
        self.calls = [call for call in self.calls if call.owner is not owner]
        if not self.calls:
            self.blocks.clear()  # of a part that was not reached: it would hold on to what entered the block
        return mine[-1] if mine else None

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Keep what is noted of the blocks that run, while they run once more."""
        entered, blocks = dict(self.entered), dict(self.blocks)
        try:
            yield
        finally:
            self.entered, self.blocks = entered, blocks


running = _Running()


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


def _find(given: Any, name: str, depth: int = 5) -> Tensor | None:
    """Return the tensor that goes by a name in an argument, whatever it is nested in."""
    if isinstance(given, Mapping):
        if isinstance(given.get(name), Tensor):
            return given[name]  # type: ignore[no-any-return]
        given = list(given.values())
    if not depth or not isinstance(given, (list, tuple)):
        return None
    return next((found for part in given if (found := _find(part, name, depth - 1)) is not None), None)


def batch_of(backbone: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int | None:
    """Return the number of rows of a call, None if it cannot be told.

    It is the first dimension that all tensors share, but for masks that are one for all rows; where they differ, as
    patches of images do, that of what transformers names the main input.
    """
    given = {str(place): value for place, value in enumerate(args)}
    given |= {name: value for name, value in kwargs.items() if name not in _FREE}
    every = [tensor for tensor in tensors_in(given) if tensor.dim() and not tensor.is_nested and tensor.numel()]
    sizes = {x.shape[0] for x in every if x.dim() > 1} or {x.shape[0] for x in every}
    if len(sizes) > 1:
        sizes -= {1}
    if len(sizes) > 1:
        mains = (getattr(backbone, "main_input_name", "input_ids"), "input_ids", "inputs_embeds", "decoder_input_ids")
        named = [_find(given, name) for name in mains]
        sizes = {x.shape[0] for x in named[:1] if x is not None} or {x.shape[0] for x in named if x is not None}
    return sizes.pop() if len(sizes) == 1 else None


class Repeats:
    """Sequences whose rows `generate` of transformers repeated, for beams and several sequences.

    It repeats rows in place before the first call, so that groups of them are equal; later calls go on with the cache
    of that call, or begin with its tokens.
    """

    def __init__(self) -> None:
        self._caches: weakref.WeakSet[Any] = weakref.WeakSet()
        self._begun: list[Tensor] = []

    def __reduce__(self) -> tuple[Any, ...]:
        """Leave sequences that are under way out of copies."""
        return Repeats, ()

    def check(self, rows: int, batch: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Raise unless every row of a mix stands for as many consecutive rows of this batch, equal at the beginning."""
        cache, words = cache_of(kwargs), _find(kwargs, "input_ids")
        words = _find(kwargs, "decoder_input_ids") if words is None else words
        generating = not torch.is_grad_enabled() and (cache is not None or "use_cache" in kwargs)
        if batch % rows == 0 and generating:
            if (cache is not None and cache in self._caches) or self._goes_on(words):
                return
            every = [x for x in tensors_in([args, dict(kwargs)]) if x.dim() and x.shape[0] == batch]
            groups = [x.reshape(rows, batch // rows, *x.shape[1:]) for x in every]
            if groups and all(torch.equal(x, x[:, :1].expand_as(x)) for x in groups):
                self._caches.update([] if cache is None else [cache])
                if words is not None:
                    self._begun = [*self._begun[-7:], words.clone()]
                return
        raise misfit(rows, batch, "; only `generate` may repeat rows, for beams and several sequences")

    def go_on(self, batch: int | None, output: Any) -> None:
        """Remember the cache that a call made, where its rows were accepted as repeated ones."""
        if batch is not None and isinstance(output, Mapping) and any(len(words) == batch for words in self._begun):
            cache = cache_of(output)
            self._caches.update([] if cache is None else [cache])

    def _goes_on(self, words: Tensor | None) -> bool:
        """Return whether tokens begin as those of a sequence whose rows were accepted."""
        return words is not None and any(
            words.shape[0] == first.shape[0]
            and words.shape[1] > first.shape[1]
            and torch.equal(words[:, : first.shape[1]], first)
            for first in self._begun
        )


def encoding(model: nn.Module, state: Any) -> list[Handle]:
    """Keep rows and names together in sentence-transformers, which sorts texts by length before it calls the model."""
    known = any(cls.__module__.startswith("sentence_transformers.") for cls in type(model).__mro__)
    sorting = [name for name in ("encode", "predict") if known and callable(getattr(model, name, None))]
    return [Replaced(model, name, partial(_by_field, name, model, state)) for name in sorting]


def _by_field(method: str, model: Any, state: Any, *args: Any, **kwargs: Any) -> Any:
    """Run the texts of each field under that field alone; return all in the order in which they were given."""
    own, mix = Replaced.own(model, method, state.handles), state.mix
    names, key = mix.asked(), "sentences" if "sentences" in kwargs else "inputs"
    texts = args[0] if args else kwargs.get(key)
    if not isinstance(names, list) or texts is None or _is_one(model, method, texts):
        return own(*args, **kwargs)
    if len(texts) != len(names):
        raise SteerError(
            f"the list given to `use` has {len(names)} rows, and `{method}` was given {len(texts)} texts. Give one "
            "name or None for every text."
        )
    found: list[Any] = [None] * len(names)
    part: Any = None
    try:
        for name in dict.fromkeys(names):
            places = [place for place, each in enumerate(names) if each == name]
            state.select(model, Mix.parse({} if name is None else {name: 1.0}, mix.names))
            some = [texts[place] for place in places]
            part = own(some, *args[1:], **kwargs) if args else own(**{**kwargs, key: some})
            for place, each in zip(places, part, strict=True):
                found[place] = each
    finally:
        state.select(model, mix)
    if isinstance(part, list):
        return found
    return torch.stack(found) if isinstance(part, Tensor) else np.stack(found)


def _is_one(model: Any, method: str, texts: Any) -> bool:
    """Return whether a text, or a pair of a CrossEncoder, was given that is in no list."""
    if hasattr(model, "is_singular_input"):
        return bool(model.is_singular_input(texts))
    return isinstance(texts, str) or (method == "predict" and isinstance(texts[0], str))
