"""What the experiments have in common: options, a ledger of finished runs, and a result that the report reads."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from backbone_cache import default_cache
from residual_steer import SteerError
from residual_steer.report import Picture, Result, Table, Verdict, command_line, machine, versions
from residual_steer.report.markdown import table_markdown
from residual_steer.study import Ledger

LOST = "cannot be said, since a run diverged"


@dataclass(frozen=True)
class Experiment:
    """What an experiment is.

    Attributes:
        name: of its files.
        title: of its section in the report.
        about: what is done, for the report; the script's docstring says the same to who runs it.
        seeds: how many by default.
    """

    name: str
    title: str
    about: str
    seeds: int = 3


@dataclass
class Found:
    """What an experiment found.

    Attributes:
        tables: as in `Result`, like all below.
        plots: in the order of the report.
        verdicts: on the paper's claims.
        settings: what was chosen.
        records: the raw runs.
        seconds: of all runs, those of earlier calls too.
    """

    tables: Sequence[Table]
    plots: Sequence[Picture] = ()
    verdicts: Sequence[Verdict] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    records: Any = None
    seconds: float = 0.0


Body = Callable[[argparse.Namespace, Ledger], Found]


def parser_of(experiment: Experiment, *, cache: bool = False) -> argparse.ArgumentParser:
    """Return a parser with the options that every experiment has.

    Args:
        experiment: which.
        cache: whether it pre-trains backbones, and keeps them in a folder.
    """
    parser = argparse.ArgumentParser(
        description=experiment.about, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--seeds", type=positive, default=experiment.seeds, help="how many seeds, counted from 0")
    parser.add_argument("--rates", type=positive, default=3, help="how many learning rates every method is tried with")
    parser.add_argument("--out", type=Path, default=Path("runs/claims"), help="folder for results and finished runs")
    parser.add_argument("--quick", action="store_true", help="tiny sizes and few steps: a test, no result")
    if cache:
        parser.add_argument("--cache", type=Path, default=default_cache(), help="folder of the pre-trained backbones")
    return parser


def positive(text: str) -> int:
    """Read a positive integer.

    Raises:
        ValueError: it is none; argparse says so.
    """
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number


def run(experiment: Experiment, options: argparse.Namespace, body: Body) -> int:
    """Run an experiment, print its tables and save its result; return the exit status.

    Runs that an earlier call finished are read from the ledger beside the result.
    """
    started = time.perf_counter()
    try:
        ledger = Ledger(options.out / f"{experiment.name}.ledger.jsonl")
        known = len(ledger)
        if known:
            print(f"{experiment.name}: {known} finished runs are read from {ledger.path}", flush=True)
        found = body(options, ledger)
        for table in found.tables:
            print(f"\n{table.title}\n\n{printed(table)}")
        for verdict in found.verdicts:
            print(f"\nclaim {verdict.claim}: {verdict.verdict}. {verdict.ours}")
        path = options.out / f"{experiment.name}.json"
        result_of(experiment, options, found).save(path)
        print(f"\n{time.perf_counter() - started:.0f} s; the result is {path}")
    except SteerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def result_of(experiment: Experiment, options: argparse.Namespace, found: Found) -> Result:
    """Return the result, with what is needed to get it again."""
    return Result(
        name=experiment.name,
        title=experiment.title,
        about=experiment.about,
        command=command_line(),
        seeds=tuple(range(options.seeds)),
        settings={"quick": options.quick, **found.settings},
        machine=machine("cuda" if torch.cuda.is_available() else "cpu"),
        versions=versions(),
        tables=tuple(found.tables),
        plots=tuple(found.plots),
        verdicts=() if options.quick else tuple(found.verdicts),
        seconds=round(found.seconds, 1),
        records=found.records,
    )


def printed(table: Table) -> str:
    """Return a table for the screen."""
    return "\n\n".join(table_markdown(table)[1:])
