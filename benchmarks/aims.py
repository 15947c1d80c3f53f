"""What was aimed at, beside what was measured, with a verdict in words that is computed, never written by hand."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from closer import interval
from methods import CHEAPEST, FLOOR, FROZEN, OURS
from rounds import Rounds, Spread, spread
from shapes import SHAPES
from startup import AIMS as START
from startup import WHAT as STARTED

__all__ = ["Aim", "against_lora", "aims_of", "closer", "judged"]

STEP, SAVED, PREFILL, DECODE = 1.03, 1.02, 1.02, 1.05
PREFIX, EXPONENT, MEMORY, FALLBACK = 0.55, 1.15, 24, 15
COUNTS = {"saved": "saved bytes", "peak": "peak memory", "flops": "FLOPs", "trainable": "trainable parameters"}


@dataclass(frozen=True)
class Aim:
    """A line of the table of aims.

    Attributes:
        what: is measured.
        aim: in words.
        measured: with its spread; empty where nothing was.
        verdict: in words.
    """

    what: str
    aim: str
    measured: str
    verdict: str


def judged(found: Spread, bound: float, *, least: bool = False) -> str:
    """Say whether a median with its quartiles keeps to a bound.

    Args:
        found: what was measured.
        bound: the aim.
        least: whether the aim is to be at least that; else at most.
    """
    median, low, high = found.median, found.low, found.high
    if least:
        median, low, high, bound = -median, -high, -low, -bound
    if high <= bound:
        return "met"
    if low > bound:
        return "not met"
    return f"{'met' if median <= bound else 'not met'} by the median, the rest on both sides"


def aims_of(records: Mapping[str, Any]) -> list[Aim]:
    """Return every aim.

    Args:
        records: the JSON files by the names of their files, without `.json`.
    """
    found = []
    for name in SHAPES:
        record = records.get(f"cost-{name}-cpu")
        found += list(_costs(name, closer(records, name)) if record else _missing(f"{name}: cost"))
    for name in SHAPES:
        record = records.get(f"prefix-{name}-cpu")
        if record:
            later = spread(record["later"])
            verdict = judged(later, PREFIX)
            if verdict != "met" and "bound" in record:
                verdict += f"; by count of blocks it is {record['bound']:.3f} at least"
            found.append(Aim(f"{name}: epoch with a cached prefix", f"≤ {PREFIX}", f"{later:.3f}", verdict))
        else:
            found += _missing(f"{name}: epoch with a cached prefix")
    ssm, start = records.get("ssm-cpu"), records.get("startup-cpu")
    found += list(_ssm(ssm)) if ssm else _missing("an SSM on a CPU")
    found += list(_start(start)) if start else _missing("beginning")
    return found


def closer(records: Mapping[str, Any], name: str) -> Any:
    """Return a backbone's costs, with the times of `closer.py` where it was run."""
    record, times = records[f"cost-{name}-cpu"], records.get(f"closer-{name}-cpu", {}).get("times", {})
    return {**record, "times": {**record["times"], **times}}


def _missing(what: str) -> list[Aim]:
    return [Aim(what, "–", "", "not run")]


def _costs(name: str, record: Mapping[str, Any]) -> Iterator[Aim]:
    counts, times = record["counts"], record["times"]
    saved = counts[OURS]["saved"] / counts[FLOOR]["saved"]
    verdict = "met" if saved <= SAVED else "not met"
    yield Aim(f"{name}: bytes saved for backward ÷ floor", f"≤ {SAVED}", f"{saved:.3f}", verdict)
    for column, rows in times.items():
        bound = STEP if column == "step" else PREFILL if column == "prefill" else DECODE
        own = Spread(**rows[OURS].get("interval", rows[OURS]["ratio"]))
        yield Aim(f"{name}: {column} ÷ {rows[OURS]['reference']}", f"≤ {bound}", f"{own:.3f}", judged(own, bound))


def _ssm(record: Mapping[str, Any]) -> Iterator[Aim]:
    slope, gib = spread(record["exponents"]), record["memory"] / 2**30
    fallback = record["fallback"]
    slow = Spread(**fallback["rows"]["1"]["fallback"]["ratio"])
    lengths = list(record["times"])
    what = f"mamba: a step grows as length to the power of, {lengths[0]} to {lengths[-1]}"
    yield Aim(what, f"≤ {EXPONENT}", f"{slope:.3f}", judged(slope, EXPONENT))
    verdict = "met" if gib < MEMORY else "not met"
    yield Aim(f"mamba: memory of the process at {lengths[-1]}", f"< {MEMORY} GiB", f"{gib:.1f} GiB", verdict)
    what = f"mamba: transformers' fallback ÷ the scan at {fallback['at']} tokens, {fallback['blocks']} blocks"
    yield Aim(what, f"≥ {FALLBACK}", f"{slow:.1f}", judged(slow, FALLBACK, least=True))


def _start(record: Mapping[str, Any]) -> Iterator[Aim]:
    for name, found in record["seconds"].items():
        time = Spread(*(1000 * found[key] for key in ("median", "low", "high")))
        bound = 1000 * START[name]
        yield Aim(f"{STARTED[name]}, ms", f"≤ {bound:.0f}", f"{time:.0f}", judged(time, bound))


def against_lora(record: Mapping[str, Any]) -> dict[str, list[str]]:
    """Sort the columns of a backbone's table into those where H-Res beside the block is ahead of LoRA, and the others.

    Times are compared within rounds; a difference is seen where the whole interval of the median lies on one side of 1,
    or both quartiles do.
    """
    found: dict[str, list[str]] = {"ahead": [], "behind": [], "no difference seen": []}
    if CHEAPEST not in record["counts"]:
        return found
    own, other = (record["counts"][name] for name in (OURS, CHEAPEST))
    for key, label in COUNTS.items():
        place = "ahead" if own[key] < other[key] else "behind" if own[key] > other[key] else "no difference seen"
        found[place].append(f"{label} ({own[key] / other[key]:.2f})")
    extra = [record["launched"][name] - record["launched"][FROZEN] for name in (OURS, CHEAPEST)]
    place = "ahead" if extra[0] < extra[1] else "behind" if extra[0] > extra[1] else "no difference seen"
    found[place].append(f"operations added to a forward pass ({extra[0]} and {extra[1]})")
    for column, rows in record["times"].items():
        if CHEAPEST not in rows:
            continue
        rounds = Rounds({name: row["rounds"] for name, row in rows.items()})
        ratio = rounds.ratio(OURS, CHEAPEST)
        if "interval" in rows[OURS]:
            ratio = interval(rounds.ratios(OURS, CHEAPEST))
        place = "ahead" if ratio.high < 1 else "behind" if ratio.low > 1 else "no difference seen"
        found[place].append(f"{column} ({ratio:.3f})")
    return found
