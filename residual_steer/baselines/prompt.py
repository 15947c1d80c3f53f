"""Prompt tuning (Lester et al. 2021, arXiv 2104.08691): learned vectors before the embedded text."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from residual_steer._caches import begins_text, cache_of
from residual_steer.errors import SteerError, UnsuitableError

from .parts import Subject, Trained, add_child, count, place_of
from .places import Place, behind_padding, insert, take_out
from .vpt import is_ssm, stand_before

__all__ = ["SoftPrompt", "call_by_name", "embedding_of", "from_vocabulary", "prompt", "refuse_cache"]

_POSITIONS = ("wpe", "embed_positions", "position_embeddings", "position_embedding")


def prompt(subject: Subject, *, length: int = 10) -> Trained:
    """Put p learned vectors before the embedded text, behind padding on the left, and drop what comes of them.

    Logits, labels and `logits_to_keep` stay as they are for the text alone. The vectors begin as embeddings of random
    words of the vocabulary (§ 3.2 of the paper), drawn without repetition where there are enough. In cached generation
    they enter with the first call and live on in the cache.

    Args:
        subject: a language model.
        length: p.

    Raises:
        UnsuitableError: it is no language model that takes embeddings.
    """
    count("length", length)
    embedding = embedding_of(subject)
    if embedding is None:
        raise UnsuitableError(
            f"'prompt' stands before the embedded words of a language model, and {subject.backbone.name!r} has no such "
            "embeddings. For images there are 'vpt-shallow' and 'vpt-deep'."
        )
    weight = from_vocabulary(embedding, length)
    if is_ssm(subject):  # what enters its first block is the embedded text
        return stand_before(subject, weight)
    inner = subject.inner
    if "inputs_embeds" not in inspect.signature(inner.forward).parameters:
        raise UnsuitableError(f"'prompt' needs a model that takes `inputs_embeds`; {type(inner).__name__} does not.")
    if isinstance(getattr(inner, "pooler", None), nn.Module):
        raise UnsuitableError(
            f"'prompt' drops its vectors from what leaves the model, and the pooler of this {type(inner).__name__} "
            "reads the first position before that. Build it without (`add_pooling_layer=False`)."
        )
    return Trained(list(SoftPrompt(inner, embedding, weight).parameters()), called=[subject.backbone.path])


def embedding_of(subject: Subject) -> nn.Embedding | None:
    """Return the embedding of a language model's words."""
    inner: Any = subject.inner
    found = inner.get_input_embeddings() if hasattr(inner, "get_input_embeddings") else None
    found = getattr(inner, "embedding", None) if found is None else found  # mamba_ssm's
    fits = isinstance(found, nn.Embedding) and found.embedding_dim == subject.backbone.widths[0]
    return found if fits else None


def from_vocabulary(embedding: nn.Embedding, length: int) -> nn.Parameter:
    """Return vectors `(length, width)` that are embeddings of random words."""
    words = embedding.num_embeddings
    drawn = torch.randperm(words)[:length] if length <= words else torch.randint(words, (length,))
    device, dtype = place_of(embedding)
    return nn.Parameter(embedding.weight.detach()[drawn.to(device)].to(dtype, copy=True))


def call_by_name(names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return a call's arguments by the names of the parameters."""
    return {**dict(zip(names, args, strict=False)), **kwargs}


def refuse_cache(call: dict[str, Any], what: str) -> None:
    """Refuse caches that are too short for what is added.

    Raises:
        SteerError: the cache was made for the length of the text.
    """
    if getattr(cache_of(call), "is_compileable", False):
        raise SteerError(f"a static cache has no room for the {what}, whose length it was not told. Use a dynamic one.")


class SoftPrompt(nn.Module):
    """The vectors of prompt tuning on a model with attention: a child of it, whose hooks rewrite its calls.

    Args:
        inner: the model without its head.
        embedding: of its words.
        weight: the vectors, `(length, width)`.
    """

    def __init__(self, inner: nn.Module, embedding: nn.Embedding, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight
        self._names = tuple(inspect.signature(inner.forward).parameters)
        self._place: Place | None = None
        self._room = _room(inner)
        add_child(inner, "soft_prompt", self)
        inner.register_forward_pre_hook(self._before, with_kwargs=True)
        inner.register_forward_hook(self._after)

    def _before(self, inner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Put the vectors before the text of a call that begins one, and count them in every call.

        Raises:
            SteerError: a mask or cache that has no place for them, or a text too long for the model's positions.
        """
        call, length = call_by_name(self._names, args, kwargs), len(self.weight)
        mask, positions = call.get("attention_mask"), call.get("position_ids")
        if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
            raise SteerError(
                "'prompt' lengthens an attention mask (batch, length); this call has another kind of mask."
            )
        refuse_cache(call, "prompt")
        self._place = None
        if call.get("input_ids") is None and call.get("inputs_embeds") is None:
            return args, kwargs  # which the model refuses itself
        place: Place = 0 if mask is None else behind_padding(mask)
        if mask is not None:
            call["attention_mask"] = insert(mask, mask.new_ones(length), place)
        first = begins_text(call)
        self._place = place if first else None
        if not first:
            call["position_ids"] = None if positions is None else positions + length
            self._check_room(call, 0)
            return (), call
        self._check_room(call, length)
        embeds = call.get("inputs_embeds")
        if embeds is None:
            embeds = inner.get_input_embeddings()(call.pop("input_ids"))  # type: ignore[operator]
        call["input_ids"], call["inputs_embeds"] = None, insert(embeds, self.weight, place)
        if positions is not None:
            own = torch.arange(length, device=positions.device)
            call["position_ids"] = insert(positions.expand(len(embeds), -1) + length, own, place)
        if call.get("token_type_ids") is not None:
            kinds = call["token_type_ids"]
            call["token_type_ids"] = insert(kinds, kinds.new_zeros(length), place)
        return (), call

    def _check_room(self, call: dict[str, Any], added: int) -> None:
        given = call.get("inputs_embeds") if call.get("input_ids") is None else call["input_ids"]
        cache = cache_of(call)
        if self._room is None or not isinstance(given, Tensor):
            return
        past = 0 if cache is None else int(cache.get_seq_length())
        total = past + given.shape[1] + added
        if total > self._room:
            raise SteerError(
                f"the model has {self._room} positions, of which the prompt takes {len(self.weight)}; this call needs "
                f"{total}. Shorten the text or the prompt."
            )

    def _after(self, inner: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        place, self._place = self._place, None
        return output if place is None else _without(output, len(self.weight), place)


def _without(output: Any, tokens: int, place: Place) -> Any:
    """Take the vectors out of every stream in a model's output: the last, and all that were asked for."""
    if isinstance(output, Tensor):
        return take_out(output, tokens, place) if output.dim() == 3 else output
    if isinstance(output, tuple):
        return tuple(_without(part, tokens, place) for part in output)
    if isinstance(output, dict):  # transformers' ModelOutput
        for key, value in list(output.items()):
            if isinstance(value, (Tensor, tuple)):
                output[key] = _without(value, tokens, place)
    return output


def _room(inner: nn.Module) -> int | None:
    """Return how many positions a model has, None where they are computed and not looked up."""
    for name, module in inner.named_modules():
        if isinstance(module, nn.Embedding) and name.rpartition(".")[2] in _POSITIONS:
            config: Any = getattr(inner, "config", None)
            return int(getattr(config, "max_position_embeddings", module.num_embeddings))
    return None
