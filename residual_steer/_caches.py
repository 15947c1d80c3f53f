"""What a language model keeps between calls, found by what it can do, since its name depends on the release.

transformers calls it `cache`; before 5.24 it was `past_key_values`, in Mamba `cache_params`. RWKV has a `state`, and
`mamba_ssm` its `inference_params`. Nothing else in the library names them.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

_NAMES = ("cache", "past_key_values", "cache_params")
_ABILITIES = ("get_seq_length", "seqlen_offset")  # of transformers' caches; of xLSTM's and `mamba_ssm`'s


def cache_parameter(module: nn.Module) -> str | None:
    """Return the keyword by which a module of transformers takes a cache, None if it takes none."""
    parameters = inspect.signature(module.forward).parameters.items()
    return next((name for name, one in parameters if name in _NAMES or "Cache" in str(one.annotation)), None)


def cache_of(given: Mapping[str, Any] | Iterable[Any]) -> Any:
    """Return the cache among a call's arguments by name, or in a model's output; None if there is none."""
    values = given.values() if isinstance(given, Mapping) else given
    return next((value for value in values if any(hasattr(value, ability) for ability in _ABILITIES)), None)


def begins_text(call: Mapping[str, Any], layer: int | None = None) -> bool:
    """Return whether a call, given by its arguments by name, begins a text, rather than going on with a cache's.

    `layer` is which layer of the cache to ask, in a block with a state; None asks for the whole model.
    """
    cache = cache_of(call)
    if cache is None:
        return call.get("state") is None
    if hasattr(cache, "seqlen_offset"):
        return bool(cache.seqlen_offset == 0)
    if layer is None:
        try:
            return bool(cache.get_seq_length() == 0)
        except ValueError:  # a cache of states alone does not count tokens
            pass
    return not cache.has_previous_state(layer)
