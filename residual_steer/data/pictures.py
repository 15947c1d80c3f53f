"""Labelled images of the Hub or of local files, as pairs of a tensor and a class."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from residual_steer.data.checks import check_integer, check_number
from residual_steer.data.source import Source, check_columns, library, pick, splits, told_name
from residual_steer.errors import SteerError

__all__ = ["ImageRows", "Pixels", "images", "labelled"]

_LABELS = ("label", "labels", "fine_label", "class")


@dataclass(frozen=True)
class Pixels:
    """Turn a PIL image into a tensor: resized without cropping (bilinear), from 0 to 1, less `mean`, over `std`.

    That is what most image processors of ViT do; the defaults are those of Google's ViT, which was pre-trained on
    pixels from -1 to 1. For another model, take its own mean, std and size.

    Attributes:
        size: pixels of a side.
        mean: what is subtracted from each channel; one number makes the image grey, three colour.
        std: what each channel is then divided by.

    Raises:
        SteerError: a value outside these ranges.

    >>> from PIL import Image
    >>> Pixels(size=32)(Image.new("L", (50, 40))).shape
    torch.Size([3, 32, 32])
    """

    size: int = 224
    mean: Sequence[float] = (0.5, 0.5, 0.5)
    std: Sequence[float] = (0.5, 0.5, 0.5)

    def __post_init__(self) -> None:
        check_integer("size", self.size, 1)
        if len(self.mean) not in (1, 3) or len(self.mean) != len(self.std):
            raise SteerError(
                "`mean` and `std` have a number per channel, of which there are one or three; received "
                f"{self.mean!r} and {self.std!r}."
            )
        for value in self.mean:
            check_number("mean", value)
        for value in self.std:
            check_number("std", value, 1e-6)

    def __call__(self, image: Any) -> Tensor:
        """Return the tensor of a PIL image, fp32 `(channels, size, size)`."""
        from PIL import Image

        image = image.convert("RGB" if len(self.mean) == 3 else "L")
        image = image.resize((self.size, self.size), Image.Resampling.BILINEAR)
        pixels = torch.from_numpy(np.array(image, dtype=np.float32)).view(self.size, self.size, -1).permute(2, 0, 1)
        mean, std = (torch.tensor(list(values), dtype=torch.float32).view(-1, 1, 1) for values in (self.mean, self.std))
        return (pixels / 255 - mean) / std


class ImageRows(Dataset[tuple[Any, int]]):
    """Pairs of an image, made ready when it is asked for, and its class.

    Args:
        rows: a `datasets.Dataset` whose column `image` decodes to PIL images.
        image: that column's name.
        labels: the class of each row, counted from 0.
        classes: their names.
        prepare: from a PIL image to what the model takes.
    """

    def __init__(
        self, rows: Any, image: str, labels: Sequence[int], classes: Sequence[str], prepare: Callable[[Any], Any]
    ) -> None:
        self.rows, self.image, self.prepare = rows, image, prepare
        self.labels, self.classes = list(labels), tuple(classes)

    def __len__(self) -> int:
        """Return the number of pairs."""
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """Return an image as `prepare` gives it, and its class.

        Raises:
            SteerError: the image cannot be decoded.
        """
        label = self.labels[index]  # an index beyond the end fails here
        try:
            image = self.rows[index][self.image]
        except Exception as error:  # PIL's decoders raise errors of many kinds
            raise SteerError(
                f"the image of row {index} cannot be decoded: {error}. Leave it out of the data."
            ) from error
        return self.prepare(image), label

    def subset(self, indices: Sequence[int]) -> ImageRows:
        """Return some of the rows, in the order given."""
        rows = self.rows.select(list(indices))
        return ImageRows(rows, self.image, [self.labels[i] for i in indices], self.classes, self.prepare)


def images(
    source: Source,
    split: str = "train",
    *,
    config: str | None = None,
    prepare: Callable[[Any], Any] | None = None,
    image: str | None = None,
    label: str | None = None,
) -> ImageRows:
    """Return the labelled images of a data set on the Hub, a saved one, or a folder with one folder per class.

    Args:
        source: where they are: see `splits`.
        split: which part.
        config: which configuration of the data set, where it has several.
        prepare: from a PIL image to what the model takes; None is `Pixels()`, 3 × 224 × 224 from -1 to 1. With an image
            processor of transformers: `lambda image: processor(image, return_tensors="pt")["pixel_values"][0]`.
        image: the column of images; None finds the only one.
        label: the column of classes; None looks for label, labels, fine_label and class, in this order.

    Returns:
        Pairs of what `prepare` makes, by default fp32 `(3, 224, 224)`, and a class from 0. `classes` has their names,
        the same for all splits.

    Raises:
        SteerError: the source cannot be had, or has no such split, no images or no labels.
    """
    parts = splits(source, config)
    rows = pick(parts, split, source)
    datasets = library()
    pictures = [name for name, feature in rows.features.items() if isinstance(feature, datasets.Image)]
    if image is None and len(pictures) != 1:
        raise SteerError(
            f"{told_name(source)} has {len(pictures) or 'no'} columns of images, and one is needed"
            f"{'; name it: `image`' if pictures else ''}. Its columns are {', '.join(rows.column_names)}."
        )
    image = pictures[0] if image is None else image
    if label is None:
        label = next((name for name in _LABELS if name in rows.column_names), _LABELS[0])
    check_columns(rows, [image, label], source)
    if image not in pictures:
        raise SteerError(f"the column {image!r} of {told_name(source)} holds no images; {pictures or 'none'} does.")
    numbers, classes = _classes(rows, parts, label, source)
    rows = rows.select_columns([image]).cast_column(image, datasets.Image())
    return ImageRows(rows, image, numbers, classes, prepare or Pixels())


def labelled(paths: Sequence[str], labels: Sequence[int], prepare: Callable[[Any], Any] | None) -> ImageRows:
    """Return image files with their classes, from 0."""
    datasets = library()
    rows = datasets.Dataset.from_dict({"image": list(paths)}).cast_column("image", datasets.Image())
    return ImageRows(rows, "image", labels, [str(i) for i in range(max(labels) + 1)], prepare or Pixels())


def _classes(rows: Any, parts: dict[str, Any], label: str, source: Source) -> tuple[list[int], list[str]]:
    """Return the class of each row, and the names of the classes.

    Names that `datasets` knows are taken as they are; other labels, numbers or strings, are counted in their order over
    all splits.

    Raises:
        SteerError: a label is missing, or neither a number nor a string.
    """
    values = list(rows[label])
    names = getattr(rows.features[label], "names", None)
    missing = sum(value is None or (names is not None and value < 0) for value in values)
    if missing:
        raise SteerError(f"{missing} of {len(values)} rows of {told_name(source)} have no {label!r}. Leave them out.")
    if names is not None:
        return values, list(names)
    if not all(isinstance(value, (int, str)) for value in values):
        raise SteerError(
            f"a class is a whole number or a string; the column {label!r} of {told_name(source)} holds "
            f"{rows.features[label]}."
        )
    there = {value for part in parts.values() if label in part.column_names for value in part.unique(label)}
    found = sorted(there - {None}, key=lambda value: (isinstance(value, str), value))
    index = {value: i for i, value in enumerate(found)}
    return [index[value] for value in values], [str(value) for value in found]
