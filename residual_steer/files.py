"""Writing so that what is on disk is always whole: beside its place first, then renamed.

A process that is killed while it writes leaves a file `.….partial` behind. It held a lock on that file, which the
system lifted with the process; so the next write to the same place can tell it from the file of a writer that lives,
and removes it. Where there are no such locks (Windows, some network drives) it stays, since nothing can tell.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import IO

from .errors import SteerError

try:
    import fcntl
except ImportError:
    fcntl = None  # type: ignore[assignment]

__all__ = ["as_path", "fcntl", "lock", "make_folder", "sync_folder", "write_whole"]

_SUFFIX = ".partial"


def write_whole(contents: Mapping[Path, bytes]) -> None:
    """Write files so that a reader, or a crash, finds each one as it was or as it is to be.

    All are written aside before the first is renamed, in the given order: a disk that is full changes none of them.

    Raises:
        SteerError: a folder cannot be written or the disk is full; what was there is untouched.
    """
    aside: dict[Path, tuple[Path, IO[bytes]]] = {}
    try:
        for path, content in contents.items():
            _sweep(path)
            aside[path] = name, file = _open_aside(path)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            if fcntl is None:
                file.close()  # Windows renames no open file
        for path, (name, _) in aside.items():
            os.replace(name, path)
            sync_folder(path.parent)
    except OSError as error:
        raise SteerError(
            f"could not write {path}: {error.strerror or error}. What was there before is untouched; "
            "free some space or choose a folder that can be written."
        ) from error
    finally:
        for name, file in aside.values():
            with contextlib.suppress(OSError):
                os.unlink(name)
            with contextlib.suppress(OSError):  # closing tries again to write what a full disk did not take
                file.close()


def _open_aside(path: Path) -> tuple[Path, IO[bytes]]:
    """Make the file that is to become `path`, locked for as long as it is open; return its name too.

    Not by `tempfile`, which makes files that nobody else may read, also once they are in place.
    """
    while True:
        name = path.with_name(f".{path.name}.{secrets.token_hex(8)}{_SUFFIX}")
        file = open(name, "xb")  # noqa: SIM115 – who asked for it closes it, once it is in place
        if not lock(file, wait=True) or _is_at(file, name):
            return name, file
        file.close()  # another writer swept it away before it was locked


def _sweep(path: Path) -> None:
    """Remove the files that killed writers of `path` left behind."""
    for found in path.parent.iterdir():
        if found.name.startswith(f".{path.name}.") and found.name.endswith(_SUFFIX):
            with contextlib.suppress(OSError), open(found, "r+b") as file:
                if lock(file, wait=False) and _is_at(file, found):
                    os.unlink(found)


def lock(file: IO[bytes], *, wait: bool) -> bool:
    """Lock an open file until it is closed; return False where that cannot be done, or somebody else holds it."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _is_at(file: IO[bytes], name: Path) -> bool:
    """Say whether an open file still goes by `name`."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(name))
    except FileNotFoundError:
        return False


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
