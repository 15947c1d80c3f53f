"""Where data come from: a data set of the Hugging Face Hub, or local files in the formats of `datasets`.

`datasets` is imported when it is needed. What it raises becomes a SteerError with what was wanted and what to do.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from residual_steer.errors import SteerError

__all__ = ["Plan", "Source", "check_columns", "is_local", "library", "one_split", "pick", "plan", "splits", "told_name"]

Source = str | os.PathLike[str] | Mapping[str, Any] | Any  # the last: a datasets.Dataset

_log = logging.getLogger(__name__)

_FORMATS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv", ".txt": "text", ".arrow": "arrow"}
_SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing"),
}
_LOCAL = (
    "a folder that `save_to_disk` wrote, Parquet, JSON, JSON-lines, CSV or text files, a copy of a repository of the "
    "Hub, or a folder of pictures, one folder per class"
)


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
    """Say what `splits`, or any function that takes a source, would download; asks the Hub for the metadata alone.

    Args:
        source: as in `splits`.
        config: as in `splits`.

    Raises:
        SteerError: the source is not there, or the Hub cannot be asked.
    """
    datasets = library()
    if not isinstance(source, (str, os.PathLike)):
        loaded = _loaded(datasets, source)
        return Plan("data in memory", config, False, 0, {name: len(rows) for name, rows in loaded.items()})
    if is_local(source):
        return Plan(os.fspath(source), config, False, 0)
    with _explained(_remote(source, config), _copy(source, config)):
        return _plan(os.fspath(source), _builder(datasets, os.fspath(source), config, None))


def splits(source: Source, config: str | None = None, *, cache: str | os.PathLike[str] | None = None) -> dict[str, Any]:
    """Return the splits of a data set by name, each a `datasets.Dataset`.

    Before anything is downloaded, its name and size are logged as a warning of the logger
    `residual_steer.data.source`; `plan` says the same beforehand. What was downloaded once is read from the cache.

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
    datasets = library()
    if not isinstance(source, (str, os.PathLike)):
        return _loaded(datasets, source)
    if is_local(source):
        with _explained(f"the data in {os.fspath(source)!r}", "Look at the files."):
            return _loaded(datasets, _local(datasets, Path(source).expanduser(), config, cache))
    name = os.fspath(source)
    with _explained(_remote(name, config), _copy(name, config)):
        builder = _builder(datasets, name, config, cache)
        told = _plan(name, builder)
        if told.download:
            _log.warning("%s", told)
        builder.download_and_prepare()
        return dict(builder.as_dataset())


def one_split(source: Source, split: str, config: str | None = None) -> Any:
    """Return one split of a data set, as a `datasets.Dataset` of plain Python values.

    Raises:
        SteerError: as `splits`; or it has no such split, or no row in it.
    """
    return pick(splits(source, config), split, source)


def pick(parts: Mapping[str, Any], split: str, source: Source) -> Any:
    """Return one of the splits of a source, giving plain Python values.

    Raises:
        SteerError: there is none of this name, or it has no rows.
    """
    if split not in parts:
        raise SteerError(
            f"{told_name(source)} has no split {split!r}; it has {', '.join(parts) or 'none'}. The split of a local "
            "file is read from its name, as in train.parquet or test.jsonl."
        )
    rows = parts[split].with_format(None)
    if not len(rows):
        raise SteerError(f"the split {split!r} of {told_name(source)} has no rows.")
    return rows


def check_columns(rows: Any, wanted: Iterable[str], source: Source) -> None:
    """Check that a split has columns.

    Raises:
        SteerError: one is missing; the message lists those that are there.
    """
    absent = [name for name in wanted if name not in rows.column_names]
    if absent:
        raise SteerError(
            f"{told_name(source)} has no column {' and none '.join(map(repr, absent))}; its columns are "
            f"{', '.join(rows.column_names)}."
        )


def is_local(source: Source) -> TypeGuard[str | os.PathLike[str]]:
    """Say whether a source is a file or folder that is there."""
    return isinstance(source, (str, os.PathLike)) and os.path.exists(os.path.expanduser(source))


def told_name(source: Source) -> str:
    """Return how a source is called in messages."""
    return repr(os.fspath(source)) if isinstance(source, (str, os.PathLike)) else "the data set in memory"


def library() -> Any:
    """Return the package `datasets`.

    Raises:
        SteerError: it is not installed.
    """
    try:
        return importlib.import_module("datasets")
    except ImportError as error:
        raise SteerError(
            'data sets of the Hub, and local ones, are read by `datasets`: pip install "residual-steer[datasets]".'
        ) from error


def _loaded(datasets: Any, source: Any) -> dict[str, Any]:
    """Return what `datasets` has loaded as splits by name.

    Raises:
        SteerError: it is nothing that `datasets` has loaded.
    """
    if isinstance(source, datasets.Dataset):
        return {str(source.split or "train"): source}
    if isinstance(source, Mapping) and all(isinstance(rows, datasets.Dataset) for rows in source.values()):
        return dict(source)
    raise SteerError(
        f"a data set is named by a path or by 'owner/name' on the Hub, or is what `datasets` has loaded; received "
        f"{type(source).__name__}."
    )


def _local(datasets: Any, path: Path, config: str | None, cache: Any) -> Any:
    """Read a local file or folder.

    Raises:
        SteerError: it is of no format that is known here.
    """
    cache = None if cache is None else os.fspath(cache)
    if path.is_file():
        if path.suffix.lower() not in _FORMATS:
            raise SteerError(f"a local source is {_LOCAL}; {str(path)!r} is none of these.")
        files = {_split_of(path): str(path)}
        return datasets.load_dataset(_FORMATS[path.suffix.lower()], data_files=files, cache_dir=cache)
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


def _split_of(path: Path) -> str:
    """Read the split from the name of a file."""
    words = set(re.split(r"[^a-z]+", path.stem.lower()))
    return next((split for split, named in _SPLIT_WORDS.items() if words & set(named)), "train")


def _builder(datasets: Any, name: str, config: str | None, cache: Any) -> Any:
    """Return what will download and prepare a data set of the Hub.

    Raises:
        SteerError: the name is none.
    """
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name, re.ASCII):
        raise SteerError(
            f"there is no file or folder {name!r}, and it is no name on the Hub, as 'owner/name' is. A local source is "
            f"{_LOCAL}."
        )
    return datasets.load_dataset_builder(name, config, cache_dir=None if cache is None else os.fspath(cache))


def _plan(name: str, builder: Any) -> Plan:
    info = builder.info
    there = Path(builder.cache_dir).exists()
    rows = {str(name): part.num_examples for name, part in (info.splits or {}).items() if part.num_examples}
    size = 0 if there else info.download_size
    return Plan(name, builder.config.name, not there, size, rows)


def _remote(name: str | os.PathLike[str], config: str | None) -> str:
    return f"the data set {os.fspath(name)!r}" + (f" ({config})" if config else "")


def _copy(name: str | os.PathLike[str], config: str | None) -> str:
    call = ", ".join(repr(part) for part in (os.fspath(name), config) if part)
    return (
        f"Give the name of one on the Hub, and a network; or a local copy: where there is a network, "
        f"datasets.load_dataset({call}).save_to_disk(folder), and that folder as the source here."
    )


@contextlib.contextmanager
def _explained(what: str, remedy: str) -> Iterator[None]:
    """Turn whatever is raised inside into one line.

    Raises:
        SteerError: in its place.
    """
    try:
        yield
    except SteerError:
        raise
    except Exception as error:  # `datasets` passes on what many libraries raise
        raise SteerError(f"{what} cannot be had: {_reason(error)}. {remedy}") from error


def _reason(error: BaseException) -> str:
    """Say in words why reading failed."""
    from huggingface_hub import constants

    if isinstance(error, ConnectionError):
        if constants.HF_HUB_OFFLINE:
            return "the Hub was not asked, since HF_HUB_OFFLINE is set, and it is not in the cache"
        return "the Hub could not be reached, and it is not in the cache"
    while error.__cause__ is not None and "error occurred while" in str(error):  # says no more than that
        error = error.__cause__
    said = " ".join(str(error).split()).rstrip(".")[:300]
    return f"{type(error).__name__}: {said}" if said else type(error).__name__
