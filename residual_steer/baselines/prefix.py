"""Prefix tuning (Li & Liang 2021, arXiv 2101.00190): learned keys and values before those of the text."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from residual_steer._caches import begins_text, cache_of, cache_parameter
from residual_steer.errors import SteerError, UnsuitableError

from .parts import Subject, Trained, add_child, count, place_of
from .places import insert
from .prompt import call_by_name, embedding_of, refuse_cache
from .vpt import is_ssm

__all__ = ["Prefix", "prefix"]


def prefix(subject: Subject, *, length: int = 10) -> Trained:
    """Let every attention layer attend to p learned keys and values that come before the text.

    They begin as what the frozen model computes for random words, the initialisation that the paper found best with few
    data (§ 7.4), and train directly, without the MLP that it reparametrises long runs with. A call that begins a text
    gets a cache that holds them; masks and positions are counted on from there.

    Args:
        subject: a language model of transformers with attention, which takes a cache.
        length: p.

    Raises:
        UnsuitableError: it has no keys and values to extend.
    """
    count("length", length)
    inner, embedding = subject.inner, embedding_of(subject)
    if is_ssm(subject):
        raise UnsuitableError(
            f"'prefix' extends the keys and values of attention, and {subject.backbone.name!r} has a state instead: "
            "there are no keys and values to extend. Choose 'prompt' or 'vpt-deep'."
        )
    keyword = cache_parameter(inner)
    if embedding is None or keyword is None:
        raise UnsuitableError(
            f"'prefix' goes through the cache of a language model, and {type(inner).__name__} takes none. For images "
            "there is 'vpt-deep'."
        )
    if getattr(getattr(inner, "config", None), "add_cross_attention", False):
        raise UnsuitableError("'prefix' does not know caches of cross-attention. Build the model without it.")
    keys, values = _computed(inner, embedding, length)
    return Trained(list(Prefix(inner, keyword, keys, values).parameters()), called=[subject.backbone.path])


class Prefix(nn.Module):
    """The keys and values of prefix tuning: a child of the model, whose hook rewrites its calls.

    Args:
        inner: the model without its head.
        cache: the keyword by which it takes a cache.
        keys: of every layer, `(heads, length, head width)` each.
        values: of every layer.
    """

    def __init__(self, inner: nn.Module, cache: str, keys: list[Tensor], values: list[Tensor]) -> None:
        super().__init__()
        self.keys = nn.ParameterList(keys)
        self.values = nn.ParameterList(values)
        self._names = tuple(inspect.signature(inner.forward).parameters)
        self._cache = cache
        self._lent: Any = None
        add_child(inner, "prefix", self)
        inner.register_forward_pre_hook(self._before, with_kwargs=True)
        inner.register_forward_hook(self._after)

    def _before(self, inner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Begin a text with a cache that holds the prefix, and count it in every call.

        Raises:
            SteerError: a mask or cache that has no place for it, or a model that drops its cache.
        """
        call = call_by_name(self._names, args, kwargs)
        length, mask = self.keys[0].shape[1], call.get("attention_mask")
        if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
            raise SteerError(
                "'prefix' lengthens an attention mask (batch, length); this call has another kind of mask."
            )
        refuse_cache(call, "prefix")
        if getattr(inner, "gradient_checkpointing", False) and inner.training:
            raise SteerError(
                "'prefix' goes through the cache, which transformers leaves out when it checkpoints activations. "
                "Switch gradient checkpointing off."
            )
        if mask is not None:
            call["attention_mask"] = insert(mask, mask.new_ones(length), 0)
        if call.get("position_ids") is not None:
            call["position_ids"] = call["position_ids"] + length
        self._lent = None
        if begins_text(call):
            asked, given = call.get("use_cache"), cache_of(call)
            cache = self._fill(inner, call, given)
            if given is None:
                call[self._cache] = cache
                if not (inner.config.use_cache if asked is None else asked):
                    self._lent = cache
        return (), call

    def _after(self, inner: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Keep a cache that nobody asked for out of the output: some models return whatever they were given."""
        lent, self._lent = self._lent, None
        if lent is None:
            return output
        if isinstance(output, tuple):
            return tuple(part for part in output if part is not lent)
        return type(output)(**{key: part for key, part in output.items() if part is not lent})

    def __getstate__(self) -> dict[str, Any]:
        """Leave out of copies what belongs to a call, or was left by one that failed."""
        return {**self.__dict__, "_lent": None}

    def _fill(self, inner: Any, call: dict[str, Any], cache: Any) -> Any:
        given: Any = call.get("inputs_embeds") if call.get("input_ids") is None else call["input_ids"]
        if cache is None:
            from transformers import DynamicCache

            cache = DynamicCache(config=inner.config)
        dtype = inner.dtype
        for layer, (key, value) in enumerate(zip(self.keys, self.values, strict=True)):
            shape = (len(given), *key.shape)
            cache.update(key.to(dtype).expand(shape), value.to(dtype).expand(shape), layer)
        return cache


@torch.no_grad()
def _computed(inner: Any, embedding: nn.Embedding, length: int) -> tuple[list[Tensor], list[Tensor]]:
    """Return the keys and values that the frozen model computes for random words.

    Raises:
        UnsuitableError: its cache holds something else.
    """
    device, dtype = place_of(embedding)
    words = torch.randint(embedding.num_embeddings, (1, length)).to(device)
    training = inner.training
    try:
        cache = cache_of(inner.eval()(input_ids=words, use_cache=True))
    finally:
        inner.train(training)
    layers: list[Any] = getattr(cache, "layers", [])
    found: list[Any] = [(getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in layers]
    if not found or not all(isinstance(key, Tensor) and key.dim() == 4 and key.shape[2] == length for key, _ in found):
        raise UnsuitableError(f"'prefix' needs keys and values in every layer of the cache of {type(inner).__name__}.")
    keys, values = zip(*((key[0].to(dtype), value[0].to(dtype)) for key, value in found), strict=True)
    return [nn.Parameter(key.clone()) for key in keys], [nn.Parameter(value.clone()) for value in values]
