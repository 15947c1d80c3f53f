"""What arguments of more than one data set have in common: whole numbers, shares, and tokens."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from residual_steer.errors import SteerError

__all__ = ["check_integer", "check_number", "check_tokens", "generator"]

_SEEDS = 2**40


def check_integer(name: str, value: object, least: int) -> int:
    """Return an argument that is a whole number of at least `least`.

    Raises:
        SteerError: it is not.
    """
    if isinstance(value, bool) or not hasattr(value, "__index__") or operator.index(value) < least:
        raise SteerError(f"`{name}` is an integer of at least {least}; received {value!r}.")
    return operator.index(value)


def check_number(name: str, value: object, least: float = 0.0) -> float:
    """Return an argument that is a finite number of at least `least`.

    Raises:
        SteerError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value < least:
        raise SteerError(f"`{name}` is a finite number of at least {least:g}; received {value!r}.")
    return float(value)


def check_tokens(name: str, value: object, least: int) -> Tensor:
    """Return an argument that lists at least `least` different tokens, as int64 `(tokens,)`.

    Raises:
        SteerError: it does not.
    """
    listed = list(value) if isinstance(value, Iterable) and not isinstance(value, (str, bytes)) else []
    whole = all(hasattr(token, "__index__") and operator.index(token) >= 0 for token in listed)
    if not whole or len(set(listed)) < max(1, len(listed), least):
        raise SteerError(
            f"`{name}` lists at least {max(1, least)} different tokens, as range(1, 100) does; received {value!r:.200}."
        )
    return torch.tensor(listed, dtype=torch.int64)


def generator(seed: object, stream: int = 0) -> torch.Generator:
    """Return a source of random numbers; other streams of a seed, and other seeds, have other numbers.

    Raises:
        SteerError: the seed is not a whole number from 0 to 2^40 - 1.
    """
    if isinstance(seed, bool) or not hasattr(seed, "__index__") or not 0 <= operator.index(seed) < _SEEDS:
        raise SteerError(f"`seed` is an integer from 0 to 2^40 - 1; received {seed!r}.")
    mixed = np.random.SeedSequence([operator.index(seed), stream]).generate_state(1)
    return torch.Generator().manual_seed(int(mixed[0]))  # which takes no more than 32 bits into account
