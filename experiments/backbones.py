"""Small backbones, pre-trained here from scratch and kept in the user's cache, and what they are adapted to.

A byte-level GPT-2 and a byte-level Mamba learn Python source, a ViT learns the digits 0–4. On two CPU cores that takes
about a minute and a half. A cached backbone is used only if it was made by the same recipe from the same data by the
same version of this code, and if its bytes are the ones that were written; else it is made again.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import math
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_model, save_model
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset

import residual_steer as rs
from residual_steer import SteerError
from residual_steer.data import ByteBlocks, digits, english_prose, python_source
from residual_steer.training import evaluate

VERSION = 1  # raise it when the code below changes what a recipe gives
LENGTH = 64  # bytes of a window
SOURCE = 4_000_000  # bytes of Python source
Record = dict[str, Any]


@dataclass(frozen=True)
class Recipe:
    """How a backbone is made: the model's configuration, and its pre-training."""

    name: str
    config: dict[str, Any]
    steps: int
    batch: int
    lr: float
    seed: int = 0


RECIPES = {
    "GPT-2": Recipe(
        "GPT-2",
        {"n_embd": 128, "n_layer": 3, "n_head": 4, "n_positions": LENGTH, "initializer_range": 0.1},
        steps=550,
        batch=16,
        lr=4e-3,
    ),
    "Mamba": Recipe(
        "Mamba",
        {"hidden_size": 128, "num_hidden_layers": 4, "expand": 1, "state_size": 4},
        steps=400,
        batch=16,
        lr=4e-3,
    ),
    "ViT": Recipe("ViT", {"embed_dim": 64, "depth": 4, "num_heads": 4, "patch_size": 2}, steps=300, batch=64, lr=2e-3),
}


def build(recipe: Recipe) -> nn.Module:
    """Return the untrained backbone of a recipe: over bytes, or over grey images of 8 × 8 pixels and five classes."""
    torch.manual_seed(recipe.seed)
    tokens = {"vocab_size": 256, "bos_token_id": 0, "eos_token_id": 0, "use_cache": False}
    if recipe.name == "ViT":
        from timm.models.vision_transformer import VisionTransformer

        return VisionTransformer(img_size=8, in_chans=1, num_classes=5, class_token=True, **recipe.config)
    import transformers

    if recipe.name == "GPT-2":
        dropout = dict.fromkeys(("embd_pdrop", "resid_pdrop", "attn_pdrop"), 0.0)
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(**tokens, **dropout, **recipe.config))
    return transformers.MambaForCausalLM(transformers.MambaConfig(**tokens, pad_token_id=0, **recipe.config))


def quicker(recipe: Recipe) -> Recipe:
    """Return a tiny version of a recipe, for tests."""
    small = {"n_embd": 32, "n_layer": 2, "hidden_size": 32, "num_hidden_layers": 2, "embed_dim": 32, "depth": 2}
    config = {key: small.get(key, value) for key, value in recipe.config.items()}
    return dataclasses.replace(recipe, config=config, steps=20, batch=8)


def get_backbone(name: str, cache: Path, quick: bool = False) -> nn.Module:
    """Return a backbone in evaluation mode, from the cache or pre-trained now; say what it reaches on its own data."""
    recipe = quicker(RECIPES[name]) if quick else RECIPES[name]
    train, valid = pretraining_data(name)

    def pretrain(model: nn.Module) -> Record:
        scan_linearly(model)
        loader, started = DataLoader(train, batch_size=recipe.batch, shuffle=True), time.perf_counter()
        options: dict[str, Any] = {"weight_decay": 0.05, "warmup": 0.1, "seed": recipe.seed}
        rs.fit(model, loader, steps=recipe.steps, lr=recipe.lr, **options)
        seconds, reached = time.perf_counter() - started, evaluate(model, DataLoader(valid, batch_size=64))
        quality = 100 * reached["accuracy"] if "accuracy" in reached else reached["loss"] / math.log(2)
        return {**asdict(recipe), "quality": quality, "seconds": seconds}

    print(f"{name}: looking for the pre-trained backbone in {cache}", flush=True)
    folder = cache / f"{name.lower()}-{key_of(recipe, train)}"
    model, record, found = cached(folder, lambda: build(recipe), pretrain)
    how = "from the cache" if found else f"pre-trained in {record['seconds']:.0f} s"
    unit = "% of digits 0–4" if name == "ViT" else "bits per byte of Python source"
    print(f"{name}: {how}; held out: {record['quality']:.2f} {unit}", flush=True)
    return model


def pretraining_data(name: str) -> tuple[Dataset[Any], Dataset[Any]]:
    """Return training and validation data for the backbone called `name`."""
    if name == "ViT":
        return digits(range(5), "train"), digits(range(5), "valid")
    source = python_source(SOURCE)
    return ByteBlocks(source, LENGTH, "train"), some(ByteBlocks(source, LENGTH, "valid"), 128)


def scan_linearly(model: nn.Module) -> None:
    """Let transformers' Mamba train through a linear scan; `steer` does so itself, all other training needs this."""
    backbone = rs.find_backbone(model)
    if backbone.prepare is not None:
        backbone.prepare(backbone.blocks)


def key_of(recipe: Recipe, data: Dataset[Any]) -> str:
    """Return a short key of the recipe, the data it is trained on and the version of this code."""
    key = hashlib.sha256(json.dumps([VERSION, LENGTH, asdict(recipe)], sort_keys=True).encode())
    for tensor in (data.windows,) if isinstance(data, ByteBlocks) else data.tensors:  # type: ignore[attr-defined]
        key.update(tensor.contiguous().numpy().tobytes())
    return key.hexdigest()[:12]


def cached(
    folder: Path, build: Callable[[], nn.Module], pretrain: Callable[[nn.Module], Record]
) -> tuple[nn.Module, Record, bool]:
    """Return a backbone from its folder, or pre-train it into that folder now.

    Args:
        folder: its place, whose name says what it was made from; `folder_of` gives one.
        build: returns the untrained model.
        pretrain: trains it and returns what is to be remembered about that, `quality` among it.

    Returns:
        The model in evaluation mode, the record, and whether it was there already.

    Raises:
        SteerError: the folder cannot be written.
    """
    found = _is_whole(folder)
    if not found:
        if folder.exists():
            print(f"what is cached in {folder} is damaged; it is made again", file=sys.stderr)
        made = build()
        _write(folder, made, pretrain(made))
    # Also what was made just now is read back, so that a first run and a later one compute the same.
    record = json.loads((folder / "recipe.json").read_text())
    model = build()
    load_model(model, folder / "model.safetensors")
    return model.eval(), record, found


def folder_of(cache: Path, name: str, identity: Any) -> Path:
    """Return the folder of what is made from `identity`, plain values: its name ends in a digest of them."""
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
    return cache / f"{name}-{digest}"


def _write(folder: Path, model: nn.Module, record: Record) -> None:
    """Write the weights and their record aside, then rename."""
    aside = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".making-"))
        save_model(model, str(aside / "model.safetensors"))
        digest = hashlib.sha256((aside / "model.safetensors").read_bytes()).hexdigest()
        (aside / "recipe.json").write_text(json.dumps({**record, "sha256": digest}, indent=2) + "\n")
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(aside, folder)
    except OSError as error:
        if aside is not None:
            shutil.rmtree(aside, ignore_errors=True)
        if not _is_whole(folder):  # nor was another run faster
            raise SteerError(
                f"could not write the cache {folder.parent}: {error.strerror or error}. Give another folder with "
                "--cache."
            ) from error


def _is_whole(folder: Path) -> bool:
    """Return whether a cached backbone is there, and holds the bytes that were written."""
    try:
        record = json.loads((folder / "recipe.json").read_text())
        weights = (folder / "model.safetensors").read_bytes()
        return bool(record["sha256"] == hashlib.sha256(weights).hexdigest() and record["quality"] >= 0)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError):
        return False


def default_cache() -> Path:
    """Return `residual-steer/backbones` in the user's cache folder."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "residual-steer" / "backbones"


@dataclass(frozen=True)
class Task:
    """A backbone and what it is adapted to."""

    backbone: str  # its name
    about: str  # what it is adapted from and to
    kind: str  # `"text"`, measured in bits per byte, or `"images"`, measured by accuracy in %
    fresh: Callable[[], nn.Module]  # returns the pre-trained model, each time a new one; a classifier has a new head
    head: str | None  # name of that head, None for text
    train: Dataset[Any]  # training data
    valid: Dataset[Any]  # validation data
    batch: int  # windows, or images, of a step
    steps: int  # optimizer steps, the same for every method
    tokens_per_byte: float = 1.0  # of the text, to turn a loss per token into bits per byte

    @property
    def unit(self) -> str:
        """What the metric is, with its unit."""
        return "bits per byte" if self.kind == "text" else "accuracy (%)"

    def metric(self, measured: dict[str, float]) -> float:
        """Turn what `evaluate` gives into the task's metric: lower is better for text, higher for images."""
        if self.kind == "text":
            return measured["loss"] / math.log(2) * self.tokens_per_byte
        return 100 * measured["accuracy"]

    def loader(self) -> DataLoader[Any]:
        """Return the training data in shuffled batches."""
        return DataLoader(self.train, batch_size=self.batch, shuffle=True, drop_last=len(self.train) >= self.batch)

    def seeded(self, seed: int) -> nn.Module:
        """Return the model, the random parts of it, such as a new head, made from `seed`."""
        torch.manual_seed(seed)
        return self.fresh()


def small_tasks(cache: Path, quick: bool, names: Iterable[str] = RECIPES) -> list[Task]:
    """Return the tasks of the small backbones: from Python source to English prose, from digits 0–4 to 5–9."""
    tasks = []
    for name in names:
        backbone = get_backbone(name, cache, quick)
        if name == "ViT":
            train, valid = digits(range(5, 10), "train"), digits(range(5, 10), "valid")
            fresh = lambda model=backbone: with_new_head(model, classes=5)  # noqa: E731
            tasks.append(Task("ViT", "digits 0–4 → digits 5–9", "images", fresh, "head", train, valid, 64, 100))
        else:
            train, valid = (ByteBlocks(english_prose(), LENGTH, split) for split in ("train", "valid"))
            fresh = lambda model=backbone: copy.deepcopy(model)  # noqa: E731
            about = "Python source → English prose"
            # fewer steps than the demo's: there are so many runs of them
            tasks.append(Task(name, about, "text", fresh, None, train, some(valid, 128), 16, 40))
    return tasks


def with_new_head(model: nn.Module, classes: int) -> nn.Module:
    """Return a copy of a timm model whose head is new and untrained."""
    model = copy.deepcopy(model)
    model.reset_classifier(classes)
    return model


def some(data: Dataset[Any], count: int) -> Dataset[Any]:
    """Return at most `count` items, evenly spread."""
    stride = max(1, len(data) // count)
    return Subset(data, range(0, len(data), stride)[:count])
