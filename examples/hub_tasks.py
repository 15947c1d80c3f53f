"""Models and data of the Hugging Face Hub, or of a local folder, in place of the small ones.

Which Auto class a model needs is read from its configuration. Text is cut into windows of tokens (bytes, for the small
backbones), images go through the model's own image processor, and a classifier gets a new head for the data's classes.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import residual_steer as rs
from residual_steer.data import TokenBlocks, digits, english_prose, images, splits
from tasks import Task, small_tasks, some, with_new_head

STEPS, LENGTH, TEXT = 200, 128, 4_000_000  # steps of a task, tokens of a window, characters that are read
RATES = {"new head alone": 5e-3, "H-Res": 1e-3, "full fine-tuning": 5e-5}  # customary for pre-trained models


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


def hub_tasks(options: argparse.Namespace) -> list[Task]:
    """Return a task for every `--model`, or for the small backbones that `--data` suits.

    Raises:
        SteerError: a model or data that cannot be had or don't fit each other.
    """
    data = read_data(options.data, options.cache) if options.data else None
    about = f"→ {options.data}" if options.data else ""
    if data is not None and not options.model:
        names = ["GPT-2", "Mamba"] if isinstance(data, Text) else ["ViT"]
        return [on_data(task, data, about) for task in small_tasks(options.cache, options.quick, names)]
    return [model_task(name, data, about) for name in options.model or []]


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
    """Return the task of a model from the Hub or a folder.

    Raises:
        SteerError: it cannot be had, is neither a causal language model nor an image classifier, or the data is of the
            other kind.
    """
    import transformers
    from transformers.models.auto import modeling_auto

    with one_line(f"the model {name!r}"):
        kind = transformers.AutoConfig.from_pretrained(name).model_type
    if kind in modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES:
        if isinstance(data, Text):
            raise rs.SteerError(f"{name!r} classifies images, and the data is text. Give images with --data.")
        return image_task(name, data or images_of_digits(), about or "→ digits 5–9")
    if kind in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        if isinstance(data, Images):
            raise rs.SteerError(f"{name!r} is a language model, and the data is images. Give text with --data.")
        return text_task(name, data or Text(english_prose().decode()), about or "→ English prose")
    raise rs.SteerError(f"--model takes a causal language model or an image classifier; {name!r} is a {kind!r} model.")


def text_task(name: str, data: Text, about: str) -> Task:
    """Return the task of a causal language model, with its own tokenizer."""
    import transformers

    with one_line(f"the model {name!r}"):
        model = transformers.AutoModelForCausalLM.from_pretrained(name)
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    model.config.use_cache = False
    length = min(LENGTH, getattr(model.config, "max_position_embeddings", None) or LENGTH)
    train, valid, tokens_per_byte = blocks_of(data, lambda text: encode(tokenizer, text), length)
    return Task(
        backbone=Path(name).name,
        about=about,
        kind="text",
        fresh=lambda: copy.deepcopy(model),
        head=None,
        train=train,
        valid=valid,
        batch=8,
        steps=STEPS,
        rates=RATES,
        tokens_per_byte=tokens_per_byte,
    )


def image_task(name: str, data: Images, about: str) -> Task:
    """Return the task of an image classifier, with its own image processor and a new head."""
    import transformers

    with one_line(f"the model {name!r}"):
        model = transformers.AutoModelForImageClassification.from_pretrained(
            name, num_labels=data.classes, ignore_mismatched_sizes=True
        )
        processor = transformers.AutoImageProcessor.from_pretrained(name)
    head = head_of(model, data.classes)

    def fresh() -> nn.Module:
        new = copy.deepcopy(model)
        new.get_submodule(head).reset_parameters()
        return new

    def pixels(image: Any) -> Tensor:
        return processor(image.convert("RGB"), return_tensors="pt")["pixel_values"][0]

    return Task(
        backbone=Path(name).name,
        about=about,
        kind="images",
        fresh=fresh,
        head=head,
        train=Prepared(data.train, pixels),
        valid=Prepared(data.valid, pixels),
        batch=16,
        steps=STEPS,
        rates=RATES,
    )


def head_of(model: nn.Module, classes: int) -> str:
    """Return the name of the last linear layer with one output per class.

    Raises:
        SteerError: there is none.
    """
    found = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and m.out_features == classes]
    if not found:
        raise rs.SteerError(f"{type(model).__name__} has no linear layer with {classes} outputs as its head.")
    return found[-1]


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


def encode(tokenizer: Any, text: str) -> list[int]:
    """Tokenize a long text, without a model's warning that it is long."""
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


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
    """Return text or images from a local file or folder, or from the Hub.

    Raises:
        SteerError: it is not there, cannot be read, or has neither text nor labelled images.
    """
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
    """Find the pictures or the text in a data set's columns.

    Raises:
        SteerError: it has neither.
    """
    import datasets

    train = parts["train"] if "train" in parts else next(iter(parts.values()))
    valid = next((parts[k] for k in ("validation", "valid", "dev", "test") if k in parts), None)
    valid = None if valid is train else valid
    columns = train.features
    if any(isinstance(feature, datasets.Image) for feature in columns.values()):
        return images_of(train, valid)
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


def images_of(train: Any, valid: Any) -> Images:
    """Return the pairs of a data set of pictures; a fifth is held out where it has no validation part."""
    parts = {"train": train, "test": valid} if valid is not None else dict(train.train_test_split(0.2, seed=0))
    pairs = [images(parts, split, prepare=as_it_is) for split in ("train", "test")]
    return Images(pairs[0], some(pairs[1], 512), len(pairs[0].classes))


def as_it_is(image: Any) -> Any:
    """Leave a picture to the model's own image processor."""
    return image


@contextlib.contextmanager
def one_line(what: str) -> Iterator[None]:
    """Turn the many errors of downloading and reading into one line that says what to do.

    Raises:
        SteerError: in their place.
    """
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


def quiet_libraries() -> None:
    """Keep the notes and progress bars of transformers, datasets and the Hub's client out of ours."""
    with contextlib.suppress(ImportError):
        import huggingface_hub

        huggingface_hub.logging.set_verbosity_error()
    with contextlib.suppress(ImportError):
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
    with contextlib.suppress(ImportError):
        import datasets

        datasets.logging.set_verbosity_error()
        datasets.disable_progress_bars()
