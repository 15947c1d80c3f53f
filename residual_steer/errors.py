"""The one exception of the library."""

__all__ = ["SteerError"]


class SteerError(ValueError):
    """A request that cannot be carried out; the message has the rule, the value received and what to do.

    Whatever raises it has changed nothing: neither the model nor a file.
    """
