"""Models and data of the Hugging Face Hub, or of a local folder, in place of the small ones.

Text is cut into windows of tokens (bytes, for the small backbones), images are resized and normalised as the model was
trained, and a classifier gets a new head for the data's classes.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import residual_steer as rs
from residual_steer.data import Pixels, TokenBlocks, digits, english_prose, images, splits

from .backbones import Task, small_tasks, some, with_new_head

STEPS, LENGTH, TEXT = 200, 128, 4_000_000  # steps of a task, tokens of a window, characters that are read


@dataclass(frozen=True)
class Text:
    """A text, with its validation part if it comes apart."""

    train: str
    valid: str | None = None


@dataclass(frozen=True)
class Images:
    """Labelled images; `train` and `valid` give pairs of a PIL image and a class index."""

    train: Dataset[Any]
    valid: Dataset[Any]
    classes: int


@dataclass(frozen=True)
class Classifier:
    """An image classifier with a new head, `head`, and `prepare`, from a PIL image to what the model takes."""

    model: nn.Module
    head: str
    prepare: Pixels

    def fresh(self, seed: int) -> nn.Module:
        """Return a copy whose head is made from `seed`."""
        model = copy.deepcopy(self.model)
        torch.manual_seed(seed)
        head: Any = model.get_submodule(self.head)
        head.reset_parameters()
        return model


def language_model(name: str) -> tuple[nn.Module, Any]:
    """Return a causal language model of transformers, and its tokenizer.

    Args:
        name: of a repository on the Hub, or a folder that `save_pretrained` wrote both into.

    Raises:
        SteerError: it cannot be had.
    """
    with one_line(f"the model {name!r}"):
        import transformers

        model = transformers.AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    model.config.use_cache = False
    return model.eval(), tokenizer


def classifier(name: str, classes: int, *, random: bool = False) -> Classifier:
    """Return an image classifier of timm or transformers.

    Args:
        name: a model of timm, `hf-hub:` and a repository with one; a repository of transformers; or a folder that
            `save_for_hf` of timm, or `save_pretrained` of transformers with its image processor wrote.
        classes: of the new head.
        random: whether to leave the weights untrained.

    Raises:
        SteerError: it cannot be had, or has no such head.
    """
    with one_line(f"the model {name!r}"):
        known = _timm_name(name)
        model, prepare = _of_timm(known, classes, random) if known else _of_transformers(name, classes, random)
    heads = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and m.out_features == classes]
    if not heads:
        raise rs.SteerError(f"{type(model).__name__} has no linear layer with {classes} outputs as its head.")
    return Classifier(model.eval(), heads[-1], prepare)


def _timm_name(name: str) -> str | None:
    """Return how timm calls a model; None for one of transformers."""
    import timm

    config = Path(name).expanduser() / "config.json"
    if config.is_file():
        return f"local-dir:{config.parent}" if "architecture" in json.loads(config.read_text("utf-8")) else None
    return name if name.startswith(("hf-hub:", "local-dir:")) or timm.is_model(name) else None


def _of_timm(name: str, classes: int, random: bool) -> tuple[nn.Module, Pixels]:
    import timm

    model = timm.create_model(name, pretrained=not random, num_classes=classes)
    about = timm.data.resolve_model_data_config(model)
    return model, Pixels(about["input_size"][-1], tuple(about["mean"]), tuple(about["std"]))


def _of_transformers(name: str, classes: int, random: bool) -> tuple[nn.Module, Pixels]:
    import transformers

    auto, given = transformers.AutoModelForImageClassification, {"num_labels": classes}
    if random:
        model = auto.from_config(transformers.AutoConfig.from_pretrained(name, **given))
    else:
        model = auto.from_pretrained(name, dtype=torch.float32, ignore_mismatched_sizes=True, **given)
    about = transformers.AutoImageProcessor.from_pretrained(name)
    size = model.config.image_size
    side = size if isinstance(size, int) else size[-1]
    return model, Pixels(side, tuple(about.image_mean), tuple(about.image_std))


def tasks_of(options: argparse.Namespace) -> list[Task]:
    """Return a task for every `--model`, or for the small backbones, all of them or those that `--data` suits."""
    if not options.model and not options.data:
        return small_tasks(options.cache, options.quick)
    data = read_data(options.data, options.cache) if options.data else None
    about = f"→ {options.data}" if options.data else ""
    if data is not None and not options.model:
        names = ["GPT-2", "Mamba"] if isinstance(data, Text) else ["ViT"]
        return [on_data(task, data, about) for task in small_tasks(options.cache, options.quick, names)]
    return [model_task(name, data, about) for name in options.model]


def on_data(task: Task, data: Text | Images, about: str) -> Task:
    """Give a small backbone other data."""
    if isinstance(data, Text):
        train, valid, _ = blocks_of(data, lambda text: list(text.encode()), task.train.length)
        return dataclasses.replace(task, about=f"Python source {about}", train=train, valid=valid)
    base = task.fresh()
    return dataclasses.replace(
        task,
        about=f"digits 0–4 {about}",
        fresh=lambda: with_new_head(base, data.classes),
        train=Prepared(data.train, tiny_grey),
        valid=Prepared(data.valid, tiny_grey),
    )


def model_task(name: str, data: Text | Images | None, about: str) -> Task:
    """Return the task of a causal language model or an image classifier, from the Hub or a folder."""
    from transformers import AutoConfig
    from transformers.models.auto import modeling_auto

    with one_line(f"the model {name!r}"):
        kind = None if _timm_name(name) else AutoConfig.from_pretrained(name).model_type
    if kind is None or kind in modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES:
        if isinstance(data, Text):
            raise rs.SteerError(f"{name!r} classifies images, and the data is text. Give images with --data.")
        pairs = data or images_of_digits()
        found = classifier(name, pairs.classes)
        train, valid = (Prepared(part, found.prepare) for part in (pairs.train, pairs.valid))
        fresh = lambda: found.fresh(torch.initial_seed())  # noqa: E731
        return Task(Path(name).name, about or "→ digits 5–9", "images", fresh, found.head, train, valid, 16, STEPS)
    if kind not in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise rs.SteerError(
            f"--model takes a causal language model or an image classifier; {name!r} is a {kind!r} model."
        )
    if isinstance(data, Images):
        raise rs.SteerError(f"{name!r} is a language model, and the data is images. Give text with --data.")
    model, tokenizer = language_model(name)
    length = min(LENGTH, getattr(model.config, "max_position_embeddings", None) or LENGTH)

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    train, valid, rate = blocks_of(data or Text(english_prose().decode()), encode, length)
    about = about or "→ English prose"
    return Task(Path(name).name, about, "text", lambda: copy.deepcopy(model), None, train, valid, 8, STEPS, rate)


class Prepared(Dataset[Any]):
    """Pairs whose image is made ready when it is asked for."""

    def __init__(self, pairs: Dataset[Any], prepare: Callable[[Any], Tensor]) -> None:
        self.pairs, self.prepare = pairs, prepare

    def __len__(self) -> int:
        """Return the number of pairs."""
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Return an image as a tensor, and its class."""
        image, label = self.pairs[index]
        return self.prepare(image), int(label)


def tiny_grey(image: Any) -> Tensor:
    """Return a picture as the small ViT takes it: `(1, 8, 8)` from -1 to 1."""
    grey = np.asarray(image.convert("L").resize((8, 8)), dtype=np.float32)
    return torch.from_numpy(grey)[None] / 127.5 - 1


def blocks_of(
    data: Text, encode_text: Callable[[str], list[int]], length: int
) -> tuple[Dataset[Any], Dataset[Any], float]:
    """Return windows for training and validation, and the text's tokens per byte."""
    ids = torch.tensor(encode_text(data.train))
    if data.valid is None:
        train, valid, text = TokenBlocks(ids, length, "train"), TokenBlocks(ids, length, "valid"), data.train
    else:
        train, text = TokenBlocks(ids, length, "all"), data.valid
        ids = torch.tensor(encode_text(text))
        valid = TokenBlocks(ids, length, "all")
    return train, some(valid, 128), len(ids) / len(text.encode())


def images_of_digits() -> Images:
    """Return the digits 5–9 as pictures, for a model with an image processor."""
    from PIL import Image

    def pictures(split: str) -> list[tuple[Any, int]]:
        pairs = digits(range(5, 10), split)
        return [(Image.fromarray(((x[0] + 1) * 127.5).byte().numpy()), int(y)) for x, y in pairs]

    return Images(pictures("train"), pictures("valid"), classes=5)


def read_data(name: str, cache: Path) -> Text | Images:
    """Return text or images from a local file or folder, or from the Hub."""
    path = Path(name).expanduser()
    if not path.exists():
        repository, _, config = name.partition(":")
        return understand(name, splits(repository, config or None))
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    if files and all(p.suffix == ".txt" for p in files):
        with one_line(f"the text in {name!r}"):
            return Text("\n".join(p.read_text(encoding="utf-8") for p in files)[:TEXT])
    return understand(name, splits(path, cache=cache / "datasets"))


def understand(name: str, parts: dict[str, Any]) -> Text | Images:
    """Find the pictures or the text in a data set's columns."""
    import datasets

    train = parts["train"] if "train" in parts else next(iter(parts.values()))
    valid = next((parts[k] for k in ("validation", "valid", "dev", "test") if k in parts), None)
    valid = None if valid is train else valid
    columns = train.features
    if any(isinstance(feature, datasets.Image) for feature in columns.values()):
        both = {"train": train, "test": valid} if valid is not None else dict(train.train_test_split(0.2, seed=0))
        pairs = [images(both, split, prepare=lambda image: image) for split in ("train", "test")]
        return Images(pairs[0], some(pairs[1], 512), len(pairs[0].classes))
    texts = [c for c, f in columns.items() if isinstance(f, datasets.Value) and "string" in f.dtype]
    column = "text" if "text" in texts else next(iter(texts), None)
    if column is None:
        raise rs.SteerError(f"{name!r} has neither pictures nor text; its columns are {', '.join(columns)}.")
    return Text(join(train[column]), None if valid is None else join(valid[column]))


def join(texts: Any) -> str:
    """Return documents as one text of bounded length."""
    parts, size = [], 0
    for text in texts:
        parts.append(text or "")
        size += len(parts[-1]) + 1
        if size > TEXT:
            break
    return "\n".join(parts)[:TEXT]


def last_names(paths: Sequence[str]) -> dict[str, str]:
    """Return what tables call models or data, and the names or paths they were given by."""
    found = {Path(path).name: path for path in paths}
    if len(found) < len(paths):
        raise rs.SteerError(f"every model and data set has another last name; received {', '.join(paths)}.")
    return found


def fingerprint(values: Iterable[torch.Tensor]) -> str:
    """Return a short digest of tensors."""
    found = hashlib.sha256()
    for value in values:
        found.update(f"{value.dtype} {tuple(value.shape)};".encode() + value.contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


@contextlib.contextmanager
def one_line(what: str) -> Iterator[None]:
    """Turn the many errors of downloading and reading into one line that says what to do."""
    print(f"reading {what}", flush=True)
    try:
        yield
    except rs.SteerError:
        raise
    except ImportError as error:
        raise rs.SteerError(f'{what} needs a package: {error} pip install "residual-steer[all]".') from error
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        reason = (str(error) or type(error).__name__).strip().splitlines()[0].rstrip(".")
        raise rs.SteerError(
            f"{what} cannot be had: {reason}. Give the name of one on the Hub, and a network, or the path of a local "
            "folder."
        ) from error
