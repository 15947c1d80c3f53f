"""Which tokens of a call are the prompt: what a model reads before it writes, where fields may act alone.

With labels, in training, it is what stands in front of the first label. In `generate` it is as many tokens as that was
given, in chunks or with an assistant's guesses behind them. Else it is the call that fills an empty cache; calls of one
token that go on with that cache are decoding. Whatever could be either is an error.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ._caches import begins_text, cache_of, cache_parameter
from ._frozen import Replaced, chain
from .errors import SteerError

MASK = "prompt_mask"  # the keyword of a call by which it can be given
_IGNORED = -100  # as a label, for the loss of PyTorch and transformers
_PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx")
_GIVE = f"Give the call `{MASK}`, a bool tensor (batch, length) that is True where a token belongs to the prompt"
_OR_GIVE = f"or: g{_GIVE[1:]}"


def check_reads_prompts(model: nn.Module, path: str) -> None:
    """Raise unless a model, or one on the path to its blocks, reads a prompt and then writes, with a cache."""
    modules = chain(model, path)
    if any(getattr(getattr(module, "config", None), "is_encoder_decoder", False) for module in modules):
        raise SteerError(
            "`on='prompt'` is for decoders, and this model has an encoder, which reads all of its prompt: steer the "
            "encoder's `layers` alone, with on='all'."
        )
    writes = any(hasattr(module, "can_generate") and module.can_generate() for module in modules)  # type: ignore[operator]
    keeps = any(cache_parameter(module) is not None for module in modules)
    known = {"allocate_inference_cache", "tie_weights"} <= {*dir(model)}  # a language model of `mamba_ssm`
    if not (writes and keeps) and not known:
        raise SteerError(
            "`on='prompt'` is for language models that write, and decode with a cache of transformers or `mamba_ssm`; "
            f"this {type(model).__name__} does not. Use on='all'."
        )


def compiled_prompt() -> SteerError:
    """Return the error of a graph that is compiled while fields act on the prompt alone."""
    return SteerError(
        "on which tokens fields act is seen call by call, which a compiled graph does not. Read a prompt, and run "
        "texts that are packed, without torch.compile; decoding can be compiled under use(model, None)."
    )


def generation(model: nn.Module, state: Any) -> list[Replaced]:
    """Have `generate` of transformers count the tokens of its prompt."""
    if not callable(getattr(model, "generate", None)):
        return []
    return [Replaced(model, "generate", partial(_generate, model, state))]


def _generate(model: Any, state: Any, *args: Any, **kwargs: Any) -> Any:
    own = Replaced.own(model, "generate", state.handles)
    if state.mix.on == "all":
        return own(*args, **kwargs)
    embedded = kwargs.get("inputs_embeds")
    words = _words(args or (kwargs.get("inputs"),), kwargs) if embedded is None else embedded
    with state.prompts.reading(words):
        return own(*args, **kwargs)


@dataclass
class _Reading:
    """A prompt, how many tokens of it `generate` has yet to read into a cache, and that, once it is known."""

    prompt: Tensor
    left: int
    begun: bool = False
    cache: Any = None


class _Local(threading.local):
    """The prompts that this thread reads, that of the innermost `generate` last."""

    def __init__(self) -> None:
        self.readings: list[_Reading | None] = []


class Prompts:
    """The texts that are under way: caches that were filled while fields acted on the prompt alone."""

    def __init__(self) -> None:
        self._caches: dict[int, weakref.ref[Any]] = {}
        self._local = _Local()

    def __reduce__(self) -> tuple[Any, ...]:
        """Leave texts that are under way out of copies."""
        return Prompts, ()

    @contextlib.contextmanager
    def reading(self, prompt: Tensor | None) -> Iterator[None]:
        """Take these tokens, or embeddings, as the prompt of the calls that follow; None where that is not known."""
        self._local.readings.append(None if prompt is None else _Reading(prompt, prompt.shape[1]))
        try:
            yield
        finally:
            self._local.readings.pop()

    def of(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool | Tensor:
        """Return which tokens of a call are the prompt: all, none, or a mask `(batch, length)`.

        A mask that was given is taken out of the keywords.

        Raises:
            SteerError: that is not clear.
        """
        words = _words(args, kwargs)
        shape = None if words is None else tuple(words.shape[:2])
        if kwargs.get(MASK) is not None:
            return _checked(kwargs.pop(MASK), shape)
        kwargs.pop(MASK, None)
        if any(kwargs.get(name) is not None for name in _PACKED):
            raise SteerError(f"several texts stand in one row of this batch, each with a prompt of its own. {_GIVE}.")
        labels = kwargs.get("labels")
        if isinstance(labels, Tensor):
            positions = kwargs.get("position_ids")
            if isinstance(positions, Tensor) and positions.dim() == 2 and bool((positions.diff() < 0).any()):
                raise SteerError(f"`position_ids` start again within a row: it seems to hold several texts. {_GIVE}.")
            return _in_front(labels, shape)
        if model.training:
            raise SteerError(
                "in training the prompt is what stands in front of the first label, and this call has no `labels`. "
                f"{_GIVE}, or `eval()` the model, whose first call without a cache then is the prompt."
            )
        return self._by_cache(model, args, kwargs, words)

    def _by_cache(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], words: Tensor | None
    ) -> bool | Tensor:
        cache = cache_of([*args, *kwargs.values()])
        reading = self._local.readings[-1] if self._local.readings else None
        if reading is not None and words is not None and self._goes_on(reading, cache):
            return self._next(reading, cache, words)
        if cache is None:
            asked = kwargs.get("use_cache")
            if (getattr(getattr(model, "config", None), "use_cache", None) if asked is None else asked) is False:
                raise SteerError(
                    "without a cache every call has the whole text, and it cannot be told how much of it is the "
                    f"prompt. Generate with use_cache=True, {_OR_GIVE}."
                )
            return True
        if begins_text({"cache": cache}):
            self._note(cache)
            return True
        known = self._caches.get(id(cache))
        if words is None or words.shape[1] != 1 or known is None or known() is not cache:
            what = "that another call began" if known is None or known() is not cache else "that has tokens already"
            number = "some" if words is None else words.shape[1]
            raise SteerError(
                f"this call goes on with a cache {what}, by {number} tokens: they may be the rest of a prompt (read in "
                "chunks, or behind a prefix), a next turn, or guesses of an assistant model. Read the prompt in one "
                f"call and decode token by token from its cache, {_OR_GIVE}."
            )
        return False

    @staticmethod
    def _goes_on(reading: _Reading, cache: Any) -> bool:
        """Return whether a call is `generate`'s own, rather than that of a processor that asks the model about more."""
        return cache is reading.cache if reading.begun else cache is not None and begins_text({"cache": cache})

    def _next(self, reading: _Reading, cache: Any, words: Tensor) -> bool | Tensor:
        """Return which of the tokens that `generate` puts into its cache next belong to the prompt."""
        length, prompt = words.shape[1], reading.prompt
        part = min(length, reading.left)
        if not reading.begun and length > part:  # guesses of an assistant behind the prompt, or more in front of it
            prompt = prompt.repeat_interleave(max(1, len(words) // len(prompt)), 0).to(words.device)
            if not torch.equal(words[:, :part], prompt):
                part = reading.left = length
        reading.begun, reading.cache = True, cache
        reading.left -= part
        self._note(cache)
        if part in (0, length):
            return part > 0
        return (torch.arange(length) < part).expand(words.shape[:2])

    def note(self, output: Any) -> None:
        """Remember the cache that a call made which read a prompt."""
        cache = cache_of(output) if isinstance(output, Mapping) else None
        if cache is not None:
            self._note(cache)

    def _note(self, cache: Any) -> None:
        self._caches = {key: known for key, known in self._caches.items() if known() is not None}
        self._caches[id(cache)] = weakref.ref(cache)


def _words(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """Return what a call reads: tokens, or their embeddings."""
    for value in (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args[:1]):
        if isinstance(value, Tensor) and value.dim() > 1:
            return value
    return None


def _checked(mask: Any, shape: tuple[int, ...] | None) -> Tensor:
    right = isinstance(mask, Tensor) and mask.dtype == torch.bool and mask.dim() == 2
    if not isinstance(mask, Tensor) or not right or (shape is not None and tuple(mask.shape) != shape):
        received = f"{mask.dtype} of {tuple(mask.shape)}" if isinstance(mask, Tensor) else repr(mask)
        raise SteerError(f"`{MASK}` is a bool tensor (batch, length), here {shape}; received {received:.200}.")
    return mask


def _in_front(labels: Tensor, shape: tuple[int, ...] | None) -> Tensor:
    """Return the tokens in front of each row's first label; raise if there are more between labels."""
    if labels.dim() != 2 or (shape is not None and tuple(labels.shape) != shape):
        raise SteerError(f"`labels` are one for each token, {shape}; received {tuple(labels.shape)}. {_GIVE}.")
    answers = labels != _IGNORED
    begun = answers.cumsum(1) > 0
    goes_on = answers.flip(1).cumsum(1).flip(1) > 0
    if bool((begun & goes_on & ~answers).any()):
        raise SteerError(
            "there are tokens without a label between others that have one, as in a talk of several turns: whether "
            f"they are a prompt is not clear, since the first answer stands in front of them. {_GIVE}."
        )
    return ~begun
