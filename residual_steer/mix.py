"""The mix: which fields act, on which rows of a batch, how strongly."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from numbers import Real

from .errors import SteerError

__all__ = ["OFF", "Asked", "Mix", "row_factor"]

Asked = str | Mapping[str, float] | Sequence[str | None] | None


@dataclass(frozen=True)
class Mix:
    """What `use` was asked for, as a table of coefficients.

    Attributes:
        names: the fields with a coefficient other than 0, in the order in which the model got them.
        table: coefficients, `(rows, len(names))`; one row stands for all rows of any batch.
        rows: number of rows, where the mix was given row by row; None where one row stands for all.
        by_name: whether it was given as a name or None.
    """

    names: tuple[str, ...] = ()
    table: tuple[tuple[float, ...], ...] = ((),)
    rows: int | None = None
    by_name: bool = True

    @classmethod
    def parse(cls, asked: Asked, known: Iterable[str]) -> Mix:
        """Turn what a user says into a table.

        Args:
            asked: None, a name, weights by name, or a name or None for every row.
            known: the model's fields.

        Raises:
            SteerError: it is none of these, names no field of the model, is empty, or has a weight that is no finite
                number.
        """
        known = tuple(known)
        if asked is None or isinstance(asked, str):
            return cls() if asked is None else cls((_known(asked, known),), ((1.0,),))
        if isinstance(asked, Mapping):
            weights = {_known(name, known): _weight(name, weight) for name, weight in asked.items()}
            names = tuple(name for name in known if weights.get(name))
            return cls(names, (tuple(weights[name] for name in names),), by_name=False)
        if not isinstance(asked, Sequence) or isinstance(asked, (bytes, bytearray)):
            raise SteerError(
                "`use` takes None, a field's name, weights {name: weight}, or a list with a name or None for every row "
                f"of the batch; received {asked!r}."
            )
        rows = [None if name is None else _known(name, known) for name in asked]
        if not rows:
            raise SteerError("a list for `use` has a name or None for every row of the batch; received an empty one.")
        names = tuple(name for name in known if name in set(rows))
        table = tuple(tuple(float(row == name) for name in names) for row in rows)
        return cls(names, table, rows=len(rows), by_name=False)

    @property
    def alone(self) -> str | None:
        """The one field that acts with weight 1 on every row, if that is all there is."""
        return self.names[0] if len(self.names) == 1 and set(self.table) == {(1.0,)} else None

    @property
    def differs(self) -> bool:
        """Whether some rows of a batch meet other fields than other rows do."""
        return len(set(self.table)) > 1

    @cached_property
    def columns(self) -> dict[str, tuple[float, ...]]:
        """The coefficients of each field that acts, one for every row of the table."""
        return dict(zip(self.names, zip(*self.table, strict=True), strict=True))

    def asked(self) -> Asked:
        """Return what `use` takes to select this mix again."""
        if self.rows is not None:
            return [next((name for name, on in zip(self.names, row, strict=True) if on), None) for row in self.table]
        if self.by_name:
            return self.alone
        return dict(zip(self.names, self.table[0], strict=True))

    def __str__(self) -> str:
        """Write it briefly, with rows counted rather than listed."""
        if self.rows is None:
            return str(self.alone) if self.by_name else repr(self.asked())
        counts = [f"{int(sum(self.columns[name]))} {name}" for name in self.names]
        silent = sum(not any(row) for row in self.table)
        return f"rows: {', '.join(counts + [f'{silent} None'] * bool(silent))}"


OFF = Mix()


def row_factor(rows: int, batch: int) -> int:
    """Return how many consecutive rows of a batch one row of a table stands for.

    It is 1, or more where each row was repeated in place: by `generate` for beams and `num_return_sequences`, by models
    that flatten `(rows, choices)` or `(rows, tokens)` into one dimension. A table of one row stands for all.

    Raises:
        SteerError: the batch has no multiple of that many rows.
    """
    if batch % rows:
        raise SteerError(
            f"the list given to `use` has {rows} rows, and this batch has {batch}. Give one name or None for every row."
        )
    return batch // rows


def _known(name: object, known: tuple[str, ...]) -> str:
    if not isinstance(name, str) or name not in known:
        raise SteerError(f"`use` takes names of fields of this model ({', '.join(known)}); received {name!r}.")
    return name


def _weight(name: str, weight: object) -> float:
    if isinstance(weight, bool) or not isinstance(weight, Real) or not math.isfinite(weight):
        raise SteerError(f"the weight of a field is a finite number; received {weight!r} for {name!r}.")
    return float(weight)
