"""Data that every machine has: the source, language reference and character names of Python, scikit-learn's digits."""

from __future__ import annotations

import importlib
import os
import sys
import sysconfig
import unicodedata
from collections.abc import Iterable
from numbers import Integral
from pathlib import Path

import torch
from torch.utils.data import TensorDataset

from residual_steer._checks import check_choice, check_integer, import_optional
from residual_steer.errors import SteerError

__all__ = ["character_names", "digits", "english_prose", "python_source"]

# Tests and tools that say little new, tables, other people's packages, files that differ from machine to machine, and
# the language reference, which `english_prose` is made of.
_SKIPPED = {
    "test", "tests", "idle_test", "idlelib", "lib2to3", "turtledemo", "ensurepip", "encodings", "site-packages",
    "dist-packages", "pydoc_data", "__pycache__", "__phello__",
}  # fmt: skip
_SKIPPED_PREFIXES = ("_sysconfigdata", "config-", "sitecustomize", "usercustomize", "_distutils_system_mod")
_NUMBERED = ("CJK ", "HANGUL SYLLABLE", "KHITAN", "NUSHU CHARACTER-", "TANGUT")
_SPLITS = {"train": (0.0, 0.6), "valid": (0.6, 0.8), "test": (0.8, 1.0), "all": (0.0, 1.0)}  # of each class, shuffled


def python_source(limit: int | None = None) -> bytes:
    """Return the source of Python's standard library without tests, by path: an installation always has the same.

    Args:
        limit: largest number of bytes; None is all, about 8 MB.

    Raises:
        SteerError: this Python came without its library's source, or `limit` is below 1.
    """
    if limit is not None:
        check_integer("limit", limit, 1, meaning="bytes, or None for all")
    root = Path(sysconfig.get_path("stdlib"))
    parts: list[bytes] = []
    size = 0
    for path in _library(root):
        try:
            parts.append(path.read_bytes().replace(b"\r\n", b"\n"))
        except OSError:  # a dangling link, or a file of another user
            continue
        size += len(parts[-1])
        if limit is not None and size >= limit:
            break
    if not parts:
        raise SteerError(
            f"the source of Python's standard library is not at {root}, where this Python keeps its library. Use a "
            "Python that ships it (python.org, pyenv, conda, or Debian's python3), or text of your own."
        )
    return b"".join(parts)[:limit]


def _library(root: Path) -> list[Path]:
    """Return the library's modules, sorted by path, without walking through what is left out."""
    found = []
    for folder, below, files in os.walk(root):
        below[:] = [name for name in below if name not in _SKIPPED and not name.startswith(_SKIPPED_PREFIXES)]
        found += [Path(folder, n) for n in files if n.endswith(".py") and not n.startswith(_SKIPPED_PREFIXES)]
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def english_prose() -> bytes:
    """Return the language reference that ships with Python, each paragraph once: 0.4 MB of English prose.

    Raises:
        SteerError: this Python came without `pydoc_data`.
    """
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except (ImportError, AttributeError) as error:
        raise SteerError(
            "the language reference (pydoc_data.topics) is not in this Python. Use a Python that ships it (python.org, "
            "pyenv, conda, or Debian's libpython3-stdlib), or text of your own."
        ) from error
    paragraphs = dict.fromkeys(part for name in sorted(topics) for part in topics[name].strip().split("\n\n"))
    return "\n\n".join(paragraphs).encode()


def character_names() -> bytes:
    """Return the names of Unicode's characters that are no number, a line each: 0.8 MB of English in capitals."""
    names = (unicodedata.name(chr(point), "") for point in range(sys.maxunicode + 1))
    return "\n".join(name for name in names if name and not name.startswith(_NUMBERED)).encode()


def digits(classes: Iterable[int] = range(10), split: str = "train") -> TensorDataset:
    """Return handwritten digits: 1,797 grey images of 8 × 8 pixels (Alpaydin and Kaynak 1998, UCI).

    Args:
        classes: which digits; labels count from 0 in this order, so that `classes=range(5, 10)` has labels 0 … 4.
        split: `"train"` (60 %), `"valid"` (20 %), `"test"` (20 %) or `"all"`: always the same images of every class.

    Returns:
        Pairs of an image, `(1, 8, 8)`, fp32 from -1 (paper) to 1 (ink), and a label, int64 `()`, class by class.

    Raises:
        SteerError: an unknown split, no class, one twice, one that is no digit, or scikit-learn is not installed.
    """
    wanted = list(classes) if isinstance(classes, Iterable) else []
    digit = all(isinstance(c, Integral) and not isinstance(c, bool) and c in range(10) for c in wanted)
    if not wanted or len(set(wanted)) < len(wanted) or not digit:
        raise SteerError(f"`classes` are different digits from 0 to 9, at least one; received {classes!r}.")
    start, end = _SPLITS[check_choice("split", split, _SPLITS)]
    datasets = import_optional("sklearn.datasets", "the digits ship with scikit-learn, which is not installed", "all")
    pixels, numbers = datasets.load_digits(return_X_y=True)  # grey levels from 0 to 16
    images = torch.as_tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1
    labels = torch.as_tensor(numbers, dtype=torch.int64)
    chosen, new = [], []
    for label, number in enumerate(wanted):
        rows = (labels == number).nonzero().flatten()
        rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(int(number)))]
        chosen.append(rows[round(start * len(rows)) : round(end * len(rows))])
        new.append(torch.full_like(chosen[-1], label))
    return TensorDataset(images[torch.cat(chosen)], torch.cat(new))
