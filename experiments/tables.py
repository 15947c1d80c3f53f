"""From the entries of a study to the tables and plots of a report."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from residual_steer import SteerError

from .paired import Difference, difference
from .problem import Problem
from .results import Axis, Column, Measured, Plot, Series, Table
from .sweep import Entry

__all__ = ["bars", "comparison", "gap", "measured", "records", "sweeps"]


def measured(entry: Entry, metric: str, *, scale: float = 1.0, merged: bool = False) -> Measured | None:
    """Return what an entry reached on test data over its seeds; None if it was refused, or a seed has no finite one.

    Args:
        entry: one method.
        metric: which score.
        scale: what to multiply it by, such as 100 for percent.
        merged: LoRA's scores after it was folded into the weights.

    Raises:
        SteerError: there is no such score.
    """
    values = entry.results(metric, merged=merged)
    return Measured.of([scale * value for value in values]) if values and all(map(math.isfinite, values)) else None


def gap(entries: Sequence[Entry], one: str, other: str, metric: str, *, scale: float = 1.0) -> Difference | None:
    """Return how much more one method reached than another on the same seeds; None where that cannot be said.

    Args:
        entries: the methods, these two among them.
        one: a method's name.
        other: another's.
        metric: which score.
        scale: what to multiply it by.

    Raises:
        SteerError: there is no such method, or no such score.
    """
    found = {entry.arm.name: entry for entry in entries}
    for name in (one, other):
        if name not in found:
            raise SteerError(f"a method is one of {', '.join(found)}; received {name!r}.")
    pair = [[scale * value for value in found[name].results(metric)] for name in (one, other)]
    whole = all(values and all(map(math.isfinite, values)) for values in pair)
    return difference(*pair) if whole else None


def comparison(
    title: str,
    problem: Problem,
    entries: Sequence[Entry],
    column: Column,
    *,
    scale: float = 1.0,
    merged: bool = False,
    timed: bool = True,
) -> Table:
    """Return a table with a row for every method.

    Args:
        title: above it.
        problem: what they were compared on.
        entries: the methods.
        column: how the problem's metric is shown; its key is the metric's name.
        scale: what to multiply it by.
        merged: whether LoRA gets a second row, for its weights folded in.
        timed: whether to show the time of a step, which says something where all ran alike, one after the other.

    Raises:
        SteerError: the metric is none of the scores.
    """
    columns = (
        Column("method", "method"),
        Column("trainable", "trainable parameters"),
        Column("share", "share of all", "%", digits=2),
        Column("rate", "learning rate", digits=5),
        column,
        *([Column("step", "time of a step", "ms", digits=1)] if timed else []),
    )
    rows: list[dict[str, Any]] = []
    for entry in entries:
        sizes = {key: value for key, value in _sizes(entry).items() if timed or key != "step"}
        rows.append({"method": entry.arm.name, **sizes, column.key: measured(entry, column.key, scale=scale)})
        if merged and entry.results(column.key, merged=True):
            value = measured(entry, column.key, scale=scale, merged=True)
            rows.append({"method": f"{entry.arm.name}, merged", column.key: value})
    return Table(title, columns, tuple(rows), tuple(_notes(problem, entries)))


def sweeps(title: str, problem: Problem, entries: Sequence[Entry], column: Column, *, scale: float = 1.0) -> Table:
    """Return a table of what every rate gave on validation data, with the first seed; arguments as in `comparison`."""
    rates = sorted({run.rate for entry in entries for run in entry.trials})
    columns = [Column(f"{rate:g}", f"{rate:g}", column.unit, digits=column.digits) for rate in rates]
    rows = []
    for entry in entries:
        found = {f"{run.rate:g}": None if run.valid is None else scale * run.valid[column.key] for run in entry.trials}
        rows.append({"method": entry.arm.name, **found})
    notes = (f"Validation data, first seed: {column.label}. A dash in a sweep is a run that diverged.",)
    return Table(title, (Column("method", "method"), *columns), tuple(rows), notes)


def bars(
    title: str, axes: tuple[Axis, Axis], results: Mapping[str, Sequence[Entry]], metric: str, *, scale: float = 1.0
) -> Plot:
    """Return a chart of what every method reached on every problem, which are named."""
    found: dict[str, dict[str, Measured | None]] = {}
    for problem, entries in results.items():
        for entry in entries:
            found.setdefault(entry.arm.name, {})[problem] = measured(entry, metric, scale=scale)
    series = tuple(Series(name, tuple(values), tuple(values.values())) for name, values in found.items())
    return Plot(title, "bars", *axes, series)


def records(problem: Problem, entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """Return every run as plain values, those that chose the learning rate included; a refusal with its reason."""
    found = []
    for entry in entries:
        about: dict[str, Any] = {"problem": problem.name, "method": entry.arm.name, "options": dict(entry.arm.options)}
        if entry.refused:
            found.append({**about, "refused": entry.refused})
        found += [{**about, "chosen": run.rate == entry.rate, **vars(run)} for run in entry.every]
    return found


def _sizes(entry: Entry) -> dict[str, Any]:
    if not entry.trials:
        return {}
    run = entry.trials[0]
    seconds = [run.seconds_per_step for run in entry.runs if run.seconds_per_step is not None]
    return {
        "trainable": run.trainable,
        "share": 100 * run.trainable / run.total,
        "rate": None if entry.rate is None else f"{entry.rate:g}",
        "step": 1000 * statistics.median(seconds) if seconds else None,
    }


def _notes(problem: Problem, entries: Sequence[Entry]) -> list[str]:
    tried = sorted({len(entry.arm.rates) for entry in entries if not entry.refused}) or [0]
    seeds = max((len(entry.runs) for entry in entries), default=0)
    rates = f"{tried[0]} to {tried[-1]}" if len(tried) > 1 else str(tried[0])
    again = "" if problem.retrain is None else ", where training takes the validation data too"
    notes = [
        f"Steps for every method: {problem.steps}. Learning rates tried with the first seed: {rates}; the best on "
        f"validation data is used with every seed, of which there are {seeds}{again}. Measured on test data."
    ]
    notes += [f"{entry.arm.name}: {entry.refused}" for entry in entries if entry.refused]
    edge = [f"{entry.arm.name} ({entry.rate:g})" for entry in entries if entry.at_edge]
    if edge:
        notes.append(f"Best at the edge of the rates tried, so that a better one may lie beyond: {', '.join(edge)}.")
    lost = [entry.arm.name for entry in entries if not entry.refused and entry.rate is None]
    if lost:
        notes.append(f"Diverged at every learning rate: {', '.join(lost)}.")
    partly = {entry.arm.name: sum(map(math.isnan, entry.results(problem.metric))) for entry in entries}
    if any(partly.values()):
        counted = ", ".join(f"{name} ({number})" for name, number in partly.items() if number)
        notes.append(f"Diverged with some of the seeds at the best learning rate, so that it has no number: {counted}.")
    return notes
