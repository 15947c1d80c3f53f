"""The aims beside what was measured on a card: a table, a JSON file, and a section of BENCHMARKS.md."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from aims import judged
from methods import CHEAPEST, FLOOR, IN_BF16, OURS
from output import markdown
from rounds import Spread

from .part import Job, run_part

__all__ = ["aims_of", "read", "section", "write_page"]

ROOT = Path(__file__).parents[2]
STEP, SAVED, DECODE = 1.03, 1.02, 1.02
COUNTS = {"trainable": "trainable parameters", "saved": "saved bytes", "peak": "peak memory"}
HEADS = ("what", "aim", "measured", "verdict", "÷ LoRA, not merged", "ahead of it", "fields in bf16")
SHOWN = 3  # failures of a part; all are in its JSON file


def aims_of(records: Mapping[str, Any]) -> Iterator[list[str]]:
    """Give a row for every column of every backbone, as `HEADS` calls it; a verdict where there is an aim."""
    for name, found in (
        (name, found) for record in records.values() for name, found in record.get("found", {}).items()
    ):
        counts = found.get("counts", {})
        for key, label in COUNTS.items() if {OURS, FLOOR} <= counts.keys() else ():
            own, least, peer = (counts.get(method, {}).get(key) for method in (OURS, FLOOR, CHEAPEST))
            what, against = (f"{label} ÷ floor", least) if least else (label, None)
            yield _row(f"{name}: {what}", SAVED if key == "saved" else None, own, against, peer)
        for column, rows in found.get("times", {}).items():
            aim = STEP if column.startswith("step") else DECODE if column.endswith("graph") else None
            own, peer = Spread(**rows[OURS]["interval"]), rows[OURS].get("against LoRA")
            cast = f"{rows[IN_BF16]['interval']['median']:.3f}" if IN_BF16 in rows else "–"
            yield [*_verdicts(f"{name}: {column} ÷ {rows[OURS]['reference']}", aim, own, peer and Spread(**peer)), cast]


def _row(what: str, aim: float | None, own: int, least: int | None, peer: int | None) -> list[str]:
    exact = Spread(*[own / (least or 1)] * 3)
    cells = _verdicts(what, aim, exact, peer and Spread(*[own / peer] * 3))
    return [*cells[:2], f"{exact.median:.3f}" if least else f"{own:,}", *cells[3:], "–"]


def _verdicts(what: str, aim: float | None, own: Spread, peer: Any) -> list[str]:
    cells = [what, *(("–", f"{own:.3f}", "–") if aim is None else (f"≤ {aim}", f"{own:.3f}", judged(own, aim)))]
    if not peer:
        return [*cells, "–", "–"]
    return [*cells, f"{peer:.3f}", "yes" if peer.high < 1 else "no" if peer.low > 1 else "no difference seen"]


def read(folder: Path) -> dict[str, Any]:
    """Return what the parts left, by name."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json")) if path.stem != "summary"}


def section(records: Mapping[str, Any]) -> str:
    """Return one card's results as Markdown."""
    about = next(iter(records.values()))
    rehearsal = ": A REHEARSAL, NO RESULT" if any(record["quick"] for record in records.values()) else ""
    parts = [f"### {about['machine']['gpu'] or about['machine']['cpu']}{rehearsal}"]
    parts.append(f"{', '.join(f'{name} {version}' for name, version in about['versions'].items())}.")
    lines = []
    for name, record in records.items():
        wrong = [*record.get("wrong", []), *filter(None, [record.get("error")])]
        counts = "".join(f", {number} {outcome}" for outcome, number in record.get("counts", {}).items())
        lines.append(f"- {name}: {record['status']}{counts}{f', {len(wrong)} wrong' if wrong else ''}")
        lines += [f"  - {' '.join(line.split())[:200]}" for line in wrong[:SHOWN]]
        lines += [f"  - and {len(wrong) - SHOWN} more"] * (len(wrong) > SHOWN)
    parts.append("\n".join(lines))
    if rows := list(aims_of(records)):
        parts.append(markdown(HEADS, rows))
    for number, found in records.get("many", {}).get("held", {}).items():
        times = "; ".join(f"{name} {row['ratio']['median']:.3f}" for name, row in found["times"].items())
        parts.append(f"{number} fields held, a batch ÷ the frozen model's: {times}.")
    return "\n\n".join(parts)


def write_page(page: Path, results: Path) -> bool:
    """Put the results of all cards before the tables of costs in a page's section; rehearsals leave it as it is."""
    parts = []
    for folder in sorted(path for path in results.glob("*") if path.is_dir()):
        records = read(folder)
        if records and not any(one["quick"] for one in records.values()):
            notes = [path.read_text().strip() for path in folder.glob("notes.md")]  # what a reader has to know
            parts += [section(records), *notes]
    if parts:
        text = "\n\n".join(["## On a GPU", "Made by `make gpu` from `benchmarks/results/gpu`.", *parts]) + "\n"
        old = page.read_text()
        new, there = re.subn(r"^## On a GPU\n.*?(?=^## |^### cost-|\Z)", lambda _: f"{text}\n", old, flags=re.M | re.S)
        page.write_text((new if there else f"{old}\n{text}").rstrip() + "\n")
    return bool(parts)


def work(job: Job) -> None:
    """Sum a folder up, and show it."""
    records = read(Path(job.subjects[0]))
    aims = [dict(zip(HEADS, row, strict=True)) for row in aims_of(records)]
    job.save(aims=aims, parts={name: record["status"] for name, record in records.items()})
    print(section(records))
    if write_page(ROOT / "BENCHMARKS.md", ROOT / "benchmarks" / "results" / "gpu"):
        print("BENCHMARKS.md has the results of benchmarks/results/gpu now")


if __name__ == "__main__":
    sys.exit(run_part(work))
