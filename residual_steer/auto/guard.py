"""A probe leaves no trace: modes, buffers, `requires_grad` and random generators are put back."""

from __future__ import annotations

import contextlib
import random
import warnings
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["differentiable", "undisturbed"]


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Run what is inside in evaluation mode and put everything back, whatever happens.

    The modes are set on the modules themselves: a `train` of a model's own may do more than that.
    """
    modes = [(module, module.training) for module in model.modules()]
    buffers = [
        (module, name, buffer, None if buffer is None else buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
    ]
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(), torch.inference_mode(False), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for module, _ in modes:
            module.training = False
        try:
            yield
        finally:
            for module, mode in modes:
                module.training = mode
            random.setstate(python)
            np.random.set_state(numpy)
            _restore(buffers)


@torch.no_grad()
def _restore(buffers: list[tuple[nn.Module, str, Tensor | None, Tensor | None]]) -> None:
    for module, name, buffer, value in buffers:
        module._buffers[name] = buffer
        if buffer is not None and value is not None and not _same(buffer, value):
            buffer.copy_(value)


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one.nan_to_num(), other.nan_to_num())


@contextlib.contextmanager
def differentiable(model: nn.Module) -> Iterator[None]:
    """Let every parameter require a gradient, so that all that is computed is in one graph, which keeps no values."""
    parameters = [(p, p.requires_grad) for p in model.parameters() if p.is_floating_point()]
    try:
        for parameter, _ in parameters:
            parameter.requires_grad_(True)
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(lambda _: None, _no_backward):
            yield
    finally:
        for parameter, required in parameters:
            parameter.requires_grad_(required)


def _no_backward(_: None) -> Tensor:
    raise RuntimeError("no backward pass runs through a probe.")
