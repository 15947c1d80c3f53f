"""Small images that ship with scikit-learn."""

from __future__ import annotations

import importlib
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from residual_steer.errors import SteerError

__all__ = ["digits"]

# Of each class: the first 60 % of a fixed shuffle is for training, and so on.
_SPLITS = {"train": (0.0, 0.6), "valid": (0.6, 0.8), "test": (0.8, 1.0), "all": (0.0, 1.0)}


def digits(classes: Iterable[int] = range(10), split: str = "train") -> TensorDataset:
    """Return handwritten digits: 1,797 grey images of 8 × 8 pixels (Alpaydin and Kaynak 1998, UCI).

    Args:
        classes: which digits; labels count from 0 in this order, so that `classes=range(5, 10)` has labels 0 … 4.
        split: `"train"` (60 %), `"valid"` (20 %), `"test"` (20 %) or `"all"`; the same share of every class, and
            always the same images.

    Returns:
        Pairs of an image, `(1, 8, 8)`, fp32 from -1 (paper) to 1 (ink), and a label, int64 `()`, class by class.

    Raises:
        SteerError: an unknown split, no class, one twice, one that is no digit, or scikit-learn is not installed.

    >>> image, label = digits(classes=range(5, 10), split="valid")[0]
    >>> image.shape, label
    (torch.Size([1, 8, 8]), tensor(0))
    """
    wanted = list(classes)
    if not wanted or len(set(wanted)) < len(wanted) or any(c not in range(10) for c in wanted):
        raise SteerError(f"`classes` are different digits from 0 to 9, at least one; received {wanted!r}.")
    if split not in _SPLITS:
        raise SteerError(f"`split` is one of {', '.join(_SPLITS)}; received {split!r}.")
    images, labels = _load()
    start, end = _SPLITS[split]
    chosen = []
    for digit in wanted:
        rows = (labels == digit).nonzero().flatten()
        rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(digit))]
        chosen.append(rows[round(start * len(rows)) : round(end * len(rows))])
    new = torch.cat([torch.full((len(rows),), label) for label, rows in enumerate(chosen)])
    return TensorDataset(images[torch.cat(chosen)], new)


def _load() -> tuple[Tensor, Tensor]:
    """Return images `(1797, 1, 8, 8)` from -1 to 1 and their digits `(1797,)`.

    Raises:
        SteerError: scikit-learn is not installed.
    """
    try:
        datasets = importlib.import_module("sklearn.datasets")
    except ImportError as error:
        raise SteerError(
            'the digits ship with scikit-learn, which is not installed: pip install "residual-steer[all]".'
        ) from error
    pixels, labels = datasets.load_digits(return_X_y=True)  # grey levels from 0 to 16
    images = torch.as_tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1
    return images, torch.as_tensor(labels, dtype=torch.int64)
