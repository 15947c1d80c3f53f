"""Backbones of well-known shapes with random weights: what they compute says nothing, how long they take does."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import residual_steer as rs
from residual_steer._caches import cache_of, cache_parameter

__all__ = ["SHAPES", "Shape", "scan_linearly", "scanning", "twin"]

Call = Callable[..., Any]


@dataclass(frozen=True)
class Shape:
    """A backbone to be timed.

    Attributes:
        about: what it is.
        make: builds it, tiny if asked to, with changes to its configuration.
        length: default number of tokens of a row; None for a model of images, whose size is fixed.
        cache: what it holds, "keys and values" or "states"; None if the model has none.
    """

    about: str
    make: Callable[[bool, Mapping[str, Any]], nn.Module]
    length: int | None
    cache: str | None

    def build(
        self,
        *,
        tiny: bool = False,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        **changes: Any,
    ) -> nn.Module:
        """Return the model, frozen, in evaluation mode; the same weights each time.

        Args:
            tiny: whether to build a tiny one.
            device: where.
            dtype: of the weights.
            **changes: to the configuration.
        """
        torch.manual_seed(0)
        return self.make(tiny, changes).to(device, dtype).eval().requires_grad_(False)

    def batch(self, model: nn.Module, rows: int, length: int | None) -> Tensor:
        """Return random input: token ids `(rows, length)`, or images `(rows, channels, height, width)`."""
        generator = torch.Generator().manual_seed(1)
        like = next(model.parameters())
        if self.length is None:
            size = (rows, 3, *model.patch_embed.img_size)
            return torch.randn(size, generator=generator).to(like)
        size = (rows, length or self.length)
        return torch.randint(model.config.vocab_size, size, generator=generator).to(like.device)

    def loss(self, call: Call, inputs: Tensor) -> Tensor:
        """Return the loss of a batch: of the next token, or of a class."""
        if self.length is None:
            return F.cross_entropy(call(inputs), torch.arange(len(inputs), device=inputs.device))
        return call(input_ids=inputs, labels=inputs, use_cache=False).loss

    def prefill(self, call: Call, inputs: Tensor, **more: Any) -> Tensor:
        """Return the logits of the whole batch: of a language model for the next token only, as `generate` asks."""
        if self.cache is None:
            return call(inputs)
        return call(input_ids=inputs, use_cache=True, logits_to_keep=1, **more).logits

    def cached(self, call: Call, inputs: Tensor, **more: Any) -> Any:
        """Return the cache that reading `inputs` leaves."""
        return cache_of(call(input_ids=inputs, use_cache=True, logits_to_keep=1, **more))

    def decode(self, call: Call, token: Tensor, cache: Any, **more: Any) -> Tensor:
        """Return the logits after one more token, `(rows, 1)`, which is written into `cache`."""
        return call(input_ids=token, use_cache=True, **{_keyword(call): cache}, **more).logits

    def static(self, model: nn.Module, room: int) -> dict[str, Any]:
        """Return the keyword of a cache of a fixed size, for `cached`; an SSM's has one anyway.

        Args:
            model: whose cache.
            room: tokens that it holds.
        """
        if self.cache != "keys and values":
            return {}
        from transformers import StaticCache

        return {_keyword(model): StaticCache(config=model.config, max_cache_len=room)}

    @staticmethod
    def fresh(cache: Any) -> Any:
        """Return a copy of a cache, since decoding writes into it."""
        return copy.deepcopy(cache)


def _keyword(model: nn.Module) -> str:
    """Return the keyword by which a model, or the one inside a wrapper of PEFT or torch.compile, takes its cache."""
    return next(filter(None, map(cache_parameter, model.modules())))


def twin(model: nn.Module) -> nn.Module:
    """Return a copy that has modules and parameters of its own, frozen, over the same memory."""
    shared: dict[int, Any] = {id(p): nn.Parameter(p.data, requires_grad=False) for p in model.parameters()}
    return copy.deepcopy(model, shared)


def scan_linearly(model: nn.Module) -> nn.Module:
    """Let transformers' Mamba train through the linear scan whatever adapts it; other models stay as they are."""
    backbone = rs.find_backbone(model)
    if backbone.prepare is not None:
        backbone.prepare(backbone.blocks)
    return model


def scanning(model: nn.Module) -> nn.Module:
    """Put Mamba's mixers on a CPU, in which nothing is random, in training mode, where that scan runs."""
    for module in model.modules():
        if "A_log" in module._parameters and module._parameters["A_log"].device.type == "cpu":
            module.training = True
    return model


def _gpt2(tiny: bool, changes: Mapping[str, Any]) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    small = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}
    model = GPT2LMHeadModel(GPT2Config(**{**(small if tiny else {}), **changes}))
    model.loss_type = "ForCausalLM"  # which it takes anyway, with a warning that breaks the graph of a compiled step
    return model


def _mamba(tiny: bool, changes: Mapping[str, Any]) -> nn.Module:
    from transformers import MambaConfig, MambaForCausalLM

    shape = {"vocab_size": 50280, "hidden_size": 768, "num_hidden_layers": 24}
    small = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}
    return MambaForCausalLM(MambaConfig(**{**(small if tiny else shape), **changes}))


def _vit(tiny: bool, changes: Mapping[str, Any]) -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    small = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
    return VisionTransformer(**{**(small if tiny else {}), **changes})


SHAPES = {
    "gpt2": Shape("GPT-2-small's shape (transformers)", _gpt2, length=64, cache="keys and values"),
    "mamba": Shape("mamba-130m's shape (transformers)", _mamba, length=64, cache="states"),
    "vit": Shape("ViT-B/16's shape, 224 × 224 pixels (timm)", _vit, length=None, cache=None),
}
