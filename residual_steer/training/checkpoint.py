"""Checkpoints of a run: what trains, and everything that the next step depends on.

A checkpoint is a folder that is filled beside its place and then renamed. It holds safetensors and JSON only.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from residual_steer._files import make_folder, sync_folder, write_whole
from residual_steer.errors import SteerError

__all__ = ["newest", "read", "write"]

_SHARED, _OWN = ("step", "identity", "model", "optimizer", "scaler"), ("random", "stream")
_NAME = re.compile(r"checkpoint-(\d+)")


def newest(folder: Path) -> tuple[int, Path] | None:
    """Return the step and the path of the newest checkpoint in `folder`, None where there is none."""
    found = [(int(match[1]), path) for path in folder.glob("checkpoint-*") if (match := _NAME.fullmatch(path.name))]
    return max(found, default=None)


def write(folder: Path, step: int, shared: Any, own: Any, rank: int, agree: Callable[[bool], bool]) -> Path:
    """Write the checkpoint of `step`, and remove the ones before it.

    Args:
        folder: where checkpoints go.
        step: its number.
        shared: a tree of tensors and plain values, the same on every process.
        own: such a tree of this process.
        rank: index of this process; process 0 writes `shared` and does the renaming.
        agree: waits for all processes, and says whether each of them passed True.

    Raises:
        SteerError: the folder cannot be written; older checkpoints are untouched.
    """
    place, aside = folder / f"checkpoint-{step}", folder / f".checkpoint-{step}.partial"
    first = rank == 0

    def fill() -> None:
        _write_tree(aside / f"process-{rank}", own)
        if first:
            _write_tree(aside / "shared", shared)
            sync_folder(aside)

    def settle() -> None:
        shutil.rmtree(place, ignore_errors=True)
        try:
            aside.rename(place)
        except OSError as error:
            raise SteerError(f"could not put the checkpoint {place} in place: {error.strerror}.") from error
        sync_folder(folder)

    try:
        _together(lambda: _renew(aside), first, agree)
        _together(fill, True, agree)
        _together(settle, first, agree)
    except SteerError:
        if first:
            shutil.rmtree(aside, ignore_errors=True)
        raise
    if first:
        for path in folder.glob("checkpoint-*"):
            if (match := _NAME.fullmatch(path.name)) and int(match[1]) < step:
                shutil.rmtree(path, ignore_errors=True)
    return place


def _renew(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    make_folder(folder)


def _together(act: Callable[[], None], mine: bool, agree: Callable[[bool], bool]) -> None:
    """Act if it is this process's part, and stop every process if one of them failed.

    Raises:
        SteerError: here or in another process it could not be done.
    """
    failure: SteerError | None = None
    try:
        if mine:
            act()
    except SteerError as error:
        failure = error
    if not agree(failure is None):
        raise failure or SteerError("another process could not write its part of the checkpoint.")


def read(path: Path, rank: int) -> tuple[Any, Any]:
    """Read what `write` wrote for this process: the shared tree and its own.

    Raises:
        SteerError: a file is missing or damaged.
    """
    try:
        shared, own = _read_tree(path / "shared"), _read_tree(path / f"process-{rank}")
        for key in _SHARED:
            shared[key]
        for key in _OWN:
            own[key]
        return shared, own
    except Exception as error:  # bytes from anywhere can fail in any way
        raise SteerError(
            f"could not resume from {path} ({type(error).__name__}: {error}). It must hold a whole checkpoint, written "
            "by as many processes as resume it."
        ) from error


def _write_tree(stem: Path, tree: Any) -> None:
    tensors: dict[str, Tensor] = {}
    plain = _split(tree, tensors)
    write_whole(
        {
            stem.with_suffix(".safetensors"): safetensors.torch.save(tensors),
            stem.with_suffix(".json"): json.dumps(plain).encode(),
        }
    )


def _read_tree(stem: Path) -> Any:
    tensors = safetensors.torch.load(stem.with_suffix(".safetensors").read_bytes())
    return _join(json.loads(stem.with_suffix(".json").read_text()), tensors)


def _split(tree: Any, tensors: dict[str, Tensor]) -> Any:
    """Put the tensors of a tree into `tensors` and return the rest as JSON: `[kind, content]` at every node.

    Raises:
        SteerError: the tree has something else in it.
    """
    if isinstance(tree, Tensor):
        key = str(len(tensors))
        tensors[key] = tree.detach().cpu().contiguous().clone()
        return ["tensor", key]
    if isinstance(tree, dict):
        return ["dict", [[key, _split(value, tensors)] for key, value in tree.items()]]
    if isinstance(tree, (list, tuple)):
        if all(type(value) in (int, float, str, bool, type(None)) for value in tree):
            return ["plain tuple" if isinstance(tree, tuple) else "plain list", list(tree)]
        return [type(tree).__name__, [_split(value, tensors) for value in tree]]
    if tree is None or isinstance(tree, (bool, int, float, str)):
        return ["value", tree]
    raise SteerError(
        f"a checkpoint holds tensors, numbers and text; the state of the run has a {type(tree).__name__}. "
        "An optimizer that keeps such state cannot be resumed: train without `save_to`."
    )


def _join(node: Any, tensors: dict[str, Tensor]) -> Any:
    kind, content = node
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: _join(value, tensors) for key, value in content}
    if kind == "value":
        return content
    if kind.startswith("plain"):
        return tuple(content) if kind == "plain tuple" else content
    made = [_join(value, tensors) for value in content]
    return tuple(made) if kind == "tuple" else made
