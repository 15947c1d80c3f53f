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

from .parts import Subject, Trained, add_child, count, place_of, require_free
from .places import Place, behind_padding, insert, take_out

__all__ = ["Gate", "is_ssm", "stand_before", "vpt_deep", "vpt_shallow"]


def vpt_shallow(subject: Subject, *, length: int = 10) -> Trained:
    """VPT-shallow: tokens enter at the first block, go through all of them, and leave after the last (eq. 4 and 5).

    They stand behind the prefix tokens of a ViT, such as CLS, and before the first token of a text. On a Mamba they
    make the state that the text begins with. Hidden states between the blocks have them.

    Args:
        subject: a ViT or a Mamba.
        length: p, the number of tokens.

    Raises:
        UnsuitableError: the blocks of this backbone cannot be given tokens.
    """
    count("length", length)
    _check(subject, "vpt-shallow")
    device, dtype = place_of(subject.backbone.blocks[0])
    return stand_before(subject, _tokens(subject, length, device, dtype))


def vpt_deep(subject: Subject, *, length: int = 10) -> Trained:
    """VPT-deep: tokens of their own enter at every block and leave after it (eq. 6 and 7).

    Of the hidden states that transformers records, only the first has them: it is what enters the first block.

    Args:
        subject: a ViT or a Mamba.
        length: p, the number of tokens at every block.

    Raises:
        UnsuitableError: the blocks of this backbone cannot be given tokens.
    """
    count("length", length)
    _check(subject, "vpt-deep")
    blocks, at = subject.backbone.blocks, prefix_tokens(subject.inner)
    require_free(blocks, "prompt")
    gates = []
    for block in blocks:
        weight = _tokens(subject, length, *place_of(block))
        gates.append(Gate(block, at, length, weight, leaves=True))
    return Trained([p for gate in gates for p in gate.parameters()])


def stand_before(subject: Subject, weight: nn.Parameter) -> Trained:
    """Let tokens `(tokens, width)` enter at the first block and leave after the last."""
    blocks, at = subject.backbone.blocks, prefix_tokens(subject.inner)
    require_free(blocks, "prompt")
    last = len(blocks) - 1
    for index, block in enumerate(blocks):
        entering = weight if index == 0 else None
        Gate(block, at, len(weight), entering, leaves=index == last)
    return Trained([weight])


def is_ssm(subject: Subject) -> bool:
    """Say whether every block mixes tokens by a selective state space alone."""
    return all(any("A_log" in module._parameters for module in block.modules()) for block in subject.backbone.blocks)


class Gate(nn.Module):
    """Let tokens into a block and out of it, or tell a block between of the tokens that go through it.

    It is a child of its block, and its hooks are its own bound methods, so that copies stand on their own. Nothing
    enters in a call that goes on with a cache: the cache holds what came of the tokens.

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
        mixer: Any = getattr(block, "mixer", None)
        self._layer = getattr(mixer, "layer_idx", None)
        self._place: Place | None = None
        add_child(block, "prompt", self)
        block.register_forward_pre_hook(self._before, with_kwargs=True)
        block.register_forward_hook(self._after, prepend=True)  # who captures hidden states shall not see the tokens

    def forward(self, z: Any) -> Any:
        """Return what comes in: a block that calls all its children, an `nn.Sequential`, calls this too."""
        return z

    def _before(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Let the tokens in.

        Raises:
            SteerError: the stream is no sequence, or a mask is given that has no place for them.
        """
        self._place = None
        if not begins_text(kwargs, self._layer):
            return args, kwargs
        mask = kwargs.get("attention_mask")
        by_row = isinstance(mask, Tensor) and mask.dim() == 2
        place: Place = behind_padding(mask) if isinstance(mask, Tensor) and by_row else self._at
        if (mask is not None and not by_row) or kwargs.get("attn_mask") is not None:
            raise SteerError(
                "VPT's tokens have no place in an attention mask that is given ready-made. Call the model without one."
            )
        if self.weight is not None:
            args, kwargs = self._enter(args, kwargs, self.weight, place)
        changed = dict(kwargs)
        if isinstance(mask, Tensor):
            changed["attention_mask"] = insert(mask, mask.new_ones(self._tokens), place)
        if isinstance(kwargs.get("rope"), Tensor):
            changed["rope"] = _unrotated(kwargs["rope"], self._tokens)
        self._place = place
        return args, changed

    def _enter(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], weight: Tensor, place: Place
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Put the tokens into the stream; where it is a sum of several tensors, into the first, and zeros elsewhere.

        Raises:
            SteerError: the stream is no sequence.
        """
        rest = torch.zeros_like(weight)
        parts = [value for value in (*args, kwargs.get("hidden_states")) if isinstance(value, Tensor)]
        if not parts or parts[0].dim() != 3:
            shape = tuple(parts[0].shape) if parts else None
            raise SteerError(f"VPT puts tokens into a stream (batch, length, width); this block was given {shape}.")
        first = parts[0]

        def put(value: Any) -> Any:
            if not isinstance(value, Tensor) or value.shape != first.shape:
                return value
            return insert(value, weight if value is first else rest, place)

        return tuple(put(value) for value in args), {key: put(value) for key, value in kwargs.items()}

    def _after(self, block: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        place, self._place = self._place, None
        if place is None or not self._leaves:
            return output
        out = partial(take_out, tokens=self._tokens, place=place)
        if isinstance(output, Tensor):
            return out(output)
        kept = [out(value) if isinstance(value, Tensor) and value.dim() == 3 else value for value in output]
        return type(output)(*kept) if hasattr(output, "_fields") else type(output)(kept)


def _check(subject: Subject, method: str) -> None:
    """Hold the backbone against what tokens in the stream need.

    Raises:
        UnsuitableError: its blocks do not take a sequence of any length.
    """
    backbone = subject.backbone
    if backbone.channels != -1 or len(set(backbone.widths)) > 1:
        raise UnsuitableError(
            f"{method!r} puts tokens into a sequence, and the stream of {backbone.name!r} is a map of features or "
            "changes its width from block to block. Choose another method."
        )
    words = any(isinstance(module, nn.Embedding) for module in subject.inner.modules())
    if words and not is_ssm(subject) and _patches(subject) is None:  # CLIP embeds positions
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


def _tokens(subject: Subject, length: int, device: torch.device, dtype: torch.dtype) -> nn.Parameter:
    """Draw tokens as VPT does, uniform in ±√(6 / (fan-in of a patch + d)); a text's tokens have fan-in d."""
    width = subject.backbone.widths[0]
    patches = _patches(subject)
    fan_in = width if patches is None else patches.weight[0].numel()
    bound = math.sqrt(6 / (fan_in + width))
    return nn.Parameter(torch.empty(length, width).uniform_(-bound, bound).to(device, dtype))


def _unrotated(rope: Tensor, tokens: int) -> Tensor:
    """Return timm's table of rotations, `(..., length, sines and cosines)`, with tokens before the image at rest."""
    half = rope.shape[-1] // 2
    shape = (*rope.shape[:-2], tokens, half)
    return torch.cat([torch.cat([rope.new_zeros(shape), rope.new_ones(shape)], dim=-1), rope], dim=-2)
