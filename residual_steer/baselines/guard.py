"""A check, once, that the modules a method was attached to are called at all.

Some models read a module's weight without calling the module, above all in fused kernels (peft #2274, mamba #279), or
call what is in a module past it. Whatever was attached to it then trains nothing, without a word.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from residual_steer.errors import SteerError

__all__ = ["Guard"]


class Guard:
    """Watch the first forward pass in training mode; after one in which all were called, nothing is left of it.

    Its hooks are its own bound methods, so that they follow the model into copies. A compiled forward pass is not
    watched: what the hooks would note is no part of the graph.

    Args:
        model: the model that is called.
        paths: of the modules that have to be called.
    """

    def __init__(self, model: nn.Module, paths: Sequence[str]) -> None:
        self._paths = tuple(paths)
        self._called: set[nn.Module] = set()
        self._handles: list[RemovableHandle] = [model.register_forward_pre_hook(self._begin)]
        for module in {model.get_submodule(path) for path in paths}:
            self._handles.append(module.register_forward_pre_hook(self._note))
        self._handles.append(model.register_forward_hook(self._judge))

    def remove(self) -> None:
        """Take the hooks away."""
        while self._handles:
            self._handles.pop().remove()

    def _begin(self, model: nn.Module, args: tuple[Any, ...]) -> None:
        if not torch.compiler.is_compiling():
            self._called.clear()

    def _note(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if not torch.compiler.is_compiling():
            self._called.add(module)

    def _judge(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Hold the modules that were called against those that had to be.

        Raises:
            SteerError: one of them was not.
        """
        if torch.compiler.is_compiling() or not model.training:
            return
        missed = [path for path in self._paths if model.get_submodule(path) not in self._called]
        self._called.clear()
        if missed:
            listed = ", ".join(missed[:6]) + (", …" if len(missed) > 6 else "")
            raise SteerError(
                f"{len(missed)} of the {len(self._paths)} modules that the method was attached to were not called in a "
                f"training step: {listed}. The model does not use them, calls parts of them, or reads their weight "
                "itself, as fused kernels do; so nothing would be trained there. Leave them out (`targets`, `layers`), "
                "switch the fused path off, or choose another method."
            )
        self.remove()
