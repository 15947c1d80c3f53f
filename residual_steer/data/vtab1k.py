"""VTAB-1k: a thousand labelled images of a task (Zhai et al. 2019, arXiv 1910.04867)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from residual_steer.data.checks import generator
from residual_steer.data.pictures import ImageRows, images, labelled
from residual_steer.data.source import Source, is_local, told_name
from residual_steer.errors import SteerError

__all__ = ["vtab"]

_TASKS = {"cifar100": ("uoft-cs/cifar100", None), "svhn": ("ufldl-stanford/svhn", "cropped_digits")}
_PARTS = {"train800": (0, 800), "val200": (800, 1000), "train800val200": (0, 1000)}


def vtab(
    source: Source,
    split: str = "train800",
    *,
    seed: int = 0,
    config: str | None = None,
    prepare: Callable[[Any], Any] | None = None,
    label: str | None = None,
) -> ImageRows:
    """Return a task of VTAB-1k: 800 + 200 images for training and validation, and the whole test split.

    The protocol: choose hyperparameters by training on `"train800"` and measuring on `"val200"`, train once more on
    `"train800val200"`, report the accuracy on `"test"`.

    The thousand are drawn from the train split without replacement and without regard to their classes, as VTAB's own
    are: those are slices of the order in which TensorFlow Datasets stores the data, which cannot be had from the Hub.
    So these are other images than VTAB's, and other seeds give others again. A folder with the lists of VTAB's own
    images that go round (`train800.txt`, …, lines of a path within the folder and a class) is read as those lists say.

    Args:
        source: `"cifar100"` (uoft-cs/cifar100, its 100 fine labels), `"svhn"` (ufldl-stanford/svhn, cropped digits),
            any other data set with a train and a test split, or a local copy: see `splits`.
        split: `"train800"`, `"val200"`, `"train800val200"` or `"test"`.
        seed: which thousand.
        config: as in `images`.
        prepare: as in `images`; VTAB resizes to 224 × 224 pixels.
        label: as in `images`.

    Raises:
        SteerError: an unknown split, fewer than a thousand training images, or as `images`.
    """
    if split not in (*_PARTS, "test"):
        raise SteerError(f"`split` is one of {', '.join(_PARTS)} or test; received {split!r}.")
    random = generator(seed)
    if is_local(source):
        folder = Path(source).expanduser()
        if (folder / f"{split}.txt").exists():
            return _listed(folder, split, prepare)
    elif isinstance(source, str) and source in _TASKS:
        source, known = _TASKS[source]
        config = config or known
    test = split == "test"
    rows = images(source, "test" if test else "train", config=config, prepare=prepare, label=label)
    if test:
        return rows
    if len(rows) < 1000:
        raise SteerError(f"VTAB-1k draws 1,000 images for training; {told_name(source)} has {len(rows):,}.")
    start, end = _PARTS[split]
    return rows.subset(torch.randperm(len(rows), generator=random)[start:end].tolist())


def _listed(folder: Path, split: str, prepare: Callable[[Any], Any] | None) -> ImageRows:
    """Return the images of a list.

    Raises:
        SteerError: a line is not a path and a class, or a file is not there.
    """
    lists = folder / f"{split}.txt"
    paths, labels = [], []
    for number, line in enumerate(filter(str.strip, lists.read_text(encoding="utf-8").splitlines()), 1):
        name, _, value = line.strip().rpartition(" ")
        if not value.isdecimal() or not (folder / name).is_file():
            raise SteerError(
                f"a line of {str(lists)!r} is the path of an image within that folder, a space and a class from 0; "
                f"line {number} is {line!r}."
            )
        paths.append(str(folder / name))
        labels.append(int(value))
    if not labels:
        raise SteerError(f"{str(lists)!r} lists no image.")
    return labelled(paths, labels, prepare)
