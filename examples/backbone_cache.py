"""A folder of pre-trained backbones, each used only if it was made as asked and holds the bytes that were written."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_model, save_model
from torch import nn

from residual_steer import SteerError

Record = dict[str, Any]


def cached(
    folder: Path, build: Callable[[], nn.Module], pretrain: Callable[[nn.Module], Record]
) -> tuple[nn.Module, Record, bool]:
    """Return a backbone from its folder, or pre-train it into that folder now.

    Args:
        folder: its place, whose name says what it was made from; `folder_of` gives one.
        build: returns the untrained model.
        pretrain: trains it and returns what is to be remembered about that, `quality` among it.

    Returns:
        The model in evaluation mode, the record, and whether it was there already.

    Raises:
        SteerError: the folder cannot be written.
    """
    found = is_whole(folder)
    if not found:
        if folder.exists():
            print(f"what is cached in {folder} is damaged; it is made again", file=sys.stderr)
        made = build()
        write_folder(folder, made, pretrain(made))
    # Also what was made just now is read back, so that a first run and a later one compute the same.
    record = json.loads((folder / "recipe.json").read_text())
    model = build()
    load_model(model, folder / "model.safetensors")
    return model.eval(), record, found


def folder_of(cache: Path, name: str, identity: Any) -> Path:
    """Return the folder of what is made from `identity`, plain values: its name ends in a digest of them."""
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
    return cache / f"{name}-{digest}"


def write_folder(folder: Path, model: nn.Module, record: Record) -> None:
    """Write the weights and their record aside, then rename.

    Raises:
        SteerError: the folder cannot be written.
    """
    aside = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".making-"))
        save_model(model, str(aside / "model.safetensors"))
        digest = hashlib.sha256((aside / "model.safetensors").read_bytes()).hexdigest()
        (aside / "recipe.json").write_text(json.dumps({**record, "sha256": digest}, indent=2) + "\n")
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(aside, folder)
    except OSError as error:
        if aside is not None:
            shutil.rmtree(aside, ignore_errors=True)
        if is_whole(folder):  # another run was faster
            return
        raise SteerError(
            f"could not write the cache {folder.parent}: {error.strerror or error}. Give another folder with --cache."
        ) from error


def is_whole(folder: Path) -> bool:
    """Say whether a cached backbone is there, and holds the bytes that were written."""
    try:
        record = json.loads((folder / "recipe.json").read_text())
        weights = (folder / "model.safetensors").read_bytes()
        return bool(record["sha256"] == hashlib.sha256(weights).hexdigest() and record["quality"] >= 0)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError):
        return False


def default_cache() -> Path:
    """Return `residual-steer/backbones` in the user's cache folder."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "residual-steer" / "backbones"
