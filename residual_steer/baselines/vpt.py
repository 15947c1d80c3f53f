"""VPT (Jia et al. 2022, arXiv 2203.12119): learned tokens in the stream, before the first block or before every one."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from residual_steer._caches import begins_text
from residual_steer.errors import SteerError, UnsuitableError
from residual_steer.tokens import prefix_tokens

from ._attach import Attached, Subject, Trained, count, place_of, require_free
from ._tokens import Place, behind_padding, insert, take_out

__all__ = ["Gate", "stand_before", "vpt_deep", "vpt_shallow"]


def vpt_shallow(subject: Subject, *, length: int = 10) -> Trained:
    """VPT-shallow: `length` tokens enter at the first block and leave after the last (eq. 4 and 5).

    They stand behind the prefix tokens of a ViT, such as CLS, and before the first token of a text. On a Mamba they
    make the state that the text begins with. Hidden states between the blocks have them.

    Raises:
        UnsuitableError: the blocks of this backbone cannot be given tokens.
    """
    _check(subject, "vpt-shallow", length)
    return stand_before(subject, _tokens(subject, subject.backbone.blocks[0], length))


def vpt_deep(subject: Subject, *, length: int = 10) -> Trained:
    """VPT-deep: `length` tokens of its own enter at every block and leave after it (eq. 6 and 7).

    Of the hidden states that transformers records, only the first has them: it is what enters the first block.

    Raises:
        UnsuitableError: the blocks of this backbone cannot be given tokens.
    """
    _check(subject, "vpt-deep", length)
    blocks, at = subject.backbone.blocks, prefix_tokens(subject.inner)
    require_free(blocks, "prompt")
    gates = [Gate(block, at, length, _tokens(subject, block, length), leaves=True) for block in blocks]
    return Trained([p for gate in gates for p in gate.parameters()])


def stand_before(subject: Subject, weight: nn.Parameter) -> Trained:
    """Let tokens `(tokens, width)` enter at the first block and leave after the last."""
    blocks, at = subject.backbone.blocks, prefix_tokens(subject.inner)
    require_free(blocks, "prompt")
    last = len(blocks) - 1
    for index, block in enumerate(blocks):
        Gate(block, at, len(weight), weight if index == 0 else None, leaves=index == last)
    return Trained([weight])


class Gate(Attached):
    """Let tokens into a block and out of it, or make room for those that go through it.

    Nothing enters in a call that goes on with a cache: the cache holds what came of the tokens.

    Args:
        block: the block.
        at: how many prefix tokens stand before the tokens.
        tokens: how many tokens.
        weight: the tokens that enter here, if any do.
        leaves: whether they leave here.
    """

    def __init__(self, block: nn.Module, at: int, tokens: int, weight: nn.Parameter | None, leaves: bool) -> None:
        super().__init__()
        self.weight = weight
        self._at, self._tokens, self._leaves = at, tokens, leaves
        self._layer: int | None = getattr(getattr(block, "mixer", None), "layer_idx", None)
        self.attach(block, "prompt", prepend=True)  # who captures hidden states shall not see the tokens

    def enter(self, host: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any, Place | None]:
        """Let the tokens in.

        Raises:
            SteerError: the stream is no sequence, or a mask is given that has no place for them.
        """
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
    parts = [value for value in (*args, kwargs.get("hidden_states")) if isinstance(value, Tensor)]
    if not parts or parts[0].dim() != 3:
        shape = tuple(parts[0].shape) if parts else None
        raise SteerError(f"VPT puts tokens into a stream (batch, length, width); this block was given {shape}.")
    first, rest = parts[0], torch.zeros_like(weight)

    def put(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.shape != first.shape:
            return value
        return insert(value, weight if value is first else rest, place)

    return tuple(put(value) for value in args), {key: put(value) for key, value in kwargs.items()}


def _check(subject: Subject, method: str, length: int) -> None:
    """Raise if the blocks of a backbone do not take a sequence of any length."""
    count("length", length)
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
            "positions and a cache that were made for the tokens of the text alone. For a language model choose "
            "'prompt' (tokens at its input) or 'prefix' (keys and values in every layer)."
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


def _unrotated(rope: Tensor, tokens: int) -> Tensor:
    """Return timm's table of rotations, `(..., length, sines and cosines)`, with tokens before the image at rest."""
    half = rope.shape[-1] // 2
    shape = (*rope.shape[:-2], tokens, half)
    return torch.cat([torch.cat([rope.new_zeros(shape), rope.new_ones(shape)], dim=-1), rope], dim=-2)
