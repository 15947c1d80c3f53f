"""All methods on a Transformer, a Mamba and a ViT, by one loop.

    python -m experiments.compare_methods

Every method gets the task's steps and as many learning rates; its best on one half of the held-out data is used with
every seed, and measured on the other half. Any model and data of the Hugging Face Hub, or in a local folder, take the
place of the small ones:

    python -m experiments.compare_methods --model gpt2 --model state-spaces/mamba-130m-hf --data imdb --steps 500
    python -m experiments.compare_methods --model google/vit-base-patch16-224-in21k --data ./my_images
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from residual_steer.backbone import SITES
from residual_steer.training import evaluate

from .backbones import Task
from .harness import Experiment, Found, judged, parser_of, positive, run, told
from .hub import tasks_of
from .ledger import Ledger
from .paired import Difference, difference
from .problem import Arm, Problem, digest, rates_around
from .results import Axis, Column, Plot, Series, Table, Verdict
from .sweep import Entry, every_run, sweep
from .tables import comparison, gap, measured, records

EXPERIMENT = Experiment(
    name="compare-transformer-mamba",
    title="A Transformer, a Mamba and a ViT under every method",
    about="Small backbones, pre-trained on what every machine has (Python's own source, the digits 0–4), are adapted "
    "to English prose and to the digits 5–9, by one loop and for as many steps under every method. Windows of text are "
    "10 bytes shorter than those of the pre-training, which leaves room for a prompt.",
)
PROMPT = 10  # tokens of a prompt, a prefix, or of VPT in every block
# Centres of the sweeps: methods of few parameters take larger rates; each is tried at a third and three times as much.
RATES = {"hres": 1e-2, "lora": 1e-2, "parallel-adapter": 1e-2, "prompt": 3e-2, "prefix": 3e-2, "vpt-deep": 3e-2}
RATES |= {"linear": 3e-2, "full": 2e-3}
LARGE = {"hres": 1e-3, "lora": 1e-3, "parallel-adapter": 1e-3, "linear": 5e-3, "full": 5e-5}  # usual for --model


@dataclass(frozen=True)
class Compared:
    """A task with what every method reached on it, and what the frozen backbone reaches; None for a new head."""

    task: Task
    problem: Problem
    entries: list[Entry]
    frozen: float | None


def arms_of(task: Task, options: argparse.Namespace) -> list[Arm]:
    """Return the methods that are held against each other on a task."""
    images = task.kind == "images"
    methods: list[tuple[str, str, dict[str, Any]]] = [
        ("H-Res", "hres", {"rank": options.rank, "site": options.site}),
        ("LoRA", "lora", {"rank": options.rank}),
        ("parallel adapter", "parallel-adapter", {"rank": options.rank}),
        ("VPT-deep", "vpt-deep", {"length": PROMPT}) if images else ("prompt", "prompt", {"length": PROMPT}),
        *([] if images else [("prefix", "prefix", {"length": PROMPT})]),
        ("head alone", "linear", {}),
        ("full fine-tuning", "full", {}),
    ]
    rates = RATES | LARGE if options.model else RATES
    return [Arm(name, method, rates_around(rates[method], options.rates), sized) for name, method, sized in methods]


def problem_of(task: Task) -> Problem:
    """Return a task as a problem; of the held-out data, every second item chooses and the others are reported on."""
    data = task if task.kind == "images" else replace(task, train=Shorter(task.train), valid=Shorter(task.valid))
    halves = {"valid": half(data.valid, 0), "test": half(data.valid, 1)}

    def score(model: nn.Module, split: str, seed: int) -> dict[str, float]:
        return {"metric": task.metric(evaluate(model, DataLoader(halves[split], batch_size=4 * task.batch)))}

    sizes = [len(task.train), len(task.valid)]
    return Problem(
        name=task.backbone,
        fresh=task.seeded,
        train=lambda seed: data.loader(),
        score=score,
        metric="metric",
        better="down" if task.kind == "text" else "up",
        steps=task.steps,
        identity={"backbone": digest(task.seeded(0)), "about": task.about, "batch": task.batch, "sizes": sizes},
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


def table_of(one: Compared) -> Table:
    """Return a task's table."""
    column = Column("metric", one.task.unit, "", one.problem.better, 3 if one.task.kind == "text" else 1)
    title = f"{one.task.backbone}: {one.task.about}"
    table = comparison(title, one.problem, one.entries, column, merged=True)
    first = () if one.frozen is None else ({"method": "frozen", "metric": one.frozen},)
    return replace(table, rows=(*first, *table.rows))


def trade_off(one: Compared) -> Plot:
    """Draw what a method reaches against the time of its training step."""
    series = []
    for entry in one.entries:
        seconds = sorted(run.seconds_per_step for run in entry.runs if run.seconds_per_step is not None)
        if seconds:
            step = 1000 * seconds[len(seconds) // 2]
            series.append(Series(entry.arm.name, (step,), (measured(entry, "metric"),)))
    axes = Axis("training step", "ms"), Axis(f"held-out {one.task.unit}")
    return Plot(f"{one.task.backbone}: quality against the time of a step", "scatter", *axes, tuple(series))


def over_frozen(one: Compared, sign: int) -> Difference | None:
    """Return how much better H-Res is than the frozen model."""
    reached = next(entry.results("metric") for entry in one.entries if entry.arm.name == "H-Res")
    if not reached or not all(map(math.isfinite, reached)) or one.frozen is None:
        return None
    return difference([sign * x for x in reached], [sign * one.frozen] * len(reached))


def judge(results: Sequence[Compared]) -> Verdict:
    """Judge claim 9: the same call works on Transformers and SSMs."""
    said, won = [], []
    for one in results:
        sign = 1 if one.problem.better == "up" else -1
        rival = gap(one.entries, "H-Res", "LoRA", "metric", scale=sign)
        if one.task.kind == "text":
            than, gain = "the frozen model", over_frozen(one, sign)
        else:
            than, gain = "the head alone", gap(one.entries, "H-Res", "head alone", "metric", scale=sign)
        unit = f"{one.task.backbone} ({one.task.unit})"
        said.append(f"{unit}: better than {than} by {told(gain)}, than LoRA by {told(rival)}")
        won.append(gain is not None and gain.sign == 1)
    return Verdict(9, judged(won), "none", f"{'; '.join(said)}.", "python -m experiments.compare_methods")


def study(options: argparse.Namespace, ledger: Ledger) -> Found:
    """Compare all methods on all tasks."""
    results = []
    steps = options.steps or (4 if options.quick else None)
    for task in (replace(one, steps=steps or one.steps) for one in tasks_of(options)):
        problem = problem_of(task)
        entries = sweep(problem, arms_of(task, options), range(options.seeds), ledger)
        frozen = None if task.head else problem.score(problem.fresh(0), "test", 0)["metric"]
        results.append(Compared(task, problem, entries, frozen))
    steps_of = {one.task.backbone: one.task.steps for one in results}
    return Found(
        tables=[table_of(one) for one in results],
        plots=[trade_off(one) for one in results],
        verdicts=[] if options.model or options.data else [judge(results)],
        settings={"rank": options.rank, "site": options.site, "steps": steps_of},
        records=[record for one in results for record in records(one.problem, one.entries)],
        seconds=sum(run.seconds for one in results for run in every_run(one.entries)),
    )


def main(arguments: list[str] | None = None) -> int:
    """Run the experiment; return the exit status."""
    parser = parser_of(EXPERIMENT, cache=True)
    parser.add_argument("--model", action="append", help="Hub name or local folder, can be repeated")
    parser.add_argument("--data", help="Hub dataset (name or name:config), text file, or local folder")
    parser.add_argument("--steps", type=positive, help="optimizer steps of each method (4 with --quick)")
    parser.add_argument("--rank", type=positive, default=16, help="of H-Res, LoRA and the adapter")
    parser.add_argument("--site", default="block", choices=SITES, help="where the fields run")
    return run(EXPERIMENT, parser.parse_args(arguments), study)


if __name__ == "__main__":
    sys.exit(main())
