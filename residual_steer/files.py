"""Writing so that what is on disk is always whole: beside its place first, then renamed."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from .errors import SteerError

__all__ = ["as_path", "make_folder", "sync_folder", "write_whole"]


def write_whole(contents: Mapping[Path, bytes]) -> None:
    """Write files so that a reader, or a crash, finds each one as it was or as it is to be.

    All are written aside before the first is renamed, in the given order: a disk that is full changes none of them.

    Raises:
        SteerError: a folder cannot be written or the disk is full; what was there is untouched.
    """
    aside: dict[Path, str] = {}
    umask = os.umask(0)
    os.umask(umask)
    try:
        for path, content in contents.items():
            descriptor, aside[path] = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(aside[path], 0o666 & ~umask)  # mkstemp makes files that nobody else may read
        for path, written in aside.items():
            os.replace(written, path)
            sync_folder(path.parent)
    except OSError as error:
        raise SteerError(
            f"could not write {path}: {error.strerror or error}. What was there before is untouched; "
            "free some space or choose a folder that can be written."
        ) from error
    finally:
        for written in aside.values():
            with contextlib.suppress(OSError):
                os.unlink(written)


def as_path(folder: str | os.PathLike[str]) -> Path:
    """Return `folder` as a path.

    Raises:
        SteerError: it is none.
    """
    if not isinstance(folder, (str, os.PathLike)) or not str(folder):
        raise SteerError(f"a folder is a path; received {folder!r}.")
    return Path(folder)


def make_folder(folder: Path) -> None:
    """Make `folder` and its parents.

    Raises:
        SteerError: it cannot be made, or a file is in the way.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:  # ValueError: a name that no folder can have
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        raise SteerError(
            f"could not make the folder {folder}: {reason}. Choose a folder that can be written."
        ) from error


def sync_folder(folder: Path) -> None:
    """Ask the system to keep a rename in `folder`, where it can be asked (not on Windows)."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
