"""What a run or a pass over data leaves as it was: the mode of every module, the state of every random generator."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

__all__ = ["apart", "as_before", "get_state", "set_state", "train_mode"]


def train_mode(model: nn.Module, trained: Iterable[str]) -> None:
    """Set training mode, but keep the running statistics of frozen modules as they are."""
    model.train()
    owners = {name.rpartition(".")[0] for name in trained}
    for path, module in model.named_modules():
        if getattr(module, "running_mean", None) is not None and path not in owners:
            module.eval()


@contextlib.contextmanager
def as_before(model: nn.Module) -> Iterator[None]:
    """Give back every module's mode."""
    modes = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def get_state(*, devices: bool = True) -> dict[str, Any]:
    """Return the state of the generators of Python, NumPy and torch, as tensors and numbers.

    Args:
        devices: those of CUDA devices too, for which the devices have to be waited for.
    """
    version, words, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    state = {
        "python": [version, list(words), gauss],
        "numpy": [torch.from_numpy(np.asarray(keys, dtype=np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
    }
    if devices and torch.cuda.is_available():
        state["cuda"] = [tensor.cpu() for tensor in torch.cuda.get_rng_state_all()]
    return state


def set_state(state: dict[str, Any]) -> None:
    """Put back what `get_state` returned."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state(("MT19937", keys.numpy().astype("uint32"), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])


@contextlib.contextmanager
def apart() -> Iterator[None]:
    """Leave the generators as they were, whatever happens inside."""
    state = get_state()
    try:
        yield
    finally:
        set_state(state)
