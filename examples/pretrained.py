"""Pre-trained models for the experiments: from the Hub, or from a local folder."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import residual_steer as rs
from hub_tasks import head_of, one_line
from residual_steer.data import Pixels


@dataclass(frozen=True)
class Classifier:
    """An image classifier with a new head.

    Attributes:
        model: in evaluation mode.
        head: the head's name.
        prepare: from a PIL image to what the model takes: resized without cropping, as VTAB has it.
    """

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
    return Classifier(model.eval(), head_of(model, classes), prepare)


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


def last_names(paths: Sequence[str]) -> dict[str, str]:
    """Return what tables call models or data, and the names or paths they were given by.

    Raises:
        SteerError: two have the same last name.
    """
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


def add_options(parser: Any, named: Callable[[str], int]) -> None:
    """Add the options that experiments on pre-trained models share.

    Args:
        parser: of `parser_of`.
        named: reads a positive integer.
    """
    parser.add_argument("--precision", choices=("no", "bf16", "fp16"), default="no", help="autocast in training")
    parser.add_argument("--workers", type=int, default=0, help="processes that read data")
