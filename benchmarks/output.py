"""What a benchmark leaves: an exit status, a JSON file with what is needed to get it again, and Markdown tables."""

from __future__ import annotations

import datetime
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from residual_steer import SteerError
from residual_steer.files import make_folder, write_whole
from residual_steer.report import command_line, machine, versions
from residual_steer.report.markdown import table_lines

__all__ = ["exit_status", "markdown", "save_json"]


def exit_status(work: Callable[[], None]) -> int:
    """Run a benchmark; an error of ours is a line on stderr and status 1."""
    try:
        work()
    except SteerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


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


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table, its first column to the left and the others, which are numbers, to the right."""
    return "\n".join(table_lines(heads, rows, [index > 0 for index in range(len(heads))]))
