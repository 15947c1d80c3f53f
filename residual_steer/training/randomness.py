"""Moved to `undisturbed`."""

from .undisturbed import apart, get_state, set_state

__all__ = ["apart", "get_state", "set_state"]
