"""Moved to `processes`."""

from .processes import to_device

__all__ = ["to_device"]
