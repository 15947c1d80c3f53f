"""What steering only the last blocks costs in accuracy: cost against accuracy, LoRA in the same plot.

    python benchmarks/last_blocks.py

A small ViT goes from the digits 0–4 to 5–9, and a small GPT-2 to associations that it has never seen; both are
pre-trained here and kept in the user's cache (see examples/). For k = 1 to all of the blocks, H-Res and LoRA of one
rank adapt the last k, each with three learning rates and three seeds; the ViT's new head trains too. The cost is that
of a training step by count and by time, over the floor with all blocks steered. Finished runs are kept, so that a
second call goes on.
"""

from __future__ import annotations

import argparse
import importlib
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import residual_steer as rs
from methods import FLOOR, floor
from options import SCRATCH, parser_of, read
from output import exit_status, markdown, save_json
from residual_steer.report import Axis, Measured, Plot, Series
from residual_steer.study import Arm, Entry, Ledger, Problem, adapted, rates_around, sweep
from residual_steer.study.counters import count
from residual_steer.study.rounds import Variant, play

EXAMPLES = Path(__file__).parents[1] / "examples"
NAMES = {"hres": "H-Res", "lora": "LoRA"}
RANK = 8


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; return the exit status."""
    return exit_status(lambda: report(parse(arguments)))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = parser_of(__doc__, rounds=30)
    parser.add_argument("--task", choices=TASKS, nargs="+", default=tuple(TASKS), help="what is learnt")
    parser.add_argument("--seeds", type=int, help="how many; 3, or 1 with --quick")
    parser.add_argument("--cache", type=Path, help="folder of the pre-trained backbones; the user's if left out")
    return read(parser, arguments)


def report(options: argparse.Namespace) -> None:
    """Train, measure, print and save.

    Raises:
        SteerError: an option that cannot be used, or a folder that cannot be written.
    """
    seeds = options.seeds or (1 if options.quick else 3)
    sys.path.append(str(EXAMPLES))  # whose backbones and problems these are
    cache = options.cache or importlib.import_module("backbone_cache").default_cache()
    scratch = options.output if options.quick else SCRATCH
    for name in options.task:
        problem, centres = TASKS[name](cache, options.quick)
        arms = arms_of(problem, centres, rates=1 if options.quick else 3)
        entries = sweep(problem, arms, range(seeds), Ledger(scratch / f"last_blocks-{name}.ledger.jsonl"))
        record = {
            "options": {key: value for key, value in vars(options).items() if key not in ("output", "cache")},
            "task": name,
            "about": f"{problem.name}: {ABOUT[name]}; rank {RANK}, {problem.steps} steps, {seeds} seed(s)",
            "points": {entry.arm.name: reached(entry, problem.metric, SCALE[name]) for entry in entries},
            "cost": costs(problem, arms, options.rounds),
        }
        save_json(record, options.output / f"last_blocks-{name}-cpu.json")
        print(f"\n{table(record)}\n", flush=True)


def digits(cache: Path, quick: bool) -> tuple[Problem, dict[str, float]]:
    """Return the ViT's problem, and where its learning rates are looked for."""
    compare = importlib.import_module("compare_methods")
    (task,) = importlib.import_module("tasks").small_tasks(cache, quick, ["ViT"])
    problem = compare.problem_of(task)
    return replace(problem, steps=4) if quick else problem, {method: compare.RATES[method] for method in NAMES}


def retrieval(cache: Path, quick: bool) -> tuple[Problem, dict[str, float]]:
    """Return the GPT-2's problem, and where its learning rates are looked for."""
    recall, kept = importlib.import_module("retrieval"), importlib.import_module("backbone_cache")
    name, steps = "GPT-2", 4 if quick else recall.STEPS["GPT-2"]
    folder = kept.folder_of(cache, f"recall-{name.lower()}", [recall.VERSION, name, steps, torch.__version__])
    backbone, _, _ = kept.cached(
        folder, recall.BUILDERS[name], lambda model: recall.pretrain(model, steps, recall.MET[name])
    )
    sizes = recall.FEW if quick else recall.ROWS
    problem = recall.problem_of(name, backbone, 4 if quick else recall.ADAPTING[name], sizes)
    return problem, {"hres": 3e-2, "lora": 3e-3}


TASKS: dict[str, Callable[[Path, bool], tuple[Problem, dict[str, float]]]] = {"digits": digits, "retrieval": retrieval}
ABOUT = {"digits": "accuracy in % on digits 5–9", "retrieval": "queries answered in % (MQAR)"}
SCALE = {"digits": 1, "retrieval": 100}


def arms_of(problem: Problem, centres: dict[str, float], rates: int) -> list[Arm]:
    """Return H-Res and LoRA on the last k blocks, for every k."""
    blocks = len(rs.find_backbone(problem.fresh(0)).blocks)
    return [
        Arm(
            f"{NAMES[method]}, last {last}",
            method,
            rates_around(centre, rates),
            {"rank": RANK, "layers": list(range(blocks - last, blocks))},
        )
        for method, centre in centres.items()
        for last in range(1, blocks + 1)
    ]


def reached(entry: Entry, metric: str, scale: float) -> list[float]:
    """Return what every seed reached on test data; nothing if one of them diverged."""
    values = [scale * value for value in entry.results(metric)]
    return values if all(map(math.isfinite, values)) else []


def costs(problem: Problem, arms: list[Arm], rounds: int) -> dict[str, Any]:
    """Measure a training step of every arm, without the optimizer's part, over the floor of all blocks."""
    models = {FLOOR: floor(problem.fresh(0).eval().requires_grad_(False))}
    models |= {arm.name: adapted(problem, arm, 0).eval() for arm in arms}
    batch = next(iter(problem.train(0)))
    given = batch["input_ids"] if isinstance(batch, dict) else batch[0]
    counts = {name: count(model, partial(loss, model, batch), given) for name, model in models.items()}
    variants = [Variant(name, partial(_step, model, batch)) for name, model in models.items()]
    times = play(variants, rounds, progress="step")
    return {
        "times": times.record(FLOOR),
        "flops": {name: own.flops / counts[FLOOR].flops for name, own in counts.items()},
        "saved": {name: own.saved / counts[FLOOR].saved for name, own in counts.items()},
    }


def loss(model: nn.Module, batch: Any) -> Tensor:
    """Return the loss of a batch of text, or of pairs of images and classes."""
    if isinstance(batch, dict):
        return model(**batch).loss
    images, classes = batch
    return F.cross_entropy(model(images), classes)


def _step(model: nn.Module, batch: Any, _: Any) -> None:
    loss(model, batch).backward()
    model.zero_grad()


def plot(record: dict[str, Any]) -> Plot:
    """Draw accuracy against the cost of a step."""
    series = []
    for method in NAMES.values():
        names = [name for name in record["points"] if name.startswith(f"{method},")]
        x = tuple(record["cost"]["times"][name]["ratio"]["median"] for name in names)
        y = tuple(Measured.of(record["points"][name]) if record["points"][name] else None for name in names)
        series.append(Series(method, x, y, tuple(name.removeprefix(f"{method}, ") for name in names)))
    axes = Axis("training step ÷ floor of all blocks"), Axis(ABOUT[record["task"]])
    return Plot(f"{record['task']}: the last k blocks", "scatter", *axes, tuple(series))


def table(record: dict[str, Any]) -> str:
    """Return a Markdown table."""
    cost, rows = record["cost"], []
    for name, values in record["points"].items():
        ratio = cost["times"][name]["ratio"]
        rows.append(
            [
                name,
                str(Measured.of(values)) if values else "–",
                f"{ratio['median']:.3f} ({ratio['low']:.3f}–{ratio['high']:.3f})",
                f"{cost['flops'][name]:.3f}",
                f"{cost['saved'][name]:.3f}",
            ]
        )
    return markdown(["method", ABOUT[record["task"]], "step ÷ floor", "FLOPs ÷ floor", "saved ÷ floor"], rows)


if __name__ == "__main__":
    sys.exit(main())
