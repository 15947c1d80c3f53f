"""What a stream can be besides dense rows of one length: nested tensors, and tokens in front of an image's.

`nn.TransformerEncoder` nests its batch under a padding mask in evaluation mode: padded for a field, and cut again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

__all__ = ["UnlessTrained", "class_token", "dense", "moved", "prefix_tokens", "prepared"]

_CLASS = ("cls_token", "class_embedding")
_PREFIX = (*_CLASS, "distillation_token")


def dense(z: Tensor) -> Tensor:
    """Return a stream as `(batch, longest, width)`, padded with zeros if it is nested."""
    return torch.nested.to_padded_tensor(z, 0.0) if z.is_nested else z


def moved(z: Tensor, f: Callable[[Tensor], Tensor]) -> Tensor:
    """Return f(z), where f takes and returns dense streams; nested as z is."""
    if not z.is_nested:
        return f(z)
    rows = [row[: len(old)] for row, old in zip(f(dense(z)).unbind(), z.unbind(), strict=True)]
    if z.layout is torch.jagged and z.lengths() is None:  # type: ignore[attr-defined]
        offsets = z.offsets()  # type: ignore[attr-defined]
        return torch.nested.nested_tensor_from_jagged(torch.cat(rows), offsets)  # of the same ragged dimension
    return torch.nested.as_nested_tensor(rows, layout=z.layout)


@dataclass
class UnlessTrained:
    """What `use_nested_tensor` of an encoder is while it is steered: false where a gradient goes through the encoder.

    Attention over nested tensors has no gradient. Torch therefore makes none if a parameter of the first layer requires
    one; those of the fields in the layers count as well.
    """

    encoder: nn.TransformerEncoder
    before: bool  # whether it makes nested tensors without steering

    def __bool__(self) -> bool:
        return self.before and not (torch.is_grad_enabled() and any(p.requires_grad for p in self.encoder.parameters()))

    def remove(self) -> None:
        """Put back what was there before."""
        self.encoder.use_nested_tensor = self.before


Described = TypeVar("Described", bound=Any)  # a Backbone, which this file is too low to know
Prepare = Callable[[Sequence[nn.Module]], Sequence[Any]]


@dataclass(frozen=True, eq=False)
class _Encoders:
    """Prepare a backbone in the layers of encoders: `Backbone.prepare`, called when steering begins."""

    encoders: tuple[nn.TransformerEncoder, ...]
    more: Prepare | None

    def __call__(self, blocks: Sequence[nn.Module]) -> list[Any]:
        handles: list[Any] = [UnlessTrained(encoder, bool(encoder.use_nested_tensor)) for encoder in self.encoders]
        for handle in handles:
            handle.encoder.use_nested_tensor = handle
        return [*handles, *(() if self.more is None else self.more(blocks))]


def prepared(model: nn.Module, backbone: Described) -> Described:
    """Return a backbone whose `prepare` keeps encoders around its blocks from nested tensors that need a gradient."""
    steered = {id(block) for block in backbone.blocks}
    encoders = (module for module in model.modules() if isinstance(module, nn.TransformerEncoder))
    around = tuple(encoder for encoder in encoders if any(id(layer) in steered for layer in encoder.layers))
    if not around or isinstance(backbone.prepare, _Encoders):
        return backbone
    return replace(backbone, prepare=_Encoders(around, backbone.prepare))


def class_token(model: nn.Module) -> bool:
    """Return whether a model of images puts a class token before them."""
    return any(name.rpartition(".")[2] in _CLASS for name, _ in model.named_parameters())


def prefix_tokens(model: nn.Module) -> int:
    """Return how many tokens stand before those of an image, 0 in a text; timm counts them, transformers does not."""
    for module in model.modules():
        count: Any = getattr(module, "num_prefix_tokens", None)
        if isinstance(count, int):
            return count
    named = [(name.rpartition(".")[2], parameter) for name, parameter in model.named_parameters()]
    return sum(1 if name in _PREFIX else p.shape[-2] if name == "register_tokens" else 0 for name, p in named)
