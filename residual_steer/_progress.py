"""Progress: a bar on a terminal or in a notebook, and in a log one line every few seconds."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import auto, std

__all__ = ["progress"]

EVERY = 5.0  # seconds between two lines of a log


def progress(iterable: Iterable[Any] | None = None, **options: Any) -> Any:
    """Return a bar of tqdm, whose arguments it takes; in what is no terminal, one that writes lines, and few.

    A log that takes note of every step grows by megabytes. A bar that ends within five seconds writes nothing there.
    It stays on the screen for as long as it runs, if `leave` is not given.
    """
    options = {"leave": False, **options}
    watched = sys.stderr.isatty() or "ipykernel" in sys.modules
    return auto.tqdm(iterable, **options) if watched else _Lines(iterable, **options)


class _Lines(std.tqdm):  # type: ignore[misc]  # tqdm has no types
    """A bar whose every showing is a line of its own."""

    def __init__(self, iterable: Iterable[Any] | None = None, **options: Any) -> None:
        options = {**options, "mininterval": EVERY, "maxinterval": EVERY, "delay": EVERY, "leave": False}
        super().__init__(iterable, **options)

    def set_postfix_str(self, s: str = "", refresh: bool = True) -> None:
        """Take note of what stands behind the bar, and show it with the next line."""
        super().set_postfix_str(s, refresh=False)

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Write a line; to clear the bar, write nothing."""
        if msg != "":
            self.fp.write(f"{self}\n")
            self.fp.flush()
