"""Runs of `placement`, many at once: what it then finds in its ledger, and does not do again.

    OMP_NUM_THREADS=1 python -m experiments.ahead --processes 16 --minutes 4 --out runs/claims

Small models gain nothing from a second thread, nor from a GPU, so every core takes a run of its own. Those that decide
come first: the places that compete for a family's default, LoRA and the head, at the rates around the best, with all
seeds. A call that is cut off leaves what it finished. Needs processes that fork (Linux, macOS).
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from .harness import parser_of, quiet_libraries
from .ledger import Ledger
from .placement import EXPERIMENT, FIRST, RATE, TASKS, arms_of
from .problem import Arm, Problem
from .sweep import sweep

RATES = (1e-2, 3e-2, RATE, 1e-3, 3.33e-3, 9e-2)  # of `placement`, fit's default and its default for whole networks
Cell = tuple[Problem, Arm, int]  # the arm with a single rate, and a seed
CELLS: list[Cell] = []  # processes that fork find them here
LEDGER: list[Path] = []


def cells_of(options: argparse.Namespace) -> list[Cell]:
    """Return all runs, those first that decide the most."""
    found = []
    for number, name in enumerate(options.task):
        task = TASKS[name](options)
        for arm in arms_of(task, 1, task.places):
            late = arm.name not in FIRST
            for place, rate in enumerate(RATES):
                for seed in range(1 if late else options.seeds):
                    worth = (late, rate == RATES[-1], place + 2 * seed, number)
                    found.append((worth, (task.problem, replace(arm, rates=(rate,)), seed)))
    return [cell for _, cell in sorted(found, key=lambda one: one[0])]


def run_cell(index: int) -> str:
    """Do a run, or find it in the ledger; return what it was."""
    problem, arm, seed = CELLS[index]
    try:
        (found,) = sweep(problem, [arm], [seed], Ledger(LEDGER[0]), progress=False)
        value: object = found.refused or (found.runs[0].test if found.runs else "diverged")
    except Exception as error:  # the others go on; the study does this one again, and raises
        value = f"failed: {error!r}"
    return f"{problem.name}, {arm.name}, {arm.rates[0]:g}, seed {seed}: {value}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Do the runs until all are done or the time is up; return the exit status."""
    parser = parser_of(EXPERIMENT, cache=True)
    parser.add_argument("--task", choices=TASKS, nargs="+", default=tuple(TASKS), help="what is learnt")
    parser.add_argument("--processes", type=int, default=2, help="how many runs at once")
    parser.add_argument("--minutes", type=float, default=60, help="after which what is not finished is left")
    options = parser.parse_args(arguments)
    started = time.monotonic()
    quiet_libraries()
    torch.set_num_threads(1)
    CELLS[:] = cells_of(options)
    LEDGER[:] = [options.out / f"{EXPERIMENT.name}.ledger.jsonl"]
    print(f"{len(CELLS)} runs; {time.monotonic() - started:.0f} s to prepare", flush=True)
    done = 0
    with multiprocessing.get_context("fork").Pool(options.processes) as pool:  # which it ends on leaving
        results = pool.imap_unordered(run_cell, range(len(CELLS)))
        for _ in CELLS:
            try:
                said = results.next(max(0.1, 60 * options.minutes - (time.monotonic() - started)))
            except multiprocessing.TimeoutError:
                break
            done += 1
            print(f"{time.monotonic() - started:.0f} s, {done}: {said}", flush=True)
    print(f"{done} of {len(CELLS)} runs are in {LEDGER[0]}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
