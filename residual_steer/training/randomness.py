"""The state of every random generator, as plain data, and streams of randomness that do not disturb each other."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

__all__ = ["apart", "get_state", "set_state"]


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
