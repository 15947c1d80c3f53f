"""What steering only the last blocks costs in accuracy: cost against accuracy, LoRA in the same plot.

    python -m experiments.last_blocks

A small ViT goes from the digits 0–4 to 5–9, and a small GPT-2 to associations that it has never seen. For k = 1 to all
of the blocks, H-Res and LoRA of one rank adapt the last k, each with three learning rates and three seeds; the ViT's
new head trains too. The cost is that of a training step by count and by time, over the floor with all blocks steered.
Finished runs are kept, so that a second call goes on. BENCHMARKS.md shows what comes out.
"""

from __future__ import annotations

import argparse
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
from benchmarks.charts import Measured
from benchmarks.counters import count
from benchmarks.environment import save_json
from benchmarks.rounds import Variant, play
from residual_steer import SteerError

from . import compare_methods, retrieval
from .backbones import default_cache, small_tasks
from .harness import positive
from .ledger import Ledger
from .problem import Arm, Problem, adapted, rates_around
from .sweep import Entry, sweep

NAMES = {"hres": "H-Res", "lora": "LoRA"}
RANK, FLOOR = 8, "floor"
RESULTS, SCRATCH = Path("benchmarks/results"), Path("runs/bench")


def main(arguments: list[str] | None = None) -> int:
    """Train, measure, print and save; return the exit status."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--task", choices=TASKS, nargs="+", default=tuple(TASKS), help="what is learnt")
    parser.add_argument("--seeds", type=positive, help="how many; 3, or 1 with --quick")
    parser.add_argument("--rounds", type=positive, help="of each measurement; 30, or 1 with --quick")
    parser.add_argument("--threads", type=positive, help="of PyTorch on the CPU")
    parser.add_argument("--quick", action="store_true", help="tiny shapes and one round: a test, no result")
    parser.add_argument("--cache", type=Path, default=default_cache(), help="folder of the pre-trained backbones")
    parser.add_argument("--output", type=Path, help=f"folder of what is written; {SCRATCH} with --quick")
    options = parser.parse_args(arguments)
    options.seeds = options.seeds or (1 if options.quick else 3)
    options.rounds = options.rounds or (1 if options.quick else 30)
    options.output = options.output or (SCRATCH if options.quick else RESULTS)
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        for name in options.task:
            study(name, options)
    except SteerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def study(name: str, options: argparse.Namespace) -> None:
    """Train, measure and save one task."""
    problem, centres = TASKS[name](options.cache, options.quick)
    arms = arms_of(problem, centres, rates=1 if options.quick else 3)
    scratch = options.output if options.quick else SCRATCH
    entries = sweep(problem, arms, range(options.seeds), Ledger(scratch / f"last_blocks-{name}.ledger.jsonl"))
    record = {
        "options": {key: value for key, value in vars(options).items() if key not in ("output", "cache")},
        "task": name,
        "about": f"{problem.name}: {ABOUT[name]}; rank {RANK}, {problem.steps} steps, {options.seeds} seed(s)",
        "points": {entry.arm.name: reached(entry, problem.metric, SCALE[name]) for entry in entries},
        "cost": costs(problem, arms, options.rounds),
    }
    save_json(record, options.output / f"last_blocks-{name}-cpu.json")
    for method, values in record["points"].items():
        reads = f"{Measured.of(values)}" if values else "–"
        print(f"{method}: {reads}; step ÷ floor {record['cost']['times'][method]['ratio']['median']:.3f}", flush=True)


def digits(cache: Path, quick: bool) -> tuple[Problem, dict[str, float]]:
    """Return the ViT's problem, and where its learning rates are looked for."""
    (task,) = small_tasks(cache, quick, ["ViT"])
    problem = compare_methods.problem_of(task)
    rates = {method: compare_methods.RATES[method] for method in NAMES}
    return replace(problem, steps=4) if quick else problem, rates


def associations(cache: Path, quick: bool) -> tuple[Problem, dict[str, float]]:
    """Return the GPT-2's problem, and where its learning rates are looked for."""
    backbone, _ = retrieval.get_backbone("GPT-2", cache, quick)
    steps, sizes = (4, retrieval.FEW) if quick else (retrieval.ADAPTING["GPT-2"], retrieval.ROWS)
    return retrieval.problem_of("GPT-2", backbone, steps, sizes), {"hres": 3e-2, "lora": 3e-3}


Maker = Callable[[Path, bool], tuple[Problem, dict[str, float]]]
TASKS: dict[str, Maker] = {"digits": digits, "retrieval": associations}
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
    models = {FLOOR: floor(problem.fresh(0))}
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


def floor(model: nn.Module) -> nn.Module:
    """Let what leaves the first block require a gradient, as if something beside it were learning."""
    backbone = rs.find_backbone(model.eval().requires_grad_(False))
    backbone.blocks[0].register_forward_hook(
        lambda _, args, output: backbone.write(output, lambda z: z.detach().requires_grad_(torch.is_grad_enabled()))
    )
    return model


if __name__ == "__main__":
    sys.exit(main())
