"""The mode of every module, set and given back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

from torch import nn

__all__ = ["as_before", "train_mode"]


def train_mode(model: nn.Module, trained: Iterable[str]) -> None:
    """Set training mode, but keep the running statistics of frozen modules as they are."""
    model.train()
    owners = {name.rpartition(".")[0] for name in trained}
    for path, module in model.named_modules():
        if getattr(module, "running_mean", None) is not None and path not in owners:
            module.eval()


@contextlib.contextmanager
def as_before(model: nn.Module) -> Iterator[None]:
    """Give back every module's mode, and the `forward` that accelerate wraps for mixed precision."""
    modes = {module: module.training for module in model.modules()}
    attributes = ("forward", "_original_forward")
    kept = {name: model.__dict__[name] for name in attributes if name in model.__dict__}
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for name in attributes:
            model.__dict__.pop(name, None)
        model.__dict__.update(kept)
