"""Where and how a result was made: the machine, the versions, the command; without paths of anybody's disk."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch

from residual_steer import SteerError
from residual_steer._files import make_folder, write_whole

__all__ = ["command_line", "hardware", "machine", "portable", "read_json", "save_json", "versions"]

PACKAGES = (
    *("residual-steer", "torch", "transformers", "timm", "peft", "accelerate", "datasets"),
    *("mambapy", "mamba-ssm", "causal-conv1d", "scikit-learn", "numpy"),
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
    chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    kernel = re.findall(r"^\d+(?:\.\d+)*", platform.release())  # what a builder adds to it helps nobody
    return {
        "system": " ".join([platform.system(), *kernel, platform.machine()]),
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(chosen) if chosen.type == "cuda" and torch.cuda.is_available() else None,
    }


def hardware(found: Mapping[str, Any]) -> str:
    """Write what `machine` found in a line."""
    parts = [found.get("gpu") or ("no GPU" if "gpu" in found else None), found.get("cpu")]
    parts += [f"{found[name]} {name}" for name in ("cores", "threads") if found.get(name)]
    return ", ".join(str(part) for part in [*parts, found.get("system")] if part) or "–"


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


def command_line() -> str:
    """Return the command of this process as somebody else would type it in the repository's root."""
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


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        SteerError: it cannot be read, or holds no JSON.
    """
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise SteerError(f"could not read {path}: {error.strerror or error}.") from error
    except (ValueError, RecursionError) as error:
        raise SteerError(f"{path} holds no JSON: {str(error)[:200]}.") from error


def save_json(record: Mapping[str, Any], path: Path, device: torch.device | str = "cpu") -> None:
    """Write a record, with what is needed to get it again, whole or not at all.

    Raises:
        SteerError: it cannot be written; what was there before is untouched.
    """
    whole = {
        "command": command_line(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": machine(device),
        "versions": versions(),
        **record,
    }
    make_folder(path.parent)
    write_whole({path: (json.dumps(whole, indent=2, ensure_ascii=False) + "\n").encode()})


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
    path, here = Path(argument).expanduser(), Path.cwd()
    return str(path.relative_to(here)) if path != here and path.is_relative_to(here) else PurePosixPath(argument).name
