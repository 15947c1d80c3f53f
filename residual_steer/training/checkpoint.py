"""Checkpoints of a run: what trains, and everything that the next step depends on, in safetensors and JSON only.

A checkpoint is a folder that is filled beside its place and then renamed.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten, treespec_dumps, treespec_loads

from residual_steer._files import make_folder, sync_folder, write_whole
from residual_steer.errors import SteerError

from .processes import Processes

_SHARED, _OWN = ("step", "identity", "weights", "scaler", "protect"), ("random", "stream", "weights")
_NAME = re.compile(r"checkpoint-(\d+)")


def _all(folder: Path) -> list[tuple[int, Path]]:
    """Return the steps and the paths of the checkpoints in a folder."""
    return [(int(match[1]), path) for path in folder.glob("checkpoint-*") if (match := _NAME.fullmatch(path.name))]


def newest(folder: Path) -> tuple[int, Path] | None:
    """Return the step and the path of the newest checkpoint in `folder`, None where there is none."""
    return max(_all(folder), default=None)


def write(folder: Path, step: int, shared: Any, own: Any, processes: Processes) -> None:
    """Write the checkpoint of `step`, and remove the ones before it; every process has to call it.

    `shared` is a tree of tensors and plain values that is the same on every process, `own` one of this process.

    Raises:
        SteerError: the folder cannot be written, here or by another process; older checkpoints are untouched.
    """
    place, aside = folder / f"checkpoint-{step}", folder / f".checkpoint-{step}.partial"

    def fill() -> None:
        make_folder(aside)
        _write_tree(aside / f"process-{processes.rank}", own)
        if processes.main:
            _write_tree(aside / "shared", shared)
            sync_folder(aside)

    def settle() -> None:
        if processes.main:
            shutil.rmtree(place, ignore_errors=True)
            try:
                aside.rename(place)
            except OSError as error:
                raise SteerError(f"could not put the checkpoint {place} in place: {error.strerror}.") from error
            sync_folder(folder)

    for act in (fill, settle):
        failure: SteerError | None = None
        try:
            act()
        except SteerError as error:
            failure = error
        if not processes.every(failure is None):
            sweep(folder)
            raise failure or SteerError("another process could not write its part of the checkpoint.")
    for number, path in _all(folder) if processes.main else ():
        if number < step:
            shutil.rmtree(path, ignore_errors=True)


def sweep(folder: Path) -> None:
    """Remove what a run that was killed or failed left of a checkpoint."""
    for path in folder.glob(".checkpoint-*.partial"):
        shutil.rmtree(path, ignore_errors=True)


def read(path: Path, rank: int) -> tuple[Any, Any]:
    """Read what `write` wrote: the shared tree, and that of process `rank`; raise if a file is missing or damaged."""
    try:
        shared, own = _read_tree(path / "shared"), _read_tree(path / f"process-{rank}")
        return {key: shared[key] for key in _SHARED}, {key: own[key] for key in _OWN}
    except Exception as error:  # bytes from anywhere can fail in any way
        raise SteerError(
            f"could not resume from {path} ({type(error).__name__}: {error}). It must hold a whole checkpoint, written "
            "by as many processes as resume it."
        ) from error


def _write_tree(stem: Path, tree: Any) -> None:
    leaves, spec = tree_flatten(tree)
    tensors = {str(i): leaf for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)}
    tensors = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}
    plain = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    try:
        content = json.dumps({"tree": treespec_dumps(spec), "plain": plain}).encode()
    except (TypeError, NotImplementedError) as error:
        raise SteerError(
            f"a checkpoint holds tensors, numbers and text, and the state of the run more: {error}. An optimizer that "
            "keeps such state cannot be resumed: train without `save_to`."
        ) from error
    write_whole({stem.with_suffix(".safetensors"): safetensors.torch.save(tensors), stem.with_suffix(".json"): content})


def _read_tree(stem: Path) -> Any:
    tensors = safetensors.torch.load(stem.with_suffix(".safetensors").read_bytes())
    content = json.loads(stem.with_suffix(".json").read_text())
    leaves = [tensors.get(str(i), value) for i, value in enumerate(content["plain"])]
    return tree_unflatten(leaves, treespec_loads(content["tree"]))
