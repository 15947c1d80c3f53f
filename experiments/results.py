"""What an experiment found: tables, pictures and verdicts, as JSON, with everything that is needed to get it again."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from benchmarks.charts import Axis, Measured, Plot, Series
from benchmarks.environment import portable, read_json
from residual_steer import SteerError
from residual_steer._files import make_folder, write_whole

__all__ = [
    "Arrows",
    "Axis",
    "Column",
    "Flow",
    "Matrix",
    "Measured",
    "Picture",
    "Plot",
    "Result",
    "Series",
    "Surface",
    "Table",
    "Trajectory",
    "Verdict",
    "decode",
    "encode",
    "is_result",
]

T = TypeVar("T")
FORMAT, FORMAT_VERSION = "residual_steer.result", 1
VERDICTS = ("holds", "does not hold", "partly holds", "not run here", "can't be tested here")
_MOVED = {"compare_transformer_mamba.py --baselines": "compare_methods"}  # where the scripts of older results are now


@dataclass(frozen=True)
class Column:
    """A column of a table."""

    key: str  # of its cells in the rows
    label: str  # its head
    unit: str = ""  # shown behind the label
    # whether larger ("up") or smaller ("down") numbers are better, whose best is marked; None for neither
    better: Literal["up", "down"] | None = None
    digits: int = 3  # behind the decimal point, of all its numbers but integers


@dataclass(frozen=True)
class Table:
    """A table; its first column names the rows, whose cells are texts, numbers, `Measured` or None, by column."""

    title: str
    columns: tuple[Column, ...]
    rows: tuple[Mapping[str, str | int | float | Measured | None], ...]
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        keys = [column.key for column in self.columns]
        strange = {key for row in self.rows for key in row} - set(keys)
        if len(set(keys)) < len(keys) or strange:
            raise SteerError(f"rows of {self.title!r} have cells for {', '.join(keys)}; received {', '.join(strange)}.")


@dataclass(frozen=True)
class Matrix:
    """A heat map: one row of values for each of `rows`, with a value, or None, for each of `columns`."""

    title: str
    x: Axis
    y: Axis
    z: Axis
    columns: tuple[str, ...]
    rows: tuple[str, ...]
    values: tuple[tuple[float | None, ...], ...]
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check_shape(self.title, self.values, self.rows, self.columns)


@dataclass(frozen=True)
class Trajectory:
    """A path over a surface, from its start to its end."""

    name: str
    x: tuple[float, ...]
    y: tuple[float, ...]


@dataclass(frozen=True)
class Surface:
    """Contours over a plane, one row of values for each of `up`, with paths over them: the left of figure 1."""

    title: str
    x: Axis
    y: Axis
    z: Axis
    across: tuple[float, ...]
    up: tuple[float, ...]
    values: tuple[tuple[float, ...], ...]
    paths: tuple[Trajectory, ...] = ()
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check_shape(self.title, self.values, self.up, self.across)


@dataclass(frozen=True)
class Flow:
    """Arrows of one panel, from (x, y) by (dx, dy); each may have a group, which colours it."""

    name: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    dx: tuple[float, ...]
    dy: tuple[float, ...]
    groups: tuple[str, ...] = ()


@dataclass(frozen=True)
class Arrows:
    """Fields of arrows beside each other, with the same limits and the same scale."""

    title: str
    x: Axis
    y: Axis
    panels: tuple[Flow, ...]
    notes: tuple[str, ...] = ()


Picture = Plot | Matrix | Surface | Arrows


@dataclass(frozen=True)
class Verdict:
    """What a result says about one of the paper's claims."""

    claim: int  # its number, as claims.toml lists them
    verdict: str  # one of `VERDICTS`
    paper: str  # the paper's number that this is held against
    ours: str  # what was measured here, with spread and seeds
    command: str  # that measures it again
    missing: str = ""  # what a fuller test would need

    def __post_init__(self) -> None:
        if self.verdict not in VERDICTS or not 1 <= self.claim <= 10:
            raise SteerError(
                f"a verdict on a claim, 1 to 10, is one of {', '.join(VERDICTS)}; "
                f"received {self.verdict!r} on {self.claim}."
            )


@dataclass(frozen=True)
class Result:
    """Everything that one experiment found."""

    name: str  # of its files: small letters and digits, with `-`, `_` or `.` between them
    title: str  # of its section in the report
    about: str  # what was done, in a few sentences; blank lines part paragraphs
    command: str  # that does it again; see `command_line`
    seeds: tuple[int, ...]  # that were run
    settings: Mapping[str, Any]  # what was chosen, as JSON
    machine: Mapping[str, Any]  # where it ran; see `machine`
    versions: Mapping[str, str]  # of Python and packages; see `versions`
    tables: tuple[Table, ...] = ()  # what was found, in numbers
    plots: tuple[Picture, ...] = ()  # what was found, in pictures
    verdicts: tuple[Verdict, ...] = ()  # on claims of the paper
    seconds: float = 0.0  # wall-clock time of the whole
    records: Any = None  # the raw runs, as any JSON; not shown in the report

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z0-9]+([-_.][a-z0-9]+)*", self.name):
            raise SteerError(
                f"a result's name is small letters and digits, with -, _ or . between them; received {self.name!r}."
            )

    def save(self, path: Path) -> None:
        """Write it as JSON, whole or not at all; paths of this machine are cut to their last names."""
        content = {"format": FORMAT, "format_version": FORMAT_VERSION, **portable(encode(self))}
        try:
            text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise SteerError(f"{self.name!r} holds what JSON has not: {error}.") from error
        make_folder(path.parent)
        write_whole({path: f"{text}\n".encode()})

    @classmethod
    def load(cls, path: Path) -> Result:
        """Read what `save` wrote; commands of scripts that have moved name their new place."""
        content = read_json(path)
        if not is_result(content):
            raise SteerError(f'{path} is no result: it needs an object with "format": "{FORMAT}".')
        if content["format_version"] != FORMAT_VERSION:
            raise SteerError(f"{path} is of version {content['format_version']}; this reads version {FORMAT_VERSION}.")
        return decode(cls, {k: _moved(v) for k, v in content.items() if not k.startswith("format")}, str(path))


def is_result(content: Any) -> bool:
    """Return whether JSON says that it is a result."""
    return isinstance(content, dict) and content.get("format") == FORMAT and "format_version" in content


def encode(value: Any) -> Any:
    """Return dataclasses as JSON; NaN and infinities, which it does not have, become None."""
    if dataclasses.is_dataclass(value):
        return {field.name: encode(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): encode(part) for key, part in value.items()}
    if isinstance(value, (list, tuple, range)):
        return [encode(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def decode(cls: Callable[..., T], value: Any, where: str) -> T:
    """Return the dataclass that `encode` wrote."""
    hints = typing.get_type_hints(cls)
    if not isinstance(value, Mapping) or value.keys() != hints.keys():
        found = ", ".join(map(str, value)) if isinstance(value, Mapping) else repr(value)[:80]
        raise SteerError(f"{where} needs the fields {', '.join(hints)}; received {found}.")
    return cls(**{name: _fit(hint, value[name], f"{where}.{name}") for name, hint in hints.items()})


def _fit(hint: Any, value: Any, where: str) -> Any:
    """Return JSON as a type hint says; null is NaN where a number has to be."""
    kind, inner = typing.get_origin(hint) or hint, typing.get_args(hint)
    if kind is Any or (kind is typing.Literal and value in inner):
        return value
    if kind in (typing.Union, types.UnionType):
        return _fit_one_of(inner, value, where)
    if kind is tuple and isinstance(value, list):
        return tuple(_fit(inner[0], part, f"{where}[{index}]") for index, part in enumerate(value))
    if dataclasses.is_dataclass(kind):
        return decode(typing.cast("Callable[..., Any]", kind), value, where)
    if isinstance(value, Mapping) and not isinstance(kind, str) and issubclass(kind, Mapping):
        return {key: _fit(inner[1], part, f"{where}.{key}") for key, part in value.items()}
    if kind is float and (value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))):
        return math.nan if value is None else float(value)
    if kind in (str, int, bool) and type(value) is kind:
        return value
    raise SteerError(f"{where} is {getattr(kind, '__name__', kind)}; received {repr(value)[:80]}.")


def _fit_one_of(hints: Sequence[Any], value: Any, where: str) -> Any:
    """Return JSON as the one of several types that has its fields, or as the first that it is."""
    if value is None and type(None) in hints:
        return None
    if isinstance(value, Mapping):
        for hint in filter(dataclasses.is_dataclass, hints):
            if value.keys() == typing.get_type_hints(hint).keys():
                return decode(hint, value, where)
    for hint in hints:
        if hint is type(value) or typing.get_origin(hint) is Literal or (hint is float and type(value) is int):
            return _fit(hint, value, where)
    raise SteerError(f"{where} is none of {', '.join(map(str, hints))}; received {repr(value)[:80]}.")


def _moved(value: Any) -> Any:
    """Return JSON in whose texts `python examples/NAME.py` is `python -m experiments.NAME`."""
    if isinstance(value, str):
        for old, new in _MOVED.items():
            value = value.replace(f"python examples/{old}", f"python -m experiments.{new}")
        return re.sub(r"python examples/(\w+)\.py", r"python -m experiments.\1", value)
    if isinstance(value, dict):
        return {key: _moved(part) for key, part in value.items()}
    return [_moved(part) for part in value] if isinstance(value, list) else value


def _check_shape(title: str, values: Sequence[Sequence[Any]], rows: Sequence[Any], columns: Sequence[Any]) -> None:
    """Check that there is a row of values for each of `rows`, with one for each of `columns`."""
    if not columns or not rows or [len(row) for row in values] != [len(columns)] * len(rows):
        raise SteerError(
            f"{title!r} has {len(rows)} rows of {len(columns)} values; received {[len(row) for row in values]}."
        )
