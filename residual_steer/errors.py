"""The one exception of the library, and the two kinds of it that a program may want to tell apart."""

__all__ = ["DivergedError", "SteerError", "UnsuitableError"]


class SteerError(ValueError):
    """A request that cannot be carried out; the message has the rule, the value received and what to do.

    Whatever raises it has changed nothing: neither the model nor a file.
    """


class DivergedError(SteerError):
    """A training whose loss or gradient became NaN or infinite; the model is as it was after the last good step."""


class UnsuitableError(SteerError):
    """A method that makes no sense on a backbone, such as prefix tuning on a model without keys and values."""
