"""Checks of arguments and of what is installed. What fails is a SteerError; what passes is returned."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, version
from numbers import Integral, Real
from typing import Any, TypeVar

import torch
from torch import nn

from .errors import SteerError

Choice = TypeVar("Choice")

# Whether `torch.jit.trace` runs a model, which records every look at a size; itself, since every point asks.
is_tracing: Callable[[], bool] = torch.jit.is_tracing  # type: ignore[attr-defined]


def check_integer(
    name: str, value: Any, at_least: int | None = None, at_most: int | None = None, *, meaning: str = ""
) -> int:
    """Return an argument that is a whole number in a range, also one of numpy's, as a plain int.

    >>> check_integer("limit", 0, 1, meaning="rows, or None for all")  # meaning: what it counts, or its alternative
    SteerError: `limit` is an integer of at least 1, rows, or None for all; received 0.

    Raises:
        SteerError: it is no integer, a bool, or outside the range.
    """
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    if not whole or (at_least is not None and value < at_least) or (at_most is not None and value > at_most):
        raise SteerError(_message(name, "an integer" + _range(at_least=at_least, at_most=at_most), meaning, value))
    return int(value)


def check_number(
    name: str,
    value: Any,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    meaning: str = "",
) -> float:
    """Return an argument that is a finite number in a range, also one of numpy's, as a plain float.

    >>> check_number("dropout", 1.0, at_least=0, below=1)
    SteerError: `dropout` is a number of at least 0 and below 1; received 1.0.

    Raises:
        SteerError: it is no number, a bool, NaN, infinite, or outside the range.
    """
    real = isinstance(value, Real) and not isinstance(value, bool) and _is_finite(value)
    if (
        not real
        or (at_least is not None and value < at_least)
        or (above is not None and value <= above)
        or (at_most is not None and value > at_most)
        or (below is not None and value >= below)
    ):
        allowed = _range(at_least=at_least, above=above, at_most=at_most, below=below)
        raise SteerError(_message(name, "a number" + allowed if allowed else "a finite number", meaning, value))
    return float(value)


def check_flag(name: str, value: Any) -> bool:
    """Return an argument that is True or False; raise if it is neither."""
    if not isinstance(value, bool):
        raise SteerError(_message(name, "True or False", "", value))
    return value


def check_choice(name: str, value: Any, choices: Iterable[Choice], *, meaning: str = "") -> Choice:
    """Return the one of several choices that an argument is; None may be one of them.

    >>> check_choice("site", "blok", ("block", "mixer"))
    SteerError: `site` is one of block, mixer; received 'blok'.

    Raises:
        SteerError: it is none of them.
    """
    choices = tuple(choices)
    for choice in choices:
        if value is choice or (isinstance(value, type(choice)) and value == choice):
            return choice
    raise SteerError(_message(name, f"one of {', '.join(map(str, choices))}", meaning, value))


def check_options(owner: str, options: Iterable[str], known: Iterable[str]) -> None:
    """Raise if one of the keyword arguments that are passed on is not known."""
    known = tuple(known)
    for name in options:
        if name not in known:
            listed = f"it has {', '.join(known)}" if known else "it has none"
            raise SteerError(f"`{owner}` has no option {name!r}; {listed}.")


def check_model(model: Any) -> nn.Module:
    """Return a model that is a `torch.nn.Module`; raise if it is none."""
    if not isinstance(model, nn.Module):
        raise SteerError(f"a model is a torch.nn.Module; received {type(model).__name__}.")
    return model


def import_optional(name: str, why: str, extra: str) -> Any:
    """Return a module that an extra of this library installs; raise if it is not there."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise SteerError(f"{why}: pip install 'residual-steer[{extra}]'.") from error


def release_of(package: str) -> str:
    """Return the version of an installed package, "unknown" for code that was not installed as one."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def is_exporting() -> bool:
    """Return whether `torch.export` traces; torch before 2.7 cannot tell it from compiling."""
    known = getattr(torch.compiler, "is_exporting", None)
    return torch.compiler.is_compiling() if known is None else bool(known())


def _range(**bounds: float | None) -> str:
    """Return a range in words: ` of at least 0 and below 1`, ` from 1 to 8`."""
    if None not in (bounds["at_least"], bounds["at_most"]):
        return f" from {bounds['at_least']} to {bounds['at_most']}"
    words = [f"{bound.replace('_', ' ')} {limit}" for bound, limit in bounds.items() if limit is not None]
    return (" of " if words and words[0].startswith("at") else " ") + " and ".join(words) if words else ""


def _message(name: str, allowed: str, meaning: str, value: Any) -> str:
    return f"`{name}` is {allowed}{', ' + meaning if meaning else ''}; received {value!r:.200}."


def _is_finite(value: Real) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer or a fraction beyond what a float has room for
        return False
