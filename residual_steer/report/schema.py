"""Frozen dataclasses that check themselves, and go to JSON and back without losing or guessing anything.

A field's type hint is its rule, whether a value comes from a program or from a file. JSON has neither NaN nor infinity:
where None is allowed they become None, and where a number is needed they become NaN, which is written as null.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import numbers
import os
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from residual_steer.errors import SteerError

__all__ = ["check_fields", "decode", "encode", "short"]

T = TypeVar("T")
_DEEPEST = 100  # of free JSON: far more than any record needs, far less than the interpreter's stack


def check_fields(instance: Any) -> None:
    """Hold every field of a frozen dataclass against its type hint: for `__post_init__`.

    Lists become tuples, mappings are copied, and numbers of NumPy become Python's.

    Raises:
        SteerError: a field is of another type.
    """
    cls: Any = type(instance)
    for name, hint in _hints(cls).items():
        value = _fit(hint, getattr(instance, name), f"{cls.__name__}.{name}")
        object.__setattr__(instance, name, value)


def decode(cls: Callable[..., T], value: Any, where: str) -> T:
    """Return the instance of a dataclass that `encode` wrote.

    Args:
        cls: the dataclass.
        value: its fields by name, as JSON.
        where: how messages call it.

    Raises:
        SteerError: a field is missing, unknown or of another type.
    """
    hints = _hints(cls)
    if not isinstance(value, Mapping):
        raise SteerError(f"{where} needs an object with {', '.join(hints)}; found {short(value)}.")
    for problem, names in (("lacks", hints.keys() - value.keys()), ("has unknown", value.keys() - hints.keys())):
        if names:
            raise SteerError(f"{where} {problem} {', '.join(sorted(map(str, names)))}; its fields: {', '.join(hints)}.")
    fields = {name: _fit(hint, value[name], f"{where}.{name}") for name, hint in hints.items()}
    try:
        return cls(**fields)
    except SteerError as error:
        raise SteerError(f"{where}: {error}") from error


def encode(value: Any) -> Any:
    """Return a dataclass as JSON: objects, lists, texts and numbers."""
    if dataclasses.is_dataclass(value):
        return {field.name: encode(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: encode(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [encode(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def short(value: Any) -> str:
    """Return the beginning of a value, for a message."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"


@functools.cache
def _hints(cls: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _fit(hint: Any, value: Any, where: str) -> Any:
    """Return `value` as `hint` says.

    Raises:
        SteerError: it cannot be that.
    """
    origin = typing.get_origin(hint)
    arguments = typing.get_args(hint)
    if hint is Any:
        return _free(value, where, _DEEPEST)
    if origin is typing.Literal:
        if value in arguments:
            return value
        raise SteerError(f"{where} is one of {', '.join(map(repr, arguments))}; received {short(value)}.")
    if origin is tuple:
        if not isinstance(value, (list, tuple, range)):
            raise SteerError(f"{where} is a list; received {short(value)}.")
        return tuple(_fit(arguments[0], part, f"{where}[{index}]") for index, part in enumerate(value))
    if origin in (typing.Union, types.UnionType):
        return _fit_any(arguments, value, where)
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            raise SteerError(f"{where} is an object; received {short(value)}.")
        if arguments[1] is Any:
            return _free(value, where, _DEEPEST)
        return {_text(key, where): _fit(arguments[1], part, f"{where}.{key}") for key, part in value.items()}
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return value if isinstance(value, hint) else decode(hint, value, where)
    return _PLAIN[hint](value, where)


def _fit_any(hints: tuple[Any, ...], value: Any, where: str) -> Any:
    """Return `value` as the first of `hints` that it can be.

    Raises:
        SteerError: it can be none of them.
    """
    if type(None) in hints and (value is None or (_is_number(value) and _finite(value) is None)):
        return None
    kinds = [hint for hint in hints if hint is not type(None)]
    if all(map(dataclasses.is_dataclass, kinds)) and not isinstance(value, tuple(kinds)):
        return decode(_nearest(kinds, value), value, where)
    for hint in kinds:
        try:
            return _fit(hint, value, where)
        except SteerError:
            continue
    names = [", ".join(map(repr, typing.get_args(kind))) or kind.__name__ for kind in kinds]
    names += ["None"] if type(None) in hints else []
    raise SteerError(f"{where} is one of {', '.join(names)}; received {short(value)}.")


def _nearest(kinds: list[Any], value: Any) -> Any:
    """Return the dataclass that an object is one of: its fields say it, and where some are wrong, most of them do."""
    keys = set(value) if isinstance(value, Mapping) else set()
    return min(kinds, key=lambda kind: len(_hints(kind).keys() ^ keys))


def _text(value: Any, where: str) -> str:
    """Return a text that HTML, SVG and UTF-8 can hold.

    Raises:
        SteerError: it is no text, or has control characters or half a surrogate pair.
    """
    if not isinstance(value, str):
        raise SteerError(f"{where} is a text; received {short(value)}.")
    if any((ord(c) < 32 and c not in "\n\t") or 0x7F <= ord(c) < 0xA0 or 0xD800 <= ord(c) < 0xE000 for c in value):
        raise SteerError(f"{where} is a text without control characters; received {short(value)}.")
    if any(ord(c) in (0xFFFE, 0xFFFF) for c in value):
        raise SteerError(f"{where} is a text that XML can hold; received {short(value)}.")
    return str(value)


def _flag(value: Any, where: str) -> bool:
    """Return a truth value.

    Raises:
        SteerError: it is none.
    """
    if not isinstance(value, bool):
        raise SteerError(f"{where} is True or False; received {short(value)}.")
    return value


def _integer(value: Any, where: str) -> int:
    """Return an integer; one of NumPy's becomes Python's.

    Raises:
        SteerError: it is none.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise SteerError(f"{where} is an integer; received {short(value)}.")
    return int(value)


def _number(value: Any, where: str) -> float:
    """Return a number; NaN for None, for infinity and for what is too large.

    Raises:
        SteerError: it is none.
    """
    if value is None:
        return math.nan
    if not _is_number(value):
        raise SteerError(f"{where} is a number (of a tensor: `.item()`); received {short(value)}.")
    finite = _finite(value)
    return math.nan if finite is None else finite


_PLAIN: dict[Any, Callable[[Any, str], Any]] = {str: _text, bool: _flag, int: _integer, float: _number}


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _finite(value: Any) -> float | None:
    """Return a number as a float; None where that is no finite one."""
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _free(value: Any, where: str, depth: int) -> Any:
    """Return free JSON: tuples as lists, paths as texts, and None for numbers that JSON does not have.

    Raises:
        SteerError: JSON has nothing for it, or it is nested too deeply.
    """
    if depth < 0:
        raise SteerError(f"{where[:80]}… is nested more than {_DEEPEST} deep.")
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, (str, os.PathLike)):
        return os.fsdecode(value).encode("utf-8", "replace").decode()
    if isinstance(value, numbers.Integral):
        return int(value)
    if _is_number(value):
        return _finite(value)
    if isinstance(value, Mapping):
        return {_key(key, where): _free(part, f"{where}.{key}", depth - 1) for key, part in value.items()}
    if isinstance(value, (list, tuple, range)):
        return [_free(part, f"{where}[{index}]", depth - 1) for index, part in enumerate(value)]
    raise SteerError(f"{where} is JSON: objects, lists, texts, numbers; received {short(value)}.")


def _key(key: Any, where: str) -> str:
    """Return a key of free JSON; whole numbers, as steps and ranks, become texts.

    Raises:
        SteerError: it is neither a text nor a whole number.
    """
    if isinstance(key, bool) or not isinstance(key, (str, numbers.Integral)):
        raise SteerError(f"{where} has texts as keys; received {short(key)}.")
    return str(key).encode("utf-8", "replace").decode()
