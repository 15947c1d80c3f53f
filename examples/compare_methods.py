"""All methods on the tasks of `compare_transformer_mamba.py`: `--baselines` of that script.

    python examples/compare_transformer_mamba.py --baselines

Every method gets the task's steps and as many learning rates; its best on one half of the held-out data is used with
every seed, and measured on the other half.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from experiment import LOST, Experiment, Found, run
from residual_steer.report import Axis, Column, Plot, Series, Table, Verdict
from residual_steer.study import (
    Arm,
    Difference,
    Entry,
    Ledger,
    Problem,
    comparison,
    difference,
    digest,
    every_run,
    gap,
    measured,
    rates_around,
    records,
    sweep,
)
from residual_steer.training import evaluate
from tasks import Task, seeded

EXPERIMENT = Experiment(
    name="compare-transformer-mamba",
    title="A Transformer, a Mamba and a ViT under every method",
    about="Small backbones, pre-trained on what every machine has (Python's own source, the digits 0–4), are adapted "
    "to English prose and to the digits 5–9, by one loop and for as many steps under every method. Windows of text are "
    "10 bytes shorter than those of the pre-training, which leaves room for a prompt.",
)
TEXT_STEPS = 40  # of the small language models
PROMPT = 10  # tokens of a prompt, a prefix, or of VPT in every block
# Centres of the sweeps: methods of few parameters take larger rates; each is tried at a third and three times as much.
RATES = {"hres": 1e-2, "lora": 1e-2, "parallel-adapter": 1e-2, "prompt": 3e-2, "prefix": 3e-2, "vpt-deep": 3e-2}
RATES |= {"linear": 3e-2, "full": 2e-3}


def shortened(task: Task) -> Task:
    """Return a small task with fewer steps over text than the demo's: there are so many runs of them."""
    return replace(task, steps=min(task.steps, TEXT_STEPS)) if task.kind == "text" else task


def arms_of(task: Task, options: argparse.Namespace) -> list[Arm]:
    """Return the methods that are held against each other on a task."""
    learned = ("vpt-deep" if task.kind == "images" else "prompt", {"length": PROMPT})
    methods: list[tuple[str, str, dict[str, Any]]] = [
        ("H-Res", "hres", {"rank": options.rank, "site": options.site}),
        ("LoRA", "lora", {"rank": options.rank}),
        ("parallel adapter", "parallel-adapter", {"rank": options.rank}),
        ("VPT-deep" if task.kind == "images" else "prompt", *learned),
        ("head alone", "linear", {}),
        ("full fine-tuning", "full", {}),
    ]
    if task.kind == "text":
        methods.insert(4, ("prefix", "prefix", {"length": PROMPT}))
    return [Arm(name, method, rates_around(RATES[method], options.rates), sized) for name, method, sized in methods]


def problem_of(task: Task) -> Problem:
    """Return a task as a problem; of the held-out data, every second item chooses and the others are reported on."""
    data = task if task.kind == "images" else replace(task, train=Shorter(task.train), valid=Shorter(task.valid))
    halves = {"valid": half(data.valid, 0), "test": half(data.valid, 1)}

    def score(model: nn.Module, split: str, seed: int) -> dict[str, float]:
        return {"metric": task.metric(evaluate(model, DataLoader(halves[split], batch_size=4 * task.batch)))}

    return Problem(
        name=task.backbone,
        fresh=lambda seed: seeded(task, seed),
        train=lambda seed: data.loaders()[0],
        score=score,
        metric="metric",
        better="down" if task.kind == "text" else "up",
        steps=task.steps,
        identity={"backbone": digest(seeded(task, 0)), "about": task.about, "batch": task.batch, "sizes": sizes(task)},
        train_also=(task.head,) if task.head else (),
    )


class Shorter(Dataset[dict[str, Tensor]]):
    """Windows of text without their last tokens, so that a prompt has room in a model of so many positions."""

    def __init__(self, windows: Dataset[dict[str, Tensor]]) -> None:
        self.windows = windows

    def __len__(self) -> int:
        """Return the number of windows."""
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return a window."""
        return {name: tokens[:-PROMPT] for name, tokens in self.windows[index].items()}


def half(data: Dataset[Any], first: int) -> Dataset[Any]:
    """Return every second item."""
    return Subset(data, range(first, len(data), 2))


def sizes(task: Task) -> list[int]:
    """Return how many items there are to train on, and held out."""
    return [len(task.train), len(task.valid)]


def before(problem: Problem, task: Task) -> float | None:
    """Return what the frozen backbone reaches; None for a classifier, whose new head knows nothing yet."""
    return None if task.kind == "images" else problem.score(problem.fresh(0), "test", 0)["metric"]


def table_of(task: Task, problem: Problem, entries: Sequence[Entry]) -> Table:
    """Return a task's table."""
    column = Column("metric", task.unit, "", problem.better, 3 if task.kind == "text" else 1)
    table = comparison(f"{task.backbone}: {task.about}", problem, entries, column, merged=True)
    frozen = before(problem, task)
    first = () if frozen is None else ({"method": "frozen", "metric": frozen},)
    return Table(table.title, table.columns, (*first, *table.rows), table.notes)


def trade_off(task: Task, entries: Sequence[Entry]) -> Plot:
    """Draw what a method reaches against the time of its training step."""
    series = []
    for entry in entries:
        seconds = [run.seconds_per_step for run in entry.runs if run.seconds_per_step is not None]
        if seconds:
            step = 1000 * sorted(seconds)[len(seconds) // 2]
            series.append(Series(entry.arm.name, (step,), (measured(entry, "metric"),)))
    axes = Axis("training step", "ms"), Axis(f"held-out {task.unit}")
    return Plot(f"{task.backbone}: quality against the time of a step", "scatter", *axes, tuple(series))


def over_frozen(entries: Sequence[Entry], frozen: float, sign: int) -> Difference | None:
    """Return how much better H-Res is than the frozen model."""
    reached = next(entry.results("metric") for entry in entries if entry.arm.name == "H-Res")
    if not reached or not all(map(math.isfinite, reached)):
        return None
    return difference([sign * x for x in reached], [sign * frozen] * len(reached))


def judge(results: Sequence[tuple[Task, Problem, Sequence[Entry]]], frozen: dict[str, float]) -> Verdict:
    """Judge claim 9: the same call works on Transformers and SSMs."""
    said, won = [], []
    for task, problem, entries in results:
        sign = 1 if problem.better == "up" else -1
        rival = gap(entries, "H-Res", "LoRA", "metric", scale=sign)
        if task.kind == "text":
            than, gain = "the frozen model", over_frozen(entries, frozen[task.backbone], sign)
        else:
            than, gain = "the head alone", gap(entries, "H-Res", "head alone", "metric", scale=sign)
        said.append(
            f"{task.backbone} ({task.unit}): better than {than} by {gain or LOST}, than LoRA by {rival or LOST}"
        )
        won.append(gain is not None and gain.sign == 1)
    return Verdict(
        9,
        "holds" if all(won) else "partly holds" if any(won) else "does not hold",
        "none",
        "; ".join(said) + ".",
        "python examples/compare_transformer_mamba.py --baselines",
    )


def compare_all(tasks: Sequence[Task], options: argparse.Namespace) -> int:
    """Compare all methods on all tasks; return the exit status."""

    def body(options: argparse.Namespace, ledger: Ledger) -> Found:
        results, frozen = [], {}
        for task in tasks:
            problem = problem_of(task)
            arms = arms_of(task, options)
            results.append((task, problem, sweep(problem, arms, range(options.seeds), ledger)))
            frozen[task.backbone] = before(problem, task) or 0.0
        return Found(
            tables=[table_of(task, problem, entries) for task, problem, entries in results],
            plots=[trade_off(task, entries) for task, _, entries in results],
            verdicts=[judge(results, frozen)],
            settings={"rank": options.rank, "site": options.site, "steps": {t.backbone: t.steps for t in tasks}},
            records=[record for _, problem, entries in results for record in records(problem, entries)],
            seconds=sum(one.seconds for _, _, entries in results for one in every_run(entries)),
        )

    return run(EXPERIMENT, options, body)
