"""Writing so that what is on disk is always whole: beside its place first, then renamed."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

from .errors import SteerError

__all__ = ["make_folder", "sync_folder", "write_whole"]


def write_whole(path: Path, content: bytes) -> None:
    """Write `content` to `path` so that a reader, or a crash, finds the old file or the new one and nothing else.

    Raises:
        SteerError: the folder cannot be written or the disk is full; the old file is untouched.
    """
    aside = None
    try:
        descriptor, aside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(aside, 0o666 & ~umask)  # mkstemp makes files that nobody else may read
        os.replace(aside, path)
        sync_folder(path.parent)
    except OSError as error:
        if aside is not None:
            with contextlib.suppress(OSError):
                os.unlink(aside)
        raise SteerError(
            f"could not write {path}: {error.strerror or error}. What was there before is untouched; "
            "free some space or choose a folder that can be written."
        ) from error


def make_folder(folder: Path) -> None:
    """Make `folder` and its parents.

    Raises:
        SteerError: it cannot be made, or a file is in the way.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SteerError(
            f"could not make the folder {folder}: {error.strerror or error}. Choose a folder that can be written."
        ) from error


def sync_folder(folder: Path) -> None:
    """Ask the system to keep a rename in `folder`, where it can be asked (not on Windows)."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
