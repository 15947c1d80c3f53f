"""Prompt tuning (Lester et al. 2021, arXiv 2104.08691): learned vectors before the embedded text."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from residual_steer._caches import begins_text, cache_of
from residual_steer._checks import check_integer
from residual_steer.errors import SteerError, UnsuitableError

from ._attach import Attached, Subject, Trained, place_of
from .vpt import Place, behind_padding, insert, stand_before, take_out

__all__ = ["SoftPrompt", "embedding_of", "lengthened_mask", "prompt"]

_POSITIONS = ("wpe", "embed_positions", "position_embeddings", "position_embedding")


def prompt(subject: Subject, *, length: int = 10) -> Trained:
    """Put vectors before the embedded text, at first those of random words (§ 3.2), and drop what comes of them."""
    check_integer("length", length, 1)
    embedding, inner = embedding_of(subject), subject.inner
    if embedding is None:
        raise UnsuitableError(
            f"'prompt' stands before the embedded words of a language model, and {subject.backbone.name!r} has no such "
            "embeddings. For images there are 'vpt-shallow' and 'vpt-deep'."
        )
    words = embedding.num_embeddings
    drawn = torch.randperm(words)[:length] if length <= words else torch.randint(words, (length,))
    device, dtype = place_of(embedding)
    weight = nn.Parameter(embedding.weight.detach()[drawn.to(device)].to(dtype, copy=True))
    if subject.is_ssm:  # what enters its first block is the embedded text
        return stand_before(subject, weight)
    if "inputs_embeds" not in inspect.signature(inner.forward).parameters:
        raise UnsuitableError(f"'prompt' needs a model that takes `inputs_embeds`; {type(inner).__name__} does not.")
    if isinstance(getattr(inner, "pooler", None), nn.Module):
        raise UnsuitableError(
            f"'prompt' drops its vectors from what leaves the model, and the pooler of this {type(inner).__name__} "
            "reads the first position before that. Build it without (`add_pooling_layer=False`)."
        )
    SoftPrompt(inner, weight).attach(inner, "soft_prompt")
    return Trained([weight], called=[subject.backbone.path])


class SoftPrompt(Attached):
    """The vectors of prompt tuning, `(length, width)`, in a model with attention, without its head."""

    def __init__(self, inner: nn.Module, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight
        self._names = tuple(inspect.signature(inner.forward).parameters)
        self._room = _room(inner)

    def enter(self, host: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any, Place | None]:
        """Put the vectors before the text of a call that begins one, and count them in every call."""
        call, length = {**dict(zip(self._names, args, strict=False)), **kwargs}, len(self.weight)
        mask, positions = call.get("attention_mask"), call.get("position_ids")
        longer = lengthened_mask(call, length, "prompt")
        given: Any = call.get("inputs_embeds") if call.get("input_ids") is None else call["input_ids"]
        if given is None:
            return args, kwargs, None  # which the model refuses itself
        if longer is not None:
            call["attention_mask"] = longer
        if not begins_text(call):
            call["position_ids"] = None if positions is None else positions + length
            self._check_room(call, given.shape[1])
            return (), call, None
        self._check_room(call, given.shape[1] + length)
        place: Place = 0 if mask is None else behind_padding(mask)
        embeds = host.get_input_embeddings()(given) if call.get("inputs_embeds") is None else call["inputs_embeds"]
        call["input_ids"], call["inputs_embeds"] = None, insert(embeds, self.weight, place)
        if positions is not None:
            own = torch.arange(length, device=positions.device)
            call["position_ids"] = insert(positions.expand(len(embeds), -1) + length, own, place)
        if call.get("token_type_ids") is not None:
            kinds = call["token_type_ids"]
            call["token_type_ids"] = insert(kinds, kinds.new_zeros(length), place)
        return (), call, place

    def leave(self, host: Any, output: Any, note: Place | None) -> Any:
        """Take out what came of the vectors."""
        return output if note is None else _without(output, len(self.weight), note)

    def _check_room(self, call: dict[str, Any], more: int) -> None:
        cache = cache_of(call)
        total = more + (0 if cache is None else int(cache.get_seq_length()))
        if self._room is not None and total > self._room:
            raise SteerError(
                f"the model has {self._room} positions, of which the prompt takes {len(self.weight)}; this call needs "
                f"{total}. Shorten the text or the prompt."
            )


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


def _room(inner: Any) -> int | None:
    """Return how many positions a model has, None where they are computed and not looked up."""
    for name, module in inner.named_modules():
        if isinstance(module, nn.Embedding) and name.rpartition(".")[2] in _POSITIONS:
            return int(getattr(getattr(inner, "config", None), "max_position_embeddings", module.num_embeddings))
    return None


def embedding_of(subject: Subject) -> nn.Embedding | None:
    """Return the embedding of a language model's words."""
    inner: Any = subject.inner
    found = inner.get_input_embeddings() if hasattr(inner, "get_input_embeddings") else None
    found = getattr(inner, "embedding", None) if found is None else found  # mamba_ssm's
    fits = isinstance(found, nn.Embedding) and found.embedding_dim == subject.backbone.widths[0]
    return found if fits else None


def lengthened_mask(call: Mapping[str, Any], tokens: int, method: str, place: Place | None = None) -> Tensor | None:
    """Return the mask of a model's call with ones for tokens, behind the padding if no place is given."""
    mask = call.get("attention_mask")
    if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
        raise SteerError(f"{method!r} lengthens an attention mask (batch, length); this call has another kind of mask.")
    if getattr(cache_of(call), "is_compileable", False):
        raise SteerError(
            f"a static cache has no room for the {method}, whose length it does not know. Use a dynamic one."
        )
    if mask is None:
        return None
    return insert(mask, mask.new_ones(tokens), behind_padding(mask) if place is None else place)
