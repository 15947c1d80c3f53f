"""Modules whose weight a block reads without calling them.

What is attached to such a module never runs, so that the method trains nothing there, without a word. A fused kernel
takes the weights it needs, and so do some plain forward passes. The rules below keep methods away from what is known to
be read that way; `Guard` finds out about the rest.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.machinery import PathFinder
from typing import NamedTuple

from torch import nn

from ._attach import Subject

__all__ = ["Part", "is_linear", "parts_of"]


class Part(NamedTuple):
    """A module inside a block.

    Attributes:
        block: the block's index.
        name: its path in the model.
        path: its path in the block.
        module: the module.
        remedy: None where the block calls it; else what makes the block do so, "" if nothing does.
    """

    block: int
    name: str
    path: str
    module: nn.Module
    remedy: str | None


def parts_of(subject: Subject, layers: Sequence[int] | None, wanted: Callable[[nn.Module], bool]) -> list[Part]:
    """Return the modules inside the blocks that `wanted` takes."""
    names = {id(module): name for name, module in subject.model.named_modules()}
    found = []
    for index, block in subject.blocks(layers).items():
        inside = list(block.named_modules())
        silent = {f"{path}.{name}": way for path, module in inside for name, way in _bypassed_in(module).items()}
        for path, module in inside:
            if path and wanted(module):
                found.append(Part(index, names[id(module)], path, module, silent.get(path, silent.get(f".{path}"))))
    return found


def is_linear(module: nn.Module) -> bool:
    """Return whether a module is a linear layer, or GPT-2's `Conv1D`, which is one with its weight transposed."""
    return isinstance(module, nn.Linear) or (type(module).__name__ == "Conv1D" and hasattr(module, "nf"))


def _bypassed_in(module: nn.Module) -> dict[str, str]:
    """Return which children a module does not call, and what makes it do so."""
    found: dict[str, str] = {}
    if isinstance(getattr(module, "conv1d", None), nn.Module):  # a selective SSM
        found |= dict.fromkeys(("conv1d", "dt_proj"), "")
        if _package(module) == "mamba_ssm" and hasattr(module, "dt_proj"):  # Mamba-1 multiplies the weight itself
            found["in_proj"] = ""
        remedy = _fused(module)
        if remedy is not None:
            found |= dict.fromkeys(("x_proj", "norm", "out_proj"), remedy)
    if getattr(module, "fused_add_norm", False):
        found |= dict.fromkeys(("norm", "norm2"), "build the model with fused_add_norm=False")
    if getattr(module, "q_bias", None) is not None and not getattr(module, "qkv_bias_separate", False):  # timm's EVA
        found["qkv"] = "set its attention's `qkv_bias_separate = True`" if hasattr(module, "qkv_bias_separate") else ""
    if isinstance(module, nn.MultiheadAttention):
        found["out_proj"] = ""
    return {name: remedy for name, remedy in found.items() if isinstance(getattr(module, name, None), nn.Module)}


def _fused(mixer: nn.Module) -> str | None:
    """Return what switches a mixer's fused kernel off; None if it does not run one."""
    if _package(mixer) == "mamba_ssm":
        convolution = getattr(sys.modules[type(mixer).__module__], "causal_conv1d_fn", None)
        for switch, there in (("use_fast_path", convolution is not None), ("use_mem_eff_path", True)):
            if there and getattr(mixer, switch, False):
                return f"set its mixer's `{switch} = False`"
        return None
    # transformers takes the fused kernel in training wherever it is installed, and has no switch for it
    return "" if PathFinder.find_spec("selective_scan_cuda") is not None else None


def _package(module: nn.Module) -> str:
    return type(module).__module__.partition(".")[0]
