"""The one exception of the library, and the two kinds of it that a program may want to tell apart."""

from collections.abc import Sequence

__all__ = ["DivergedError", "SteerError", "UnsuitableError", "some"]


class SteerError(ValueError):
    """A request that cannot be carried out; the message has the rule, the value received and what to do.

    Whatever raises it has changed nothing: neither the model nor a file.
    """


class DivergedError(SteerError):
    """A training whose loss or gradient became NaN or infinite; the model is as it was after the last good step."""


class UnsuitableError(SteerError):
    """A method that makes no sense on a backbone, such as prefix tuning on a model without keys and values."""


def some(names: Sequence[str]) -> str:
    """Return the first of many names for a message, each of them cut where it is very long."""
    return ", ".join(name[:100] for name in names[:6]) + (", …" if len(names) > 6 else "")
