"""Rows of a batch: how many a call has, and whose they are, where `use` was given one name or None for each.

The batch is looked for among all tensors of a call, whatever they are nested in and whatever their order: masks that
are one for all rows, and patches of images that are flattened over rows, are not taken for it. Where it cannot be told,
the stream must have exactly the rows that were named.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ._caches import cache_of
from .backbone import Handle
from .errors import SteerError
from .routing import Mix
from .selection import tensors_in

__all__ = ["Repeats", "batch_of", "rows_in_order"]

_FREE = ("position_ids", "cache_position")  # which may be one for all rows


def batch_of(backbone: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int | None:
    """Return the number of rows of a call, None if it cannot be told.

    It is the first dimension that all tensors share; where they differ, that of what transformers names the main input.
    """
    given = {str(place): value for place, value in enumerate(args)}
    given |= {name: value for name, value in kwargs.items() if name not in _FREE}
    every = [tensor for tensor in tensors_in(given) if tensor.dim() and not tensor.is_nested]
    sizes = {x.shape[0] for x in every if x.dim() > 1} or {x.shape[0] for x in every}
    if len(sizes) > 1:
        sizes -= {1}  # what is one for all rows
    if len(sizes) > 1:
        mains = (getattr(backbone, "main_input_name", "input_ids"), "input_ids", "inputs_embeds", "decoder_input_ids")
        named = [_find(given, name) for name in mains]
        sizes = {x.shape[0] for x in named[:1] if x is not None} or {x.shape[0] for x in named if x is not None}
    return sizes.pop() if len(sizes) == 1 else None


def _find(given: Any, name: str, depth: int = 5) -> Tensor | None:
    """Return the tensor that goes by a name in an argument, whatever it is nested in."""
    if isinstance(given, Mapping):
        if isinstance(given.get(name), Tensor):
            return given[name]  # type: ignore[no-any-return]
        given = list(given.values())
    if not depth or not isinstance(given, (list, tuple)):
        return None
    return next((found for part in given if (found := _find(part, name, depth - 1)) is not None), None)


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
        """Raise unless every row of a mix stands for as many consecutive rows of this batch, equal at the beginning.

        Raises:
            SteerError: the batch has other rows than were named.
        """
        cache = cache_of(kwargs)
        words = next(
            (x for x in (_find(kwargs, "input_ids"), _find(kwargs, "decoder_input_ids")) if x is not None), None
        )
        generating = not torch.is_grad_enabled() and (cache is not None or "use_cache" in kwargs)
        if batch % rows == 0 and generating:
            if (cache is not None and cache in self._caches) or self._goes_on(words):
                return
            every = [x for x in tensors_in([args, dict(kwargs)]) if x.dim() and x.shape[0] == batch]
            if every and all(_is_repeated(x, batch // rows) for x in every):
                self._caches.update([] if cache is None else [cache])
                if words is not None:
                    self._begun = [*self._begun[-7:], words.clone()]
                return
        raise SteerError(
            f"the list given to `use` has {rows} rows, and this batch has {batch}. Give one name or None for every "
            "row; only `generate` may repeat rows, for beams and several sequences."
        )

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


def _is_repeated(x: Tensor, times: int) -> bool:
    groups = x.reshape(-1, times, *x.shape[1:])
    return bool(torch.equal(groups, groups[:, :1].expand_as(groups)))


class _Encoding:
    """The `encode` of a sentence-transformer, which sorts its sentences by length, with every row's own field."""

    def __init__(self, model: nn.Module, state: Any) -> None:
        self._model = model
        # a partial, whose copies follow those of the model
        self._encode = model.__dict__["encode"] = partial(_encode, model, state)

    def remove(self) -> None:
        """Let the model's own `encode` run again."""
        if self._model.__dict__.get("encode") is self._encode:
            del self._model.__dict__["encode"]


def rows_in_order(model: nn.Module, state: Any) -> list[Handle]:
    """Keep rows and names together in a library that sorts or splits what it is given before it calls the model.

    Args:
        model: the steered model.
        state: its controller: `state.mix`, and `state.select(model, mix)`.
    """
    known = any(cls.__module__.startswith("sentence_transformers.") for cls in type(model).__mro__)
    return [_Encoding(model, state)] if known and callable(getattr(model, "encode", None)) else []


def _encode(model: Any, state: Any, sentences: Any, *args: Any, **kwargs: Any) -> Any:
    """Encode the sentences of each field under that field alone; return all in the order in which they were given."""
    own, mix = type(model).encode, state.mix
    names = mix.asked()
    if not isinstance(names, list) or isinstance(sentences, str):
        return own(model, sentences, *args, **kwargs)
    if len(sentences) != len(names):
        raise SteerError(
            f"the list given to `use` has {len(names)} rows, and `encode` was given {len(sentences)} sentences. Give "
            "one name or None for every sentence."
        )
    found: list[Any] = [None] * len(names)
    part: Any = None
    try:
        for name in dict.fromkeys(names):
            places = [place for place, each in enumerate(names) if each == name]
            state.select(model, Mix.parse({} if name is None else {name: 1.0}, mix.names))
            part = own(model, [sentences[place] for place in places], *args, **kwargs)
            for place, each in zip(places, part, strict=True):
                found[place] = each
    finally:
        state.select(model, mix)
    if isinstance(part, list):
        return found
    return torch.stack(found) if isinstance(part, Tensor) else np.stack(found)
