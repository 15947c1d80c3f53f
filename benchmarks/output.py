"""What a benchmark leaves: an exit status, a JSON file with what is needed to get it again, and Markdown tables."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from environment import save_json
from residual_steer import SteerError

__all__ = ["exit_status", "markdown", "save_json"]


def exit_status(work: Callable[[], None]) -> int:
    """Run a benchmark; an error of ours is a line on stderr and status 1."""
    try:
        work()
    except SteerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table, its first column to the left and the others, which are numbers, to the right."""
    from tabulate import tabulate  # a part on a bare machine needs it for its last table alone

    align = ["left", *["right"] * (len(heads) - 1)]
    return tabulate(rows, heads, tablefmt="pipe", colalign=align, disable_numparse=True)
