"""Prefix tuning (Li & Liang 2021, arXiv 2101.00190): learned keys and values before those of the text.

They train directly, without the MLP that the paper reparametrises them with. A call that begins a text gets a cache
that holds them; masks and positions are counted on from there.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from residual_steer._caches import begins_text, cache_of, cache_parameter
from residual_steer._checks import check_integer
from residual_steer._undisturbed import as_before
from residual_steer.errors import SteerError, UnsuitableError

from ._attach import Attached, Subject, Trained, place_of
from .prompt import embedding_of, lengthened_mask

__all__ = ["Prefix", "prefix"]


def prefix(subject: Subject, *, length: int = 10) -> Trained:
    """Let every attention layer attend to keys and values before the text, at first those of random words (§ 7.4)."""
    check_integer("length", length, 1)
    inner, embedding = subject.inner, embedding_of(subject)
    if subject.is_ssm:
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
    made = Prefix(inner, keyword, *_computed(inner, embedding, length))
    made.attach(inner, "prefix")
    return Trained(list(made.parameters()), called=[subject.backbone.path])


class Prefix(Attached):
    """The keys and values of every layer, `(heads, length, head width)` each, in a language model without its head."""

    def __init__(self, inner: nn.Module, keyword: str, keys: list[Tensor], values: list[Tensor]) -> None:
        super().__init__()
        self.keys, self.values = nn.ParameterList(keys), nn.ParameterList(values)
        self._names = tuple(inspect.signature(inner.forward).parameters)
        self._keyword = keyword  # by which it takes a cache

    def enter(self, host: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any, Any]:
        """Begin a text with a cache that holds the prefix, count it in every call; note a cache nobody asked for."""
        call, length = {**dict(zip(self._names, args, strict=False)), **kwargs}, self.keys[0].shape[1]
        longer = lengthened_mask(call, length, "prefix", place=0)
        if longer is not None:
            call["attention_mask"] = longer
        if getattr(host, "gradient_checkpointing", False) and host.training:
            raise SteerError(
                "'prefix' goes through the cache, which transformers leaves out when it checkpoints activations. "
                "Switch gradient checkpointing off."
            )
        if call.get("position_ids") is not None:
            call["position_ids"] = call["position_ids"] + length
        if not begins_text(call):
            return (), call, None
        cache, unasked = cache_of(call), None
        if cache is None:
            from transformers import DynamicCache

            asked = call.get("use_cache")
            call[self._keyword] = cache = DynamicCache(config=host.config)
            unasked = None if (host.config.use_cache if asked is None else asked) else cache
        given: Any = call.get("inputs_embeds") if call.get("input_ids") is None else call["input_ids"]
        for layer, (key, value) in enumerate(zip(self.keys, self.values, strict=True)):
            shape = (len(given), *key.shape)
            cache.update(key.to(host.dtype).expand(shape), value.to(host.dtype).expand(shape), layer)
        return (), call, unasked

    def leave(self, host: Any, output: Any, note: Any) -> Any:
        """Keep a cache that nobody asked for out of the output: some models return whatever they were given."""
        if note is None:
            return output
        if isinstance(output, tuple):
            return tuple(part for part in output if part is not note)
        return type(output)(**{key: part for key, part in output.items() if part is not note})


@torch.no_grad()
def _computed(inner: Any, embedding: nn.Embedding, length: int) -> tuple[list[Tensor], list[Tensor]]:
    """Return the keys and values that the frozen model computes for random words; raise if its cache has others."""
    device, dtype = place_of(embedding)
    words = torch.randint(embedding.num_embeddings, (1, length)).to(device)
    with as_before(inner):
        cache = cache_of(inner.eval()(input_ids=words, use_cache=True))
    layers: list[Any] = getattr(cache, "layers", [])
    found: list[Any] = [(getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in layers]
    if not found or not all(isinstance(key, Tensor) and key.dim() == 4 and key.shape[2] == length for key, _ in found):
        raise UnsuitableError(f"'prefix' needs keys and values in every layer of the cache of {type(inner).__name__}.")
    keys, values = zip(*((key[0].to(dtype), value[0].to(dtype)) for key, value in found), strict=True)
    return [nn.Parameter(key.clone()) for key in keys], [nn.Parameter(value.clone()) for value in values]
