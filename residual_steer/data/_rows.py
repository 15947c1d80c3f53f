"""What data sets have in common: rows of tokens, windows of a text, images with classes, checks of arguments."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from residual_steer.errors import SteerError

__all__ = [
    "ByteBlocks",
    "ImageRows",
    "Pixels",
    "TokenBlocks",
    "TokenRows",
    "check_integer",
    "check_number",
    "check_tokens",
    "generator",
]

_SEEDS = 2**40
_STRETCHES = 10


def check_integer(name: str, value: object, least: int) -> int:
    """Return an argument that is a whole number of at least `least`."""
    if isinstance(value, bool) or not hasattr(value, "__index__") or operator.index(value) < least:
        raise SteerError(f"`{name}` is an integer of at least {least}; received {value!r}.")
    return operator.index(value)


def check_number(name: str, value: object, least: float = 0.0) -> float:
    """Return an argument that is a finite number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value < least:
        raise SteerError(f"`{name}` is a finite number of at least {least:g}; received {value!r}.")
    return float(value)


def check_tokens(name: str, value: object, least: int) -> Tensor:
    """Return an argument that lists at least `least` different tokens, as int64 `(tokens,)`."""
    listed = list(value) if isinstance(value, Iterable) and not isinstance(value, (str, bytes)) else []
    whole = all(hasattr(token, "__index__") and operator.index(token) >= 0 for token in listed)
    if not whole or len(set(listed)) < max(1, len(listed), least):
        raise SteerError(
            f"`{name}` lists at least {max(1, least)} different tokens, as range(1, 100) does; received {value!r:.200}."
        )
    return torch.tensor(listed, dtype=torch.int64)


def generator(seed: object, stream: int = 0) -> torch.Generator:
    """Return a source of random numbers; other streams of a seed, and other seeds, have other numbers."""
    if isinstance(seed, bool) or not hasattr(seed, "__index__") or not 0 <= operator.index(seed) < _SEEDS:
        raise SteerError(f"`seed` is an integer from 0 to 2^40 - 1; received {seed!r}.")
    mixed = np.random.SeedSequence([operator.index(seed), stream]).generate_state(1)
    return torch.Generator().manual_seed(int(mixed[0]))  # which takes no more than 32 bits into account


class TokenRows(Dataset[dict[str, Tensor]]):
    """Rows `{"input_ids": (length,), "labels": (length,)}`, and whatever else a model takes, all int64.

    Labels follow transformers' convention: `labels[i]` is predicted from `input_ids[:i]`, since the model shifts them
    itself, and -100 counts for nothing.

    Args:
        columns: tensors of shape `(rows, length)` by name, of any integer type.
    """

    def __init__(self, **columns: Tensor) -> None:
        self.columns = columns

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(next(iter(self.columns.values())))

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return a row; its tensors share no memory with the data set's."""
        return {name: column[index].to(torch.int64, copy=True) for name, column in self.columns.items()}


class TokenBlocks(Dataset[dict[str, Tensor]]):
    """Consecutive windows of a sequence, as a causal language model takes them.

    A window is `{"input_ids": (length,), "labels": (length,)}`, both int64 and equal: models shift the labels
    themselves. No token is in two windows; a rest shorter than a window is dropped. The sequence is cut into up to ten
    stretches and the end of each is validation, so that both splits see every part of it, and touch in few places.

    Args:
        ids: the sequence, `(tokens,)`.
        length: tokens of a window, at least 2.
        split: `"train"`, `"valid"` or `"all"`.
        share: share of the windows that is validation, between 0 and 1.

    Raises:
        SteerError: an argument outside these ranges, or too short a sequence for one window in the split.

    >>> blocks = TokenBlocks(torch.arange(100), length=10, split="valid")
    >>> len(blocks), blocks[0]["input_ids"][:3]
    (1, tensor([90, 91, 92]))
    """

    def __init__(self, ids: Tensor, length: int, split: str = "train", share: float = 0.1) -> None:
        if isinstance(length, bool) or not isinstance(length, int) or length < 2:
            raise SteerError(f"`length` is an integer of at least 2, one token and the next; received {length!r}.")
        if split not in ("train", "valid", "all"):
            raise SteerError(f"`split` is 'train', 'valid' or 'all'; received {split!r}.")
        if not 0 < share < 1:
            raise SteerError(f"`share`, of the windows that are validation, lies between 0 and 1; received {share!r}.")
        if ids.dim() != 1:
            raise SteerError(f"the tokens are one sequence, of shape (tokens,); received {tuple(ids.shape)}.")
        count = ids.numel() // length
        held_out = _held_out(count, share)
        keep = torch.ones_like(held_out) if split == "all" else held_out if split == "valid" else ~held_out
        self.length, self.split = length, split
        self.windows = ids[: count * length].view(count, length)[keep]
        if not len(self.windows):
            raise SteerError(
                f"{ids.numel():,} tokens have {count} windows of {length}, none of which is left for the split "
                f"{split!r}. Give a longer text or a shorter `length`."
            )

    def __len__(self) -> int:
        """Return the number of windows."""
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return a window; `input_ids` and `labels` do not share memory."""
        ids = self.windows[index].long()
        return {"input_ids": ids, "labels": ids.clone()}


class ByteBlocks(TokenBlocks):
    """The same over bytes: the vocabulary is 256, and a loss in nats divided by ln 2 is in bits per byte.

    Args:
        data: the bytes.
        length: bytes of a window, at least 2.
        split: `"train"`, `"valid"` or `"all"`.
        share: share of the windows that is validation.

    Raises:
        SteerError: as `TokenBlocks`.

    >>> from residual_steer.data import english_prose
    >>> ByteBlocks(english_prose(), length=128)[0]["input_ids"].shape
    torch.Size([128])
    """

    def __init__(self, data: bytes, length: int, split: str = "train", share: float = 0.1) -> None:
        if not isinstance(data, (bytes, bytearray)):
            raise SteerError(f"`data` is bytes; received {type(data).__name__}. Encode text: text.encode().")
        ids = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
        super().__init__(ids, length, split, share)


def _held_out(count: int, share: float) -> Tensor:
    """Return which of `count` windows are validation: the last `share` of each stretch."""
    stretches = max(1, min(_STRETCHES, int(count * share)))
    position = torch.arange(count) * stretches % max(1, count)
    return position >= (1 - share) * count - 1e-6


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
