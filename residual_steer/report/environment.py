"""Where and how a result was made: the machine, the versions, the command; without paths of anybody's disk."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch

__all__ = ["command_line", "machine", "portable", "versions"]

PACKAGES = (
    "residual-steer",
    "torch",
    "transformers",
    "timm",
    "peft",
    "accelerate",
    "datasets",
    "mambapy",
    "mamba-ssm",
    "causal-conv1d",
    "scikit-learn",
    "numpy",
)
# an absolute path of two parts or more; `a/b`, `tokens/s` and https://host/a/b are none
_POSIX = re.compile(r"(?<![\w./:~\\-])(?:~|/[\w.@+,%-]+)(?:/[\w.@+,%-]+)+/?")
_WINDOWS = re.compile(r"(?<!\w)(?:[A-Za-z]:[\\/]|\\\\)[\w.@+,%-]+(?:[\\/][\w.@+,%-]+)*[\\/]?")


def machine(device: torch.device | str | None = None) -> dict[str, Any]:
    """Describe where this runs: `system`, `cpu`, `cores`, `threads` that torch uses, and `gpu`.

    Args:
        device: where the work is done; `gpu` is its name if it is one. None: whichever GPU torch would take.
    """
    cpu = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        cpu = models[0] if models else cpu
    chosen = (
        torch.device(device) if device is not None else torch.device("cuda" if torch.cuda.is_available() else "cpu")
    )
    kernel = re.findall(r"^\d+(?:\.\d+)*", platform.release())  # what a builder adds to it helps nobody
    return {
        "system": " ".join([platform.system(), *kernel, platform.machine()]),
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(chosen) if chosen.type == "cuda" else None,
    }


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Return the versions of Python and of the `packages` that are installed; torch's says what it was built for."""
    found = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    found["torch"] = torch.__version__
    return found


def command_line(arguments: Sequence[str] | None = None) -> str:
    """Return a command as somebody else would type it in the repository's root.

    Args:
        arguments: the script and its arguments; those of this process if left out.
    """
    if arguments is not None:
        return shlex.join(["python", *map(_shorten, arguments)])
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    if spec is not None:  # python -m, which leaves the module's file as the first argument
        return shlex.join(["python", "-m", spec.name.removesuffix(".__main__"), *map(_shorten, sys.argv[1:])])
    return shlex.join(["python", *map(_shorten, sys.argv)])


def portable(value: Any) -> Any:
    """Return JSON without absolute paths in texts and keys: below the working folder they are relative, else a name."""
    if isinstance(value, (str, os.PathLike)):
        value = os.fsdecode(value)
        whole = _shorten(value)
        return whole if whole != value else _WINDOWS.sub(_cut, _POSIX.sub(_cut, value))
    if isinstance(value, Mapping):
        found: dict[str, Any] = {}
        for key, part in value.items():
            name, count = portable(key), 1
            while name in found:  # two folders that end alike stay two
                count += 1
                name = f"{portable(key)} ({count})"
            found[name] = portable(part)
        return found
    return [portable(part) for part in value] if isinstance(value, (list, tuple)) else value


def _cut(match: re.Match[str]) -> str:
    return _shorten(match.group())


def _shorten(argument: str) -> str:
    """Cut an argument that is an absolute path, or an option with one behind its `=`."""
    option, equals, value = argument.partition("=")
    if equals and re.fullmatch(r"[\w.-]+", option):
        return f"{option}={_shorten(value)}"
    if "\n" in argument or "://" in argument:
        return argument
    if re.match(r"[A-Za-z]:[\\/]|\\\\\w", argument):
        return PureWindowsPath(argument).name or argument[:2]
    if not re.match(r"~?/[^/\s]", argument):
        return argument
    path = Path(argument).expanduser() if argument.startswith("~") else Path(argument)
    here = Path.cwd()
    return str(path.relative_to(here)) if path != here and path.is_relative_to(here) else PurePosixPath(argument).name
