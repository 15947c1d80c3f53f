"""Files that are whole at every moment: written beside their place, then renamed.

What a killed writer left beside it, the next one removes, since nobody locks it any more; without file locks it stays.
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

_SUFFIX = ".partial"


def write_whole(contents: Mapping[Path, bytes]) -> None:
    """Write files so that a reader, or a crash, finds each one as it was or as it is to be.

    All are written aside before the first is renamed, in the given order: a disk that is full changes none of them.

    Raises:
        SteerError: a folder cannot be written or the disk is full; what was there is untouched.
    """
    aside: dict[Path, IO[bytes]] = {}
    try:
        for path, content in contents.items():
            _sweep(path)
            aside[path] = file = _open_aside(path)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            if fcntl is None:
                file.close()  # Windows renames no open file
        for path, file in aside.items():
            os.replace(file.name, path)
            sync_folder(path.parent)
    except OSError as error:
        raise SteerError(
            f"could not write {path}: {error.strerror or error}. What was there before is untouched; "
            "free some space or choose a folder that can be written."
        ) from error
    finally:
        for file in aside.values():
            with contextlib.suppress(OSError):
                os.unlink(file.name)
            with contextlib.suppress(OSError):  # closing tries again to write what a full disk did not take
                file.close()


def _open_aside(path: Path) -> IO[bytes]:
    """Make and lock the file that is to become `path`; not by `tempfile`, whose files only their owner can read."""
    while True:
        file = open(path.with_name(f".{path.name}.{secrets.token_hex(8)}{_SUFFIX}"), "xb")  # noqa: SIM115
        if not lock(file, wait=True) or _is_in_place(file):
            return file
        file.close()  # another writer swept it away before it was locked


def _sweep(path: Path) -> None:
    """Remove the files that killed writers of `path` left behind."""
    for found in path.parent.iterdir():
        if found.name.startswith(f".{path.name}.") and found.name.endswith(_SUFFIX):
            with contextlib.suppress(OSError), open(found, "r+b") as file:
                if lock(file, wait=False) and _is_in_place(file):
                    os.unlink(found)


def lock(file: IO[bytes], *, wait: bool) -> bool:
    """Lock an open file until it is closed; return False where that cannot be done, or another has the lock."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _is_in_place(file: IO[bytes]) -> bool:
    """Return whether the name of an open file is still its own."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(file.name))
    except FileNotFoundError:
        return False


def as_path(folder: str | os.PathLike[str]) -> Path:
    """Return a folder as a path; raise if it is none."""
    if not isinstance(folder, (str, os.PathLike)) or not str(folder):
        raise SteerError(f"a folder is a path; received {folder!r}.")
    return Path(folder)


def make_folder(folder: Path) -> None:
    """Make a folder and its parents; raise if it cannot be made, or a file is in the way."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:  # ValueError: a name that no folder can have
        reason = getattr(error, "strerror", None) or error
        raise SteerError(f"could not make the folder {folder}: {reason}. Choose one that can be written.") from error


def sync_folder(folder: Path) -> None:
    """Ask the system to keep a rename in `folder`, where it can be asked (not on Windows)."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
