"""Data sets of the Hugging Face Hub, or of local files in the formats of `datasets`: any splits, images, VTAB-1k.

`datasets` is imported when it is needed. What it raises becomes a SteerError with what was wanted and what to do.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from residual_steer._checks import check_choice, check_integer, check_number, import_optional
from residual_steer.errors import SteerError, some
from residual_steer.hub import is_repo

from .synthetic import generator

__all__ = ["ImageRows", "Pixels", "Plan", "check_columns", "images", "named", "one_split", "plan", "splits", "vtab"]

Source = str | os.PathLike[str] | Mapping[str, Any] | Any  # the last: a datasets.Dataset

_log = logging.getLogger(__name__)

_FORMATS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv", ".txt": "text", ".arrow": "arrow"}
_SPLIT_WORDS = {"train": {"training"}, "validation": {"valid", "val", "dev"}, "test": {"testing"}}
_LOCAL = (
    "a folder that `save_to_disk` wrote, Parquet, JSON, JSON-lines, CSV or text files, a copy of a repository of the "
    "Hub, or a folder of pictures, one folder per class"
)
_LABELS = ("label", "labels", "fine_label", "class")
_TASKS = {"cifar100": ("uoft-cs/cifar100", None), "svhn": ("ufldl-stanford/svhn", "cropped_digits")}
_PARTS = {"train800": slice(800), "val200": slice(800, 1000), "train800val200": slice(1000)}


@dataclass(frozen=True)
class Plan:
    """What reading a data set would take; as a string, in one line.

    Attributes:
        source: its name or path.
        config: which of its configurations.
        download: whether anything of it has to be downloaded.
        bytes: size of the download, None where the Hub does not say.
        rows: rows by split, as far as they are known before reading.
    """

    source: str
    config: str | None
    download: bool
    bytes: int | None
    rows: Mapping[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        name = self.source if self.config in (None, "default") else f"{self.source} ({self.config})"
        rows = ", ".join(f"{split} {count:,}" for split, count in self.rows.items())
        size = "of unknown size" if self.bytes is None else f"of {self.bytes / 1e6:,.1f} MB"
        how = f"a download {size} from the Hugging Face Hub" if self.download else "nothing to download"
        return f"{name}: {how}" + (f"; rows: {rows}" if rows else "")


def plan(source: Source, config: str | None = None) -> Plan:
    """Return what `splits`, or whatever takes a source, would download; the Hub is asked for the metadata alone.

    Raises:
        SteerError: the source is not there, or the Hub cannot be asked.
    """
    if not isinstance(source, (str, os.PathLike)):
        return Plan("data in memory", config, False, 0, {name: len(rows) for name, rows in _loaded(source).items()})
    if _is_local(source):
        return Plan(os.fspath(source), config, False, 0)
    with _explained(source, config):
        return _planned(os.fspath(source), _builder(os.fspath(source), config, None))


def splits(source: Source, config: str | None = None, *, cache: str | os.PathLike[str] | None = None) -> dict[str, Any]:
    """Return the splits of a data set by name, each a `datasets.Dataset`.

    Before a download, its name and size are logged as a warning of the logger `residual_steer.data.hub`.

    Args:
        source: a path: a folder that `save_to_disk` wrote, Parquet, JSON, JSON-lines, CSV or text files, a copy of a
            repository, or a folder of pictures, one folder per class; "owner/name" on the Hub where no such path is
            there; or what `datasets` has loaded. The split of a local file is read from its name (train, validation
            or dev, test), and is train where that says nothing.
        config: which configuration of the data set, where it has several. A local source that has none ignores it.
        cache: folder for what is downloaded and prepared; None is that of `datasets`.

    Raises:
        SteerError: the source is not there, cannot be reached or read, or `datasets` is not installed.
    """
    cache = None if cache is None else os.fspath(cache)
    if not isinstance(source, (str, os.PathLike)):
        return _loaded(source)
    with _explained(source, config):
        if _is_local(source):
            return _loaded(_local(Path(source).expanduser(), config, cache))
        builder = _builder(os.fspath(source), config, cache)
        planned = _planned(os.fspath(source), builder)
        if planned.download:
            _log.warning("%s", planned)
        builder.download_and_prepare()
        return dict(builder.as_dataset())


def one_split(source: Source, split: str, config: str | None = None) -> Any:
    """Return one split of a data set, as a `datasets.Dataset` of plain Python values; raise if it has no row."""
    return _pick(splits(source, config), split, source)


def check_columns(rows: Any, wanted: Iterable[str], source: Source) -> None:
    """Raise SteerError if a split lacks a column; the message lists those that are there."""
    absent = [name for name in wanted if name not in rows.column_names]
    if absent:
        raise SteerError(
            f"{named(source)} has no column {' and none '.join(map(repr, absent))}; its columns are "
            f"{', '.join(rows.column_names)}."
        )


def named(source: Source) -> str:
    """Return how a source is called in messages."""
    return repr(os.fspath(source)) if isinstance(source, (str, os.PathLike)) else "the data set in memory"


def _pick(parts: Mapping[str, Any], split: str, source: Source) -> Any:
    """Return one of the splits of a source, if it has rows."""
    if split not in parts:
        raise SteerError(
            f"{named(source)} has no split {split!r}; it has {', '.join(parts) or 'none'}. The split of a local "
            "file is read from its name, as in train.parquet or test.jsonl."
        )
    rows = parts[split].with_format(None)
    if not len(rows):
        raise SteerError(f"the split {split!r} of {named(source)} has no rows.")
    return rows


def _is_local(source: Source) -> TypeGuard[str | os.PathLike[str]]:
    return isinstance(source, (str, os.PathLike)) and os.path.exists(os.path.expanduser(source))


def _library() -> Any:
    why = "data sets of the Hub, and local ones, are read by `datasets`"
    return import_optional("datasets", why, "datasets")


def _loaded(source: Any) -> dict[str, Any]:
    """Return what `datasets` has loaded as splits by name."""
    datasets = _library()
    if isinstance(source, datasets.Dataset):
        return {str(source.split or "train"): source}
    if isinstance(source, Mapping) and all(isinstance(rows, datasets.Dataset) for rows in source.values()):
        return dict(source)
    raise SteerError(
        f"a data set is named by a path or by 'owner/name' on the Hub, or is what `datasets` has loaded; received "
        f"{type(source).__name__}."
    )


def _local(path: Path, config: str | None, cache: str | None) -> Any:
    """Read a local file or folder."""
    datasets = _library()
    if path.is_file():
        if path.suffix.lower() not in _FORMATS:
            raise SteerError(f"a local source is {_LOCAL}; {str(path)!r} is none of these.")
        words = set(re.split(r"[^a-z]+", path.stem.lower()))
        split = next((split for split, more in _SPLIT_WORDS.items() if words & {split, *more}), "train")
        return datasets.load_dataset(_FORMATS[path.suffix.lower()], data_files={split: str(path)}, cache_dir=cache)
    if config and (path / config).is_dir():
        path = path / config
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        return datasets.load_from_disk(str(path))
    try:
        known = datasets.get_dataset_config_names(str(path))
        if config not in known and known != ["default"]:
            raise SteerError(f"{str(path)!r} has the configurations {', '.join(known)}; received {config!r}.")
        return datasets.load_dataset(str(path), config if config in known else None, cache_dir=cache)
    except FileNotFoundError as error:
        raise SteerError(f"a local source is {_LOCAL}; {str(path)!r} has none of these.") from error


def _builder(name: str, config: str | None, cache: str | None) -> Any:
    """Return what will download and prepare a data set of the Hub."""
    if not is_repo(name):
        raise SteerError(
            f"there is no file or folder {name!r}, and it is no name on the Hub, as 'owner/name' is. A local source is "
            f"{_LOCAL}."
        )
    return _library().load_dataset_builder(name, config, cache_dir=cache)


def _planned(name: str, builder: Any) -> Plan:
    info, there = builder.info, Path(builder.cache_dir).exists()
    rows = {str(name): part.num_examples for name, part in (info.splits or {}).items() if part.num_examples}
    return Plan(name, builder.config.name, not there, 0 if there else info.download_size, rows)


@contextlib.contextmanager
def _explained(source: str | os.PathLike[str], config: str | None) -> Iterator[None]:
    """Turn whatever is raised inside, by one of the many libraries below `datasets`, into one line."""
    try:
        yield
    except SteerError:
        raise
    except Exception as error:
        name, which = os.fspath(source), f" ({config})" if config else ""
        call = ", ".join(repr(part) for part in (name, config) if part)
        advice = (
            f"Give the name of one on the Hub, and a network; or a local copy: where there is a network, "
            f"datasets.load_dataset({call}).save_to_disk(folder), and that folder as the source here."
        )
        advice = "Look at the files." if _is_local(source) else advice
        raise SteerError(f"the data set {name!r}{which} cannot be had: {_reason(error)}. {advice}") from error


def _reason(error: BaseException) -> str:
    """Return in words why reading failed."""
    from huggingface_hub import constants

    if isinstance(error, ConnectionError):
        tried = "was not asked, since HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "could not be reached"
        return f"the Hub {tried}, and it is not in the cache"
    while error.__cause__ is not None and "error occurred while" in str(error):  # says no more than that
        error = error.__cause__
    return f"{type(error).__name__}: {' '.join(str(error).split()).rstrip('.')[:300]}".removesuffix(": ")


@dataclass(frozen=True)
class Pixels:
    """Turn a PIL image into a tensor: resized without cropping (bilinear), from 0 to 1, less `mean`, over `std`.

    That is what most image processors of ViT do; the defaults are those of Google's ViT.

    Attributes:
        size: pixels of a side.
        mean: of each channel; one number makes the image grey, three colour.
        std: of each channel.

    Raises:
        SteerError: a value outside these ranges.
    """

    size: int = 224
    mean: Sequence[float] = (0.5, 0.5, 0.5)
    std: Sequence[float] = (0.5, 0.5, 0.5)

    def __post_init__(self) -> None:
        check_integer("size", self.size, 1)
        listed = all(isinstance(values, Sequence) and not isinstance(values, str) for values in (self.mean, self.std))
        if not listed or len(self.mean) not in (1, 3) or len(self.mean) != len(self.std):
            raise SteerError(
                "`mean` and `std` list a number per channel, of which there are one or three; received "
                f"{self.mean!r} and {self.std!r}."
            )
        for mean, std in zip(self.mean, self.std, strict=True):
            check_number("mean", mean, at_least=0)
            check_number("std", std, at_least=1e-6)

    def __call__(self, image: Any) -> Tensor:
        """Return the tensor of a PIL image of 8 bits a channel, fp32 `(channels, size, size)`; raise for another."""
        from PIL import Image

        if image.mode.startswith(("I", "F")):  # PIL would cut off what is above 255
            raise SteerError(
                f"an image of mode {image.mode!r} has more than 8 bits a channel, and what its white is depends on "
                "where it comes from. Give a `prepare` of your own that divides by that."
            )
        image = image.convert("RGB" if len(self.mean) == 3 else "L")
        image = image.resize((self.size, self.size), Image.Resampling.BILINEAR)
        pixels = torch.from_numpy(np.array(image, dtype=np.float32)).view(self.size, self.size, -1).permute(2, 0, 1)
        mean, std = (torch.tensor(list(values), dtype=torch.float32).view(-1, 1, 1) for values in (self.mean, self.std))
        return (pixels / 255 - mean) / std


class ImageRows(Dataset[tuple[Any, int]]):
    """Pairs of an image, as `prepare` makes it of a PIL image when it is asked for, and its class.

    `rows` is a `datasets.Dataset` whose column `image` decodes to PIL images; `labels` are indices into `classes`.
    """

    def __init__(
        self, rows: Any, image: str, labels: Sequence[int], classes: Sequence[str], prepare: Callable[[Any], Any]
    ) -> None:
        self.rows, self.image, self.prepare = rows, image, prepare
        self.labels, self.classes = list(labels), tuple(classes)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """Return an image and its class; raise SteerError if it cannot be decoded."""
        label = self.labels[index]  # an index beyond the end fails here
        try:
            image = self.rows[index][self.image]
        except Exception as error:  # PIL's decoders raise errors of many kinds
            raise SteerError(f"the image of row {index} cannot be decoded: {error}. Leave it out.") from error
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
        prepare: from a PIL image to what the model takes; None is `Pixels()`, fp32 `(3, 224, 224)` in [-1, 1]. With an
            image processor: `lambda image: processor(image, return_tensors="pt")["pixel_values"][0]`.
        image: the column of images; None finds the only one.
        label: the column of classes; None looks for label, labels, fine_label and class, in this order.

    Returns:
        Pairs of what `prepare` makes and a class from 0; `classes` has their names, the same for all splits.

    Raises:
        SteerError: the source cannot be had, or has no such split, no images or no labels, or its splits number their
            classes differently.
    """
    parts = splits(source, config)
    rows = _pick(parts, split, source)
    datasets = _library()
    pictures = [name for name, feature in rows.features.items() if isinstance(feature, datasets.Image)]
    column = pictures[0] if image is None and len(pictures) == 1 else image
    if column is None or column not in pictures:
        raise SteerError(
            f"`image` is a column of images, of which {named(source)} has {' and '.join(pictures) or 'none'}; "
            f"received {column!r}. Its columns are {', '.join(rows.column_names)}."
        )
    label = label or next((name for name in _LABELS if name in rows.column_names), _LABELS[0])
    check_columns(rows, [label], source)
    numbers, classes = _classes(rows, parts, label, source)
    rows = rows.select_columns([column]).cast_column(column, datasets.Image())
    return ImageRows(rows, column, numbers, classes, prepare or Pixels())


def _classes(rows: Any, parts: Mapping[str, Any], label: str, source: Source) -> tuple[list[int], list[str]]:
    """Return the class of each row and the names of the classes, those without a name counted over all splits."""
    values = list(rows[label])
    features = [part.features[label] for part in (rows, *parts.values()) if label in part.column_names]
    names, *others = (getattr(feature, "names", None) for feature in features)
    other = next((each for each in others if each and each != names), None)
    if other:
        raise SteerError(
            f"the splits of {named(source)} number their classes differently: {label!r} is "
            f"{some(names or ['a text or a number'])} in one and {some(other)} in another. Give all of them the same "
            "datasets.ClassLabel."
        )
    missing = sum(value is None or (names is not None and value < 0) for value in values)
    if missing:
        raise SteerError(f"{missing} of {len(values)} rows of {named(source)} have no {label!r}. Leave them out.")
    if names is not None:
        return values, list(names)
    if not all(isinstance(value, (int, str)) for value in values):
        raise SteerError(
            f"a class is a whole number or a string; the column {label!r} of {named(source)} holds "
            f"{rows.features[label]}."
        )
    there = {value for part in parts.values() if label in part.column_names for value in part.unique(label)}
    found = sorted(there - {None}, key=lambda value: (isinstance(value, str), value))
    index = {value: i for i, value in enumerate(found)}
    return [index[value] for value in values], [str(value) for value in found]


def vtab(
    source: Source,
    split: str = "train800",
    *,
    seed: int = 0,
    config: str | None = None,
    prepare: Callable[[Any], Any] | None = None,
    label: str | None = None,
) -> ImageRows:
    """Return a task of VTAB-1k (Zhai et al. 2019, arXiv 1910.04867): 800 + 200 training images, the whole test split.

    The protocol: choose hyperparameters by training on `"train800"` and measuring on `"val200"`, train once more on
    `"train800val200"`, report the accuracy on `"test"`.

    The thousand are drawn from the train split without regard to their classes. VTAB's own, slices of the order of
    TensorFlow Datasets, cannot be had from the Hub; a folder with their lists (`train800.txt`, …, lines of a path
    within the folder and a class) is read as those say.

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
    check_choice("split", split, (*_PARTS, "test"))
    random = generator(seed)
    if _is_local(source):
        if (Path(source).expanduser() / f"{split}.txt").exists():
            return _listed(Path(source).expanduser(), split, prepare)
    elif isinstance(source, str) and source in _TASKS:
        source, known = _TASKS[source]
        config = config or known
    if split == "test":
        return images(source, split, config=config, prepare=prepare, label=label)
    rows = images(source, "train", config=config, prepare=prepare, label=label)
    if len(rows) < 1000:
        raise SteerError(f"VTAB-1k draws 1,000 images for training; {named(source)} has {len(rows):,}.")
    return rows.subset(torch.randperm(len(rows), generator=random)[_PARTS[split]].tolist())


def _listed(folder: Path, split: str, prepare: Callable[[Any], Any] | None) -> ImageRows:
    """Return the images of a list of VTAB's own."""
    lists, paths, labels = folder / f"{split}.txt", [], []
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
    datasets = _library()
    rows = datasets.Dataset.from_dict({"image": paths}).cast_column("image", datasets.Image())
    return ImageRows(rows, "image", labels, [str(i) for i in range(max(labels) + 1)], prepare or Pixels())
