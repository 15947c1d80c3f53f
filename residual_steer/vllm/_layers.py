"""Decoder layers of vLLM that add fields to the stream that leaves them, and the models whose layers were proven.

The class of every layer is replaced by a subclass before the model is compiled. Names, weights and `isinstance` stay.
"""

from __future__ import annotations

import inspect
import re
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn

from residual_steer.errors import SteerError, some

from ._bank import Bank

# By architecture: the class of its decoder layers in vllm.model_executor.models, and the family of its backbone here.
# The stream is `hidden_states`, plus `residual` where the layer takes one. tests/serving holds each to transformers.
FAMILIES = {
    "FalconH1ForCausalLM": ("falcon_h1.FalconH1ParallelHybrid", "hybrid"),
    "GPT2LMHeadModel": ("gpt2.GPT2Block", "gpt2"),
    "LlamaForCausalLM": ("llama.LlamaDecoderLayer", "llama"),
    "Mamba2ForCausalLM": ("mamba2.Mamba2DecoderLayer", "mamba"),
    "Qwen3ForCausalLM": ("qwen3.Qwen3DecoderLayer", "llama"),
}
_LAYER = re.compile(r"(?:^|\.)(?:layers|h)\.(\d+)$")
_banks: list[Bank] = []

# One opaque operation, so that `torch.compile` makes one graph of all mixes of fields.
torch.library.define("residual_steer::add_", "(Tensor(a!) y, Tensor z, Tensor? rest, int bank, int layer) -> ()")
torch.library.register_fake("residual_steer::add_")(lambda y, z, rest, bank, layer: None)


@torch.library.impl("residual_steer::add_", "CompositeExplicitAutograd")
def _add(y: Tensor, z: Tensor, rest: Tensor | None, bank: int, layer: int) -> None:
    _banks[bank].add_(y, z, ("block", layer))
    if ("after", layer) in _banks[bank].tables:
        _banks[bank].add_(y, y.clone() if rest is None else y + rest, ("after", layer))


@cache
def _steered(base: Any) -> Any:
    """Return a subclass of a decoder layer whose stream is steered."""
    names = [*inspect.signature(base.forward).parameters][1:]

    def given(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        place = names.index(name) if name in names else len(args)
        return args[place] if place < len(args) else kwargs.get(name)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling() and _banks[self.steering_bank].idle:
            return base.forward(self, *args, **kwargs)
        hidden, residual = given("hidden_states", args, kwargs), given("residual", args, kwargs)
        z = hidden.clone() if residual is None else hidden + residual  # fused norms overwrite what enters
        output = base.forward(self, *args, **kwargs)
        y, rest = output if isinstance(output, tuple) else (output, None)
        torch.ops.residual_steer.add_(y, z, rest, self.steering_bank, self.steering_layer)
        return output

    return type(f"Steered{base.__name__}", (base,), {"forward": forward, "__module__": __name__})


def install(model: nn.Module, bank: Bank, layers: int, expected: str) -> None:
    """Let every decoder layer of a model add the fields of a bank; raise if their class was not proven."""
    found = {int(hit[1]): module for name, module in model.named_modules() if (hit := _LAYER.search(name))}
    kinds = {f"{type(module).__module__}.{type(module).__qualname__}" for module in found.values()}
    if sorted(found) != list(range(layers)) or kinds != {f"vllm.model_executor.models.{expected}"}:
        raise SteerError(
            f"fields were proven on {layers} layers of {expected} in {type(model).__name__}; found {len(found)}, "
            f"{some(sorted(kinds))}. This vLLM builds the model in another way than the release that was tried."
        )
    _banks.append(bank)
    for index, module in found.items():
        module.steering_bank, module.steering_layer = len(_banks) - 1, index
        module.__class__ = _steered(cast(Any, type(module)))
