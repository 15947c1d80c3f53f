"""Data of the Hugging Face Hub, or of local files in the formats of `datasets`: WikiText, images, VTAB-1k.

`datasets` is imported when it is needed. What it raises becomes a SteerError with what was wanted and what to do.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

import torch

from residual_steer.data._rows import ImageRows, Pixels, TokenBlocks, check_integer, generator
from residual_steer.errors import SteerError

__all__ = [
    "PIECE",
    "Plan",
    "Source",
    "check_columns",
    "images",
    "named",
    "one_split",
    "plan",
    "splits",
    "vtab",
    "wikitext",
]

Source = str | os.PathLike[str] | Mapping[str, Any] | Any  # the last: a datasets.Dataset

_log = logging.getLogger(__name__)

PIECE = 1000  # rows that are tokenized at once: WikiText-103 is half a GB
_FORMATS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv", ".txt": "text", ".arrow": "arrow"}
_SPLIT_WORDS = {"train": {"training"}, "validation": {"valid", "val", "dev"}, "test": {"testing"}}
_LOCAL = (
    "a folder that `save_to_disk` wrote, Parquet, JSON, JSON-lines, CSV or text files, a copy of a repository of the "
    "Hub, or a folder of pictures, one folder per class"
)
_LABELS = ("label", "labels", "fine_label", "class")
_TASKS = {"cifar100": ("uoft-cs/cifar100", None), "svhn": ("ufldl-stanford/svhn", "cropped_digits")}
_PARTS = {"train800": (0, 800), "val200": (800, 1000), "train800val200": (0, 1000)}


@dataclass(frozen=True)
class Plan:
    """What reading a data set would take; as a string, in one line.

    Attributes:
        source: its name or path.
        config: which of its configurations.
        download: whether anything of it has to be downloaded.
        bytes: size of the download, None where the Hub does not say; 0 without a download.
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
    """Return what `splits`, or any function that takes a source, would download; asks the Hub for the metadata alone.

    Args:
        source: as in `splits`.
        config: as in `splits`.

    Raises:
        SteerError: the source is not there, or the Hub cannot be asked.
    """
    datasets = _library()
    if not isinstance(source, (str, os.PathLike)):
        loaded = _loaded(datasets, source)
        return Plan("data in memory", config, False, 0, {name: len(rows) for name, rows in loaded.items()})
    if _is_local(source):
        return Plan(os.fspath(source), config, False, 0)
    with _explained(source, config):
        return _plan(os.fspath(source), _builder(datasets, os.fspath(source), config, None))


def splits(source: Source, config: str | None = None, *, cache: str | os.PathLike[str] | None = None) -> dict[str, Any]:
    """Return the splits of a data set by name, each a `datasets.Dataset`.

    Before anything is downloaded, its name and size are logged as a warning of the logger `residual_steer.data.hub`;
    `plan` says the same beforehand. What was downloaded once is read from the cache.

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
    datasets = _library()
    cache = None if cache is None else os.fspath(cache)
    if not isinstance(source, (str, os.PathLike)):
        return _loaded(datasets, source)
    with _explained(source, config):
        if _is_local(source):
            return _loaded(datasets, _local(datasets, Path(source).expanduser(), config, cache))
        builder = _builder(datasets, os.fspath(source), config, cache)
        planned = _plan(os.fspath(source), builder)
        if planned.download:
            _log.warning("%s", planned)
        builder.download_and_prepare()
        return dict(builder.as_dataset())


def wikitext(
    source: Source = "Salesforce/wikitext",
    split: str = "train",
    *,
    tokenizer: Callable[..., Any],
    length: int = 1024,
    config: str | None = "wikitext-2-raw-v1",
    column: str = "text",
    limit: int | None = None,
) -> TokenBlocks:
    r"""Return WikiText (Merity et al. 2016, arXiv 1609.07843), or any text in rows, in windows for a causal model.

    Rows are joined with an empty line between them, as in the usual measurement of perplexity on the raw text, and
    tokenized without special tokens, a thousand rows at a time. Windows do not overlap, and a rest shorter than a
    window is dropped, so a loss is per token of this tokenizer, each with at most `length` - 1 tokens before it.

    Args:
        source: a name on the Hub, or a local copy: see `splits`.
        split: one of the data set: here `"train"`, `"validation"` or `"test"`.
        tokenizer: of transformers, or whatever maps a text to a mapping with `input_ids`.
        length: tokens of a window, at least 2.
        config: `"wikitext-2-raw-v1"` (2 million words) or `"wikitext-103-raw-v1"` (103 million).
        column: where the text is.
        limit: tokens that are read at most, from the beginning; None reads all.

    Raises:
        SteerError: the source cannot be had, or has no such split or column, or no text for one window.
    """
    check_integer("length", length, 2)
    if limit is not None:
        check_integer("limit", limit, length)
    rows = one_split(source, split, config)
    check_columns(rows, [column], source)
    ids: list[int] = []
    for start in range(0, len(rows), PIECE):
        texts = rows[start : start + PIECE][column]
        wrong = [type(text).__name__ for text in texts if not isinstance(text, str)]
        if wrong:
            raise SteerError(
                f"the column {column!r} of {named(source)} does not hold text alone: a row from {start} on is a "
                f"{wrong[0]}."
            )
        text = "\n\n".join(texts) + ("\n\n" if start + PIECE < len(rows) else "")
        ids += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if limit is not None and len(ids) >= limit:
            break
    return TokenBlocks(torch.tensor(ids[:limit], dtype=torch.int64), length, "all")


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
    rows = _pick(parts, split, source)
    datasets = _library()
    pictures = [name for name, feature in rows.features.items() if isinstance(feature, datasets.Image)]
    if image is None and len(pictures) != 1:
        raise SteerError(
            f"{named(source)} has {len(pictures) or 'no'} columns of images, and one is needed"
            f"{'; name it: `image`' if pictures else ''}. Its columns are {', '.join(rows.column_names)}."
        )
    image = pictures[0] if image is None else image
    label = label or next((name for name in _LABELS if name in rows.column_names), _LABELS[0])
    check_columns(rows, [image, label], source)
    if image not in pictures:
        raise SteerError(f"the column {image!r} of {named(source)} holds no images; {pictures or 'none'} does.")
    numbers, classes = _classes(rows, parts, label, source)
    rows = rows.select_columns([image]).cast_column(image, datasets.Image())
    return ImageRows(rows, image, numbers, classes, prepare or Pixels())


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
    start, end = _PARTS[split]
    return rows.subset(torch.randperm(len(rows), generator=random)[start:end].tolist())


def one_split(source: Source, split: str, config: str | None = None) -> Any:
    """Return one split of a data set, as a `datasets.Dataset` of plain Python values.

    Raises:
        SteerError: as `splits`; or it has no such split, or no row in it.
    """
    return _pick(splits(source, config), split, source)


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


def check_columns(rows: Any, wanted: Iterable[str], source: Source) -> None:
    """Raise SteerError if a split lacks a column; the message lists those that are there."""
    absent = [name for name in wanted if name not in rows.column_names]
    if absent:
        raise SteerError(
            f"{named(source)} has no column {' and none '.join(map(repr, absent))}; its columns are "
            f"{', '.join(rows.column_names)}."
        )


def _is_local(source: Source) -> TypeGuard[str | os.PathLike[str]]:
    return isinstance(source, (str, os.PathLike)) and os.path.exists(os.path.expanduser(source))


def named(source: Source) -> str:
    """Return how a source is called in messages."""
    return repr(os.fspath(source)) if isinstance(source, (str, os.PathLike)) else "the data set in memory"


def _library() -> Any:
    try:
        return importlib.import_module("datasets")
    except ImportError as error:
        raise SteerError(
            'data sets of the Hub, and local ones, are read by `datasets`: pip install "residual-steer[datasets]".'
        ) from error


def _loaded(datasets: Any, source: Any) -> dict[str, Any]:
    """Return what `datasets` has loaded as splits by name."""
    if isinstance(source, datasets.Dataset):
        return {str(source.split or "train"): source}
    if isinstance(source, Mapping) and all(isinstance(rows, datasets.Dataset) for rows in source.values()):
        return dict(source)
    raise SteerError(
        f"a data set is named by a path or by 'owner/name' on the Hub, or is what `datasets` has loaded; received "
        f"{type(source).__name__}."
    )


def _local(datasets: Any, path: Path, config: str | None, cache: str | None) -> Any:
    """Read a local file or folder."""
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


def _builder(datasets: Any, name: str, config: str | None, cache: str | None) -> Any:
    """Return what will download and prepare a data set of the Hub."""
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name, re.ASCII):
        raise SteerError(
            f"there is no file or folder {name!r}, and it is no name on the Hub, as 'owner/name' is. A local source is "
            f"{_LOCAL}."
        )
    return datasets.load_dataset_builder(name, config, cache_dir=cache)


def _plan(name: str, builder: Any) -> Plan:
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
        name = os.fspath(source)
        if _is_local(source):
            raise SteerError(f"the data in {name!r} cannot be had: {_reason(error)}. Look at the files.") from error
        call = ", ".join(repr(part) for part in (name, config) if part)
        which = f" ({config})" if config else ""
        raise SteerError(
            f"the data set {name!r}{which} cannot be had: {_reason(error)}. Give the name of one on the Hub, "
            "and a network; or a local copy: where there is a network, "
            f"datasets.load_dataset({call}).save_to_disk(folder), and that folder as the source here."
        ) from error


def _reason(error: BaseException) -> str:
    """Return in words why reading failed."""
    from huggingface_hub import constants

    if isinstance(error, ConnectionError):
        if constants.HF_HUB_OFFLINE:
            return "the Hub was not asked, since HF_HUB_OFFLINE is set, and it is not in the cache"
        return "the Hub could not be reached, and it is not in the cache"
    while error.__cause__ is not None and "error occurred while" in str(error):  # says no more than that
        error = error.__cause__
    said = " ".join(str(error).split()).rstrip(".")[:300]
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


def _classes(rows: Any, parts: Mapping[str, Any], label: str, source: Source) -> tuple[list[int], list[str]]:
    """Return the class of each row and the names of the classes, those without a name counted over all splits."""
    values = list(rows[label])
    names = getattr(rows.features[label], "names", None)
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
