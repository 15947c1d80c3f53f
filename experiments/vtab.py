"""VTAB-1k on a frozen ViT: H-Res beside prompts, adapters, LoRA, the head alone and full fine-tuning.

    python -m experiments.vtab --model vit_base_patch16_224.orig_in21k --data cifar100 --data svhn

VTAB-1k's protocol: a learning rate is chosen by training on 800 images and measuring on 200 others, then the model is
trained on all thousand with every seed, and measured on the whole test split. Which thousand is drawn from the train
split (VTAB's own cannot be had from the Hub; `--draw` gives others), unless `--data` is a folder with VTAB's lists.
Every method but the head, H-Res of rank 32 and full fine-tuning trains about as many parameters as H-Res of rank 8.

The model is one of timm or of transformers, by its name or in a folder. The published results that are shown beside
ours began from Google's ViT-B/16 of ImageNet-21k, which is the default here; `vit_base_patch16_224.augreg_in21k` is
another training of it. It downloads the weights, and the whole of CIFAR-100 and SVHN, from the Hugging Face Hub; what
has been downloaded once is read from the cache. It is meant for a GPU. Each method takes a run for every learning rate
and one for every seed; finished runs are kept beside the result, so that the same command goes on where it was stopped.
`--quick` only shows that everything works.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

import residual_steer as rs
from benchmarks.environment import command_line
from residual_steer.data import ImageRows, vtab
from residual_steer.training import evaluate

from .harness import Experiment, Found, parser_of, positive, run
from .hub import Classifier, classifier, fingerprint, last_names
from .ledger import Ledger
from .problem import Arm, Problem, digest, match_budget, rates_around
from .results import Axis, Column, Table, Verdict
from .sweep import Entry, every_run, sweep
from .tables import bars, comparison, gap, records

EXPERIMENT = Experiment(
    name="vtab",
    title="VTAB-1k on a frozen ViT",
    about="Learning rates are chosen by training on 800 images and measuring on 200 others; then the model is trained "
    "on all thousand with every seed and measured on the whole test split. Every method trains a new head; all but the "
    "head alone, H-Res of rank 32 and full fine-tuning train about as many parameters as H-Res of rank 8.",
)
VERSION = 1  # raise it when the code below changes what a run gives
SPLITS = ("train800", "val200", "train800val200", "test")
SMALL, LARGE = "H-Res, rank 8", "H-Res, rank 32"
RATES = {"linear": 1e-2, "vpt-shallow": 1e-2, "vpt-deep": 1e-2, "hres": 1e-3, "lora": 1e-3, "adaptformer": 1e-3}
RATES |= {"full": 1e-4}  # in the middle of the sweep
FIT = {"weight_decay": 1e-4, "warmup": 0.1}  # customary on VTAB-1k
PARITY = 1.0  # points: methods that are tuned equally well differ by about as much (arXiv 2409.16434)
QUICK = {"steps": 2, "batch": 8}
PUBLISHED = (  # method, parameters in millions, CIFAR-100, SVHN
    ("full fine-tuning", 85.8, 68.9, 87.4),
    ("linear probe", 0, 64.4, 36.6),
    ("VPT-Deep", 0.53, 78.8, 78.1),
    ("Adapter", 0.16, 69.2, 82.8),
    ("LoRA", 0.29, 67.1, 85.3),
    ("AdaptFormer", 0.16, 70.8, 86.6),
    ("NOAH", 0.36, 69.6, 86.1),
    ("Convpass", 0.33, 72.3, 91.3),
)


def read(source: str, model: str, options: argparse.Namespace) -> tuple[Classifier, dict[str, ImageRows]]:
    """Return a model with a head for a task, and the task's images as that model takes them."""
    parts = {split: vtab(source, split, seed=options.draw) for split in SPLITS}
    classes = max(len(part.classes) for part in parts.values())
    backbone = classifier(model, classes, random=options.random_weights)
    for part in parts.values():
        part.prepare = backbone.prepare
    return backbone, parts


def problem_of(name: str, backbone: Classifier, parts: Mapping[str, ImageRows], options: argparse.Namespace) -> Problem:
    """Return the problem of one task: what chooses trains on 800 images, what is reported on a thousand."""

    def loader(split: str, *, shuffle: bool = False) -> DataLoader[Any]:
        return DataLoader(parts[split], options.batch, shuffle=shuffle, num_workers=options.workers)

    def score(model: nn.Module, split: str, seed: int) -> dict[str, float]:
        return {"accuracy": evaluate(model, loader({"valid": "val200"}.get(split, split)))["accuracy"]}

    return Problem(
        name=name,
        fresh=backbone.fresh,
        train=lambda seed: loader("train800", shuffle=True),
        retrain=lambda seed: loader("train800val200", shuffle=True),
        score=score,
        metric="accuracy",
        better="up",
        steps=options.steps,
        identity={
            "backbone": digest(backbone.fresh(0)),
            "labels": {split: fingerprint([torch.tensor(part.labels)]) for split, part in parts.items()},
            "pixels": repr(backbone.prepare),
            "draw": options.draw,
            "batch": options.batch,
            "version": VERSION,
        },
        train_also=(backbone.head,),
        fit={**FIT, "precision": options.precision},
    )


def arms_of(problem: Problem, rates: int) -> list[Arm]:
    """Return the methods, sized to train as many parameters as H-Res of rank 8."""
    model = rs.steer(problem.fresh(0), rank=8, train=problem.train_also)
    budget = sum(p.numel() for p in model.parameters() if p.requires_grad)

    def arm(name: str, method: str, size: Mapping[str, Any]) -> Arm:
        return Arm(name, method, rates_around(RATES[method], rates), size)

    def sized(name: str, method: str, option: str) -> Arm:
        return arm(name, method, match_budget(problem, method, option, budget))

    return [
        arm("head alone", "linear", {}),
        sized("VPT-shallow", "vpt-shallow", "length"),
        sized("VPT-deep", "vpt-deep", "length"),
        sized("LoRA", "lora", "rank"),
        sized("AdaptFormer", "adaptformer", "rank"),
        arm(SMALL, "hres", {"rank": 8}),
        arm(LARGE, "hres", {"rank": 32}),
        arm("full fine-tuning", "full", {}),
    ]


def published() -> Table:
    """Return what others report on these tasks."""
    columns = (
        Column("method", "method"),
        Column("parameters", "parameters", "million", digits=2),
        Column("cifar100", "CIFAR-100", "%", "up", 1),
        Column("svhn", "SVHN", "%", "up", 1),
    )
    keys = [column.key for column in columns]
    notes = (
        "None of these numbers is ours. Source: Jie and Deng 2022, arXiv 2207.07039, table 1; ViT-B/16 pre-trained on "
        "ImageNet-21k, parameters without the head. VTAB's own thousand images, where ours are another draw.",
        "Both of the paper's numbers on CIFAR-100 (H-Res 59.37, VPT 58.90) are below the linear probe here.",
    )
    rows = tuple(dict(zip(keys, row, strict=True)) for row in PUBLISHED)
    return Table("Published by others, not measured here: VTAB-1k", columns, rows, notes)


def verdict(results: Mapping[str, list[Entry]]) -> Verdict:
    """Judge claim 3: H-Res on a par with VPT, or better.

    It is on a par where the 95 % interval of the difference lies above minus one point, and not where it lies below.
    """
    said, par, below = [], [], []
    for name, entries in results.items():
        for rival in ("VPT-shallow", "VPT-deep"):
            found = gap(entries, SMALL, rival, "accuracy", scale=100)
            low, high = (found.mean - found.margin, found.mean + found.margin) if found else (-math.inf, math.inf)
            par.append(low > -PARITY)
            below.append(high < -PARITY)
            said.append(f"{name}, H-Res minus {rival}: {f'{found} points' if found else 'a run diverged'}")
    return Verdict(
        3,
        "holds" if all(par) else "does not hold" if all(below) else "partly holds",
        "CIFAR-100 59.37 against 58.90 (VPT); SVHN 46.50 against 46.83",
        f"Accuracy at equal budgets, a par being no more than {PARITY:g} point below: {'; '.join(said)}.",
        command_line(),
    )


def study(options: argparse.Namespace, ledger: Ledger) -> Found:
    """Compare the methods on each task."""
    if options.quick:
        vars(options).update(QUICK)
    results: dict[str, list[Entry]] = {}
    tables, every, counts = [], [], {}
    for name, source in last_names(options.data or ["cifar100", "svhn"]).items():
        backbone, parts = read(source, options.model, options)
        problem = problem_of(name, backbone, parts, options)
        results[name] = sweep(problem, arms_of(problem, options.rates), range(options.seeds), ledger)
        column = Column("accuracy", "accuracy", "%", "up", 2)
        tables.append(comparison(name, problem, results[name], column, scale=100, merged=True))
        every += records(problem, results[name])
        counts[name] = {split: len(part) for split, part in parts.items()}
    chosen = {k: getattr(options, k) for k in ("model", "random_weights", "draw", *QUICK, "rates", "precision")}
    judged = options.seeds > 1 and not options.random_weights
    axes = Axis("task"), Axis("accuracy on the test split", "%")
    return Found(
        tables=[*tables, published()],
        plots=[bars("VTAB-1k", axes, results, "accuracy", scale=100)],
        verdicts=[verdict(results)] if judged else [],
        settings={**chosen, **FIT, "images": counts},
        records=every,
        seconds=sum(one.seconds for entries in results.values() for one in every_run(entries)),
    )


def main(arguments: list[str] | None = None) -> int:
    """Run the experiment; return the exit status."""
    parser = parser_of(EXPERIMENT, hub=True)
    parser.add_argument("--model", default="vit_base_patch16_224.orig_in21k", help="of timm or transformers, or folder")
    parser.add_argument("--data", action="append", help="cifar100, svhn, another on the Hub or local; may be repeated")
    parser.add_argument("--steps", type=positive, default=1600, help="optimizer steps of every run")
    parser.add_argument("--batch", type=positive, default=64, help="images of a step")
    parser.add_argument("--draw", type=int, default=0, help="seed that draws the thousand images")
    parser.add_argument("--random-weights", action="store_true", help="untrained, to test the script without weights")
    return run(EXPERIMENT, parser.parse_args(arguments), study)


if __name__ == "__main__":
    sys.exit(main())
