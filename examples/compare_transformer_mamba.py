"""Adapt a frozen Transformer, a frozen Mamba and a frozen ViT with the same call, and hold it against full fine-tuning.

    python examples/compare_transformer_mamba.py

Small backbones are pre-trained on what every machine has (Python's own source, scikit-learn's digits) and kept in
~/.cache/residual-steer; no network, no GPU. Then each is adapted to something else, with the same `fit` and the same
number of steps for every method, and one table is printed and saved with learning curves.

With `--baselines`, every other method of `residual_steer.baselines` takes part, each with a sweep of learning rates and
several seeds (compare_methods.py).

Any model and data of the Hugging Face Hub, or in a local folder, take their place:

    python examples/compare_transformer_mamba.py --model gpt2 --model state-spaces/mamba-130m-hf --data imdb --steps 500
    python examples/compare_transformer_mamba.py --model google/vit-base-patch16-224-in21k --data ./my_images
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import nn

import residual_steer as rs
from backbone_cache import default_cache
from compare_methods import compare_all, shortened
from experiment import positive
from hub_tasks import hub_tasks, quiet_libraries
from report import save_curves, save_json, save_table, table_of
from residual_steer.backbone import SITES
from residual_steer.training import evaluate
from small_backbones import scan_linearly
from tasks import Task, seeded, small_tasks


@dataclass(frozen=True)
class Settings:
    """What the command line says about the methods."""

    rank: int
    site: str
    seed: int


@dataclass(frozen=True)
class Method:
    """One way to adapt a model.

    Attributes:
        name: as in the table.
        prepare: sets the model's `requires_grad`; what requires a gradient then trains.
        kinds: the tasks it is for.
    """

    name: str
    prepare: Callable[[nn.Module, Task, Settings], object]
    kinds: tuple[str, ...] = ("text", "images")


@dataclass
class Outcome:
    """One method on one task.

    Attributes:
        metric: after training, in the task's unit.
        trainable: number of parameters that trained.
        total: number of all parameters.
        seconds_per_step: median wall-clock seconds.
        curve: steps and the metric there, on validation data.
    """

    metric: float
    trainable: int
    total: int
    seconds_per_step: float
    curve: list[tuple[int, float]] = field(default_factory=list)


def train_head(model: nn.Module, task: Task, settings: Settings) -> None:
    """Freeze everything but the new head."""
    model.requires_grad_(False)
    model.get_submodule(task.head or "").requires_grad_(True)


def steer(model: nn.Module, task: Task, settings: Settings) -> None:
    """Freeze everything, add steering fields, and train them with the new head if there is one."""
    head = [task.head] if task.head else []
    rs.steer(model, rank=settings.rank, site=settings.site, train=head)


def train_everything(model: nn.Module, task: Task, settings: Settings) -> None:
    """Train every parameter."""
    model.requires_grad_(True)
    scan_linearly(model)


METHODS = [
    Method("new head alone", train_head, kinds=("images",)),
    Method("H-Res", steer),
    Method("full fine-tuning", train_everything),
]


def main(arguments: list[str] | None = None) -> int:
    """Run the comparison; return the exit status."""
    try:
        options = parse(arguments)
        if options.baselines:
            quiet_libraries()
            return compare_all(find_tasks(options), options)
        compare(options)
    except rs.SteerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model", action="append", help="Hub name or local folder, can be repeated")
    parser.add_argument("--data", help="Hub dataset (name or name:config), text file, or local folder")
    parser.add_argument("--steps", type=positive, help="optimizer steps of each method (4 with --quick)")
    parser.add_argument("--rank", type=positive, default=16, help="rank of the steering fields")
    parser.add_argument("--site", default="block", choices=SITES, help="where the fields run")
    parser.add_argument("--seed", type=int, default=0, help="of new heads, new fields and the data's order")
    parser.add_argument("--baselines", action="store_true", help="every method, with a sweep of learning rates")
    parser.add_argument("--seeds", type=positive, default=3, help="of --baselines, counted from 0")
    parser.add_argument("--rates", type=positive, default=3, help="of --baselines: learning rates of every method")
    parser.add_argument("--out", type=Path, default=Path("runs/compare_transformer_mamba"), help="folder for results")
    parser.add_argument("--cache", type=Path, default=default_cache(), help="folder of the pre-trained backbones")
    parser.add_argument("--quick", action="store_true", help="tiny backbones and few steps: a test, no result")
    return parser.parse_args(arguments)


def make_folder(folder: Path) -> None:
    """Make the folder for results before the work begins.

    Raises:
        SteerError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise rs.SteerError(f"could not make {folder}: {error.strerror or error}. Give another --out.") from error


def compare(options: argparse.Namespace) -> None:
    """Adapt every backbone with every method, then print and save what came out.

    Raises:
        SteerError: a model, data or an option that cannot be used.
    """
    started = time.perf_counter()
    quiet_libraries()
    make_folder(options.out)
    tasks = find_tasks(options)
    settings = Settings(options.rank, options.site, options.seed)
    results = []
    for task in tasks:
        print(f"\n{task.backbone}: {task.about}, {task.steps} steps of {task.batch}", flush=True)
        results.append((task, adapt_with_all(task, settings)))
    table = table_of(results)
    seconds = time.perf_counter() - started
    print(f"\n{table}\n")
    save_table(table, options.out / "table.md")
    save_json(results, options, seconds, options.out / "results.json")
    save_curves(results, options.out / "curves.png")
    print(f"{seconds:.0f} s; table.md, results.json and curves.png are in {options.out}")


def find_tasks(options: argparse.Namespace) -> list[Task]:
    """Return what the command line asks for: small backbones on their own data, or other models, or other data."""
    if options.model or options.data:
        tasks = hub_tasks(options)
    else:
        tasks = small_tasks(options.cache, options.quick)
        tasks = [shortened(task) for task in tasks] if options.baselines else tasks
    steps = options.steps or (4 if options.quick else None)
    return [replace(task, steps=steps) if steps else task for task in tasks]


def adapt_with_all(task: Task, settings: Settings) -> dict[str, Outcome]:
    """Return the outcome of every method, and of the frozen backbone under the name `before`."""
    outcomes = {}
    for method in METHODS:
        if task.kind in method.kinds:
            outcomes[method.name] = adapt(task, method, settings)
    if task.kind == "images":  # a frozen classifier says nothing about new classes until its head has learned
        outcomes["before"] = outcomes["new head alone"]
    else:
        model = seeded(task, settings.seed)
        total = sum(p.numel() for p in model.parameters())
        outcomes["before"] = Outcome(task.metric(evaluate(model, task.loaders()[1])), 0, total, 0.0)
    return outcomes


def adapt(task: Task, method: Method, settings: Settings) -> Outcome:
    """Adapt a fresh copy of the task's backbone with one method."""
    model = seeded(task, settings.seed)
    method.prepare(model, task, settings)
    train, valid = task.loaders()
    print(f"  {method.name}", flush=True)
    history = rs.fit(
        model,
        train,
        valid,
        steps=task.steps,
        lr=task.rates[method.name],
        eval_every=math.ceil(task.steps / 4),
        seed=settings.seed,
    )
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    curve = [(record["step"], task.metric(record)) for record in history.valid]
    print(f"  {method.name}: {curve[-1][1]:.3f} {task.unit}", flush=True)
    return Outcome(
        metric=curve[-1][1],
        trainable=sum(size for size, trains in sizes if trains),
        total=sum(size for size, _ in sizes),
        seconds_per_step=history.seconds_per_step,
        curve=curve,
    )


if __name__ == "__main__":
    sys.exit(main())
