"""Moved to `undisturbed`."""

from .undisturbed import as_before, train_mode

__all__ = ["as_before", "train_mode"]
