"""What is adapted to what: a backbone with its data, the small ones of `small_backbones.py`."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset

from residual_steer.data import ByteBlocks, digits, english_prose
from small_backbones import LENGTH, RECIPES, Pretrained, Recipe, get_backbone


@dataclass(frozen=True)
class Task:
    """One row of the table.

    Attributes:
        backbone: its name.
        about: what it is adapted from and to.
        kind: `"text"`, measured in bits per byte, or `"images"`, measured by accuracy in %.
        fresh: returns the pre-trained model, each time a new one; a classifier has a new head.
        head: name of that head, None for text.
        train: training data.
        valid: validation data.
        batch: windows, or images, of a step.
        steps: optimizer steps, the same for every method.
        rates: peak learning rate per method. The small backbones' were chosen with another seed from three or more
            values (1, 2 and 5 times powers of ten), for each method by itself.
        tokens_per_byte: of the text, to turn a loss per token into bits per byte.
    """

    backbone: str
    about: str
    kind: str
    fresh: Callable[[], nn.Module]
    head: str | None
    train: Dataset[Any]
    valid: Dataset[Any]
    batch: int
    steps: int
    rates: dict[str, float]
    tokens_per_byte: float = 1.0

    @property
    def unit(self) -> str:
        """What the metric is, with its unit."""
        return "bits per byte" if self.kind == "text" else "accuracy (%)"

    def metric(self, measured: dict[str, float]) -> float:
        """Turn what `evaluate` gives into the task's metric: lower is better for text, higher for images."""
        if self.kind == "text":
            return measured["loss"] / math.log(2) * self.tokens_per_byte
        return 100 * measured["accuracy"]

    def loaders(self) -> tuple[DataLoader[Any], DataLoader[Any]]:
        """Return loaders of the training data, shuffled, and of the validation data."""
        train = DataLoader(self.train, batch_size=self.batch, shuffle=True, drop_last=len(self.train) >= self.batch)
        return train, DataLoader(self.valid, batch_size=4 * self.batch)


def small_tasks(cache: Path, quick: bool, names: Iterable[str] = RECIPES) -> list[Task]:
    """Return the tasks of the small backbones, which are pre-trained first if the cache has them not.

    Args:
        cache: folder of the cache.
        quick: make tiny versions, which learn next to nothing, for tests.
        names: of the backbones.
    """
    tasks = []
    for name in names:
        recipe = quicker(RECIPES[name]) if quick else RECIPES[name]
        print(f"{name}: looking for the pre-trained backbone in {cache}", flush=True)
        backbone = get_backbone(recipe, cache)
        how = "from the cache" if backbone.was_cached else f"pre-trained in {backbone.seconds:.0f} s"
        unit = "% of digits 0–4" if name == "ViT" else "bits per byte of Python source"
        print(f"{name}: {how}; held out: {backbone.quality:.2f} {unit}", flush=True)
        tasks.append(vision_task(backbone) if name == "ViT" else language_task(name, backbone))
    return tasks


def quicker(recipe: Recipe) -> Recipe:
    """Return a tiny version of a recipe, for tests."""
    small = {"n_embd": 32, "n_layer": 2, "hidden_size": 32, "num_hidden_layers": 2, "embed_dim": 32, "depth": 2}
    config = {key: small.get(key, value) for key, value in recipe.config.items()}
    return dataclasses.replace(recipe, config=config, steps=20, batch=8)


def language_task(name: str, backbone: Pretrained) -> Task:
    """From Python source to English prose."""
    return Task(
        backbone=name,
        about="Python source → English prose",
        kind="text",
        fresh=lambda: copy.deepcopy(backbone.model),
        head=None,
        train=ByteBlocks(english_prose(), LENGTH, "train"),
        valid=some(ByteBlocks(english_prose(), LENGTH, "valid"), 128),
        batch=16,
        steps=80,
        rates={"H-Res": 2e-2, "full fine-tuning": 2e-3},
    )


def vision_task(backbone: Pretrained) -> Task:
    """From the digits 0–4 to the digits 5–9."""
    return Task(
        backbone="ViT",
        about="digits 0–4 → digits 5–9",
        kind="images",
        fresh=lambda: with_new_head(backbone.model, classes=5),
        head="head",
        train=digits(range(5, 10), "train"),
        valid=digits(range(5, 10), "valid"),
        batch=64,
        steps=100,
        rates={"new head alone": 5e-2, "H-Res": 2e-2, "full fine-tuning": 2e-3},
    )


def with_new_head(model: nn.Module, classes: int) -> nn.Module:
    """Return a copy of a timm model whose head is new and untrained."""
    model = copy.deepcopy(model)
    model.reset_classifier(classes)
    return model


def some(data: Dataset[Any], count: int) -> Dataset[Any]:
    """Return at most `count` items, evenly spread."""
    stride = max(1, len(data) // count)
    return Subset(data, range(0, len(data), stride)[:count])


def seeded(task: Task, seed: int) -> nn.Module:
    """Return the task's model, the random parts of it, such as a new head, made from `seed`."""
    torch.manual_seed(seed)
    return task.fresh()
