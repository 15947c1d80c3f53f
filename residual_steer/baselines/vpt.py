"""VPT (Jia et al. 2022, arXiv 2203.12119): learned tokens in the stream, before the first block or before every one.

A place is a position that all rows share, or a tensor `(batch,)` with one for each: tokens go before a row's first real
one, behind its padding on the left, since the state of an SSM would forget them in a long padding.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from residual_steer._caches import begins_text
from residual_steer._checks import check_integer
from residual_steer.errors import SteerError, UnsuitableError
from residual_steer.stream import prefix_tokens

from ._attach import Attached, Subject, Trained, place_of, require_free

__all__ = ["Gate", "Place", "behind_padding", "insert", "stand_before", "take_out", "vpt_deep", "vpt_shallow"]

Place = int | Tensor


def vpt_shallow(subject: Subject, *, length: int = 10) -> Trained:
    """VPT-shallow: tokens enter at the first block and leave after the last (eq. 4 and 5)."""
    _check("vpt-shallow", subject, length)
    return stand_before(subject, _tokens(subject, subject.backbone.blocks[0], length))


def vpt_deep(subject: Subject, *, length: int = 10) -> Trained:
    """VPT-deep: tokens of its own enter at every block and leave after it (eq. 6 and 7)."""
    _check("vpt-deep", subject, length)
    blocks, at = subject.backbone.blocks, prefix_tokens(subject.inner)
    require_free(blocks, "prompt")
    gates = [Gate(block, at, length, _tokens(subject, block, length), leaves=True) for block in blocks]
    return Trained([p for gate in gates for p in gate.parameters()])


def stand_before(subject: Subject, weight: nn.Parameter) -> Trained:
    """Let tokens `(tokens, width)` enter at the first block and leave after the last."""
    blocks, at = subject.backbone.blocks, prefix_tokens(subject.inner)
    require_free(blocks, "prompt")
    for index, block in enumerate(blocks):
        Gate(block, at, len(weight), weight if index == 0 else None, leaves=index == len(blocks) - 1)
    return Trained([weight])


def _check(method: str, subject: Subject, length: int) -> None:
    """Raise if the blocks of a backbone do not take a sequence of any length."""
    check_integer("length", length, 1)
    backbone = subject.backbone
    if backbone.channels != -1 or len(set(backbone.widths)) > 1:
        raise UnsuitableError(
            f"{method!r} puts tokens into a sequence, and the stream of {backbone.name!r} is a map of features or "
            "changes its width from block to block. Choose another method."
        )
    words = any(isinstance(module, nn.Embedding) for module in subject.inner.modules())
    if words and not subject.is_ssm and _patches(subject) is None:  # CLIP embeds positions
        raise UnsuitableError(
            f"{method!r} puts tokens into the stream of a block, and blocks of {backbone.name!r} are given masks, "
            "positions and a cache that were made for the text alone. For a language model choose 'prompt' or 'prefix'."
        )


def _patches(subject: Subject) -> nn.Conv2d | None:
    """Return the convolution that makes tokens of an image."""
    width = subject.backbone.widths[0]
    found = (m for m in subject.inner.modules() if isinstance(m, nn.Conv2d) and m.out_channels == width)
    return next(found, None)


def _tokens(subject: Subject, block: nn.Module, length: int) -> nn.Parameter:
    """Draw tokens as VPT does, uniform in ±√(6 / (fan-in of a patch + d)); a text's tokens have fan-in d."""
    width, patches = subject.backbone.widths[0], _patches(subject)
    fan_in = width if patches is None else patches.weight[0].numel()
    bound = math.sqrt(6 / (fan_in + width))
    device, dtype = place_of(block)
    return nn.Parameter(torch.empty(length, width).uniform_(-bound, bound).to(device, dtype))


class Gate(Attached):
    """Let tokens into a block, behind `at` prefix tokens, and out of it, or make room for those that go through it.

    Nothing enters in a call that goes on with a cache: the cache holds what came of the tokens.
    """

    def __init__(self, block: nn.Module, at: int, tokens: int, weight: nn.Parameter | None, leaves: bool) -> None:
        super().__init__()
        self.weight = weight
        self._at, self._tokens, self._leaves = at, tokens, leaves
        self._layer: int | None = getattr(getattr(block, "mixer", None), "layer_idx", None)
        self.attach(block, "prompt", prepend=True)  # who captures hidden states shall not see the tokens

    def enter(self, host: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any, Place | None]:
        """Let the tokens in; raise if a mask is given that has no place for them."""
        if not begins_text(kwargs, self._layer):
            return args, kwargs, None
        mask, changed = kwargs.get("attention_mask"), dict(kwargs)
        place: Place = self._at
        if isinstance(mask, Tensor) and mask.dim() == 2:
            place = behind_padding(mask)
            changed["attention_mask"] = insert(mask, mask.new_ones(self._tokens), place)
        elif mask is not None or kwargs.get("attn_mask") is not None:
            raise SteerError(
                "VPT's tokens have no place in an attention mask that is given ready-made. Call the model without one."
            )
        if isinstance(kwargs.get("rope"), Tensor):
            changed["rope"] = _unrotated(kwargs["rope"], self._tokens)
        if self.weight is not None:
            args, changed = _enter(args, changed, self.weight, place)
        return args, changed, place

    def leave(self, host: nn.Module, output: Any, note: Place | None) -> Any:
        """Take the tokens out."""
        if note is None or not self._leaves:
            return output
        out = partial(take_out, tokens=self._tokens, place=note)
        if isinstance(output, Tensor):
            return out(output)
        kept = [out(value) if isinstance(value, Tensor) and value.dim() == 3 else value for value in output]
        return type(output)(*kept) if hasattr(output, "_fields") else type(output)(kept)


def _enter(args: tuple[Any, ...], kwargs: dict[str, Any], weight: Tensor, place: Place) -> tuple[Any, dict[str, Any]]:
    """Put tokens into the stream; where it is a sum of several tensors, into the first, and zeros elsewhere."""
    first = next((value for value in (*args, kwargs.get("hidden_states")) if isinstance(value, Tensor)), None)
    if first is None or first.dim() != 3:
        shape = None if first is None else tuple(first.shape)
        raise SteerError(f"VPT puts tokens into a stream (batch, length, width); this block was given {shape}.")

    def put(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.shape != first.shape:
            return value
        return insert(value, weight if value is first else torch.zeros_like(weight), place)

    return tuple(put(value) for value in args), {key: put(value) for key, value in kwargs.items()}


def _unrotated(rope: Tensor, tokens: int) -> Tensor:
    """Return timm's table of rotations, `(..., length, sines and cosines)`, with tokens before the image at rest."""
    half = rope.shape[-1] // 2
    shape = (*rope.shape[:-2], tokens, half)
    return torch.cat([torch.cat([rope.new_zeros(shape), rope.new_ones(shape)], dim=-1), rope], dim=-2)


def behind_padding(mask: Tensor) -> Tensor:
    """Return how many positions of padding each row begins with, `(batch,)`, from a mask `(batch, length)`."""
    return (mask != 0).cumsum(1).eq(0).sum(1)


def insert(x: Tensor, new: Tensor, place: Place) -> Tensor:
    """Return x, `(batch, length, ...)`, with `new`, `(tokens, ...)` in x's type, inserted in every row at a place."""
    new, tokens = new.to(x.dtype), new.shape[0]
    if isinstance(place, int):
        return torch.cat([x[:, :place], new.expand(x.shape[0], *new.shape), x[:, place:]], dim=1)
    room = x.new_zeros(x.shape[0], tokens, *x.shape[2:])
    position = torch.arange(x.shape[1] + tokens, device=x.device) - place[:, None]
    fresh = new[position.clamp(0, tokens - 1)]
    position = position.view(*position.shape, *[1] * (x.dim() - 2))
    later = torch.where(position < tokens, fresh, torch.cat([room, x], dim=1))
    return torch.where(position < 0, torch.cat([x, room], dim=1), later)


def take_out(y: Tensor, tokens: int, place: Place) -> Tensor:
    """Return y, `(batch, length + tokens, ...)`, without what `insert` put in."""
    if isinstance(place, int):
        return torch.cat([y[:, :place], y[:, place + tokens :]], dim=1) if place else y[:, tokens:]
    before = torch.arange(y.shape[1] - tokens, device=y.device) < place[:, None]
    return torch.where(before.view(*before.shape, *[1] * (y.dim() - 2)), y[:, :-tokens], y[:, tokens:])
