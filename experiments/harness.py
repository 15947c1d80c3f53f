"""What the experiments have in common: options, a ledger of finished runs, and a result that the report reads."""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.environment import command_line, machine, versions
from residual_steer import SteerError

from .backbones import default_cache
from .cells import table_markdown
from .ledger import Ledger
from .paired import Difference
from .results import Picture, Result, Table, Verdict

__all__ = ["LOST", "Experiment", "Found", "judged", "parser_of", "positive", "run"]

LOST = "cannot be said, since a run diverged"


@dataclass(frozen=True)
class Experiment:
    """What an experiment is."""

    name: str  # of its files
    title: str  # of its section in the report
    about: str  # what is done, for the report; the script's docstring says the same to who runs it
    seeds: int = 3  # how many by default


@dataclass
class Found:
    """What an experiment found; `settings`, `records` and `seconds`, of all runs, as in `Result`."""

    tables: Sequence[Table]
    plots: Sequence[Picture] = ()
    verdicts: Sequence[Verdict] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    records: Any = None
    seconds: float = 0.0


Body = Callable[[argparse.Namespace, Ledger], Found]


def parser_of(experiment: Experiment, *, cache: bool = False, hub: bool = False) -> argparse.ArgumentParser:
    """Return a parser with the options that every experiment has.

    Args:
        experiment: which.
        cache: whether it pre-trains backbones, and keeps them in a folder.
        hub: whether it trains models of the Hub, for which a precision and processes that read data are chosen.
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
    if hub:
        parser.add_argument("--precision", choices=("no", "bf16", "fp16"), default="no", help="autocast in training")
        parser.add_argument("--workers", type=int, default=0, help="processes that read data")
    return parser


def positive(text: str) -> int:
    """Read a positive integer; argparse turns the ValueError of another into a message."""
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number


def judged(won: Sequence[bool]) -> str:
    """Return the verdict on a claim by whether each comparison was won."""
    return "holds" if won and all(won) else "partly holds" if any(won) else "does not hold"


def told(change: Difference | None) -> str:
    """Write a difference; None is one that a run that diverged has taken away."""
    return str(change or LOST)


def run(experiment: Experiment, options: argparse.Namespace, body: Body) -> int:
    """Run an experiment, print its tables and save its result; return the exit status.

    Runs that an earlier call finished are read from the ledger beside the result. A test gives no verdicts.
    """
    quiet_libraries()
    started = time.perf_counter()
    try:
        ledger = Ledger(options.out / f"{experiment.name}.ledger.jsonl")
        if known := len(ledger):
            print(f"{experiment.name}: {known} finished runs are read from {ledger.path}", flush=True)
        found = body(options, ledger)
        for table in found.tables:
            print(f"\n{table.title}\n\n{table_markdown(table)}")
        for verdict in found.verdicts:
            print(f"\nclaim {verdict.claim}: {verdict.verdict}. {verdict.ours}")
        path = options.out / f"{experiment.name}.json"
        Result(
            name=experiment.name,
            title=experiment.title,
            about=experiment.about,
            command=command_line(),
            seeds=tuple(range(options.seeds)),
            settings={"quick": options.quick, **found.settings},
            machine=machine(),
            versions=versions(),
            tables=tuple(found.tables),
            plots=tuple(found.plots),
            verdicts=() if options.quick else tuple(found.verdicts),
            seconds=round(found.seconds, 1),
            records=found.records,
        ).save(path)
        print(f"\n{time.perf_counter() - started:.0f} s; the result is {path}")
    except SteerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def quiet_libraries() -> None:
    """Keep the notes and progress bars of transformers, datasets and the Hub's client out of ours."""
    with contextlib.suppress(ImportError):
        import huggingface_hub

        huggingface_hub.logging.set_verbosity_error()
    with contextlib.suppress(ImportError):
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
    with contextlib.suppress(ImportError):
        import datasets

        datasets.logging.set_verbosity_error()
        datasets.disable_progress_bars()
