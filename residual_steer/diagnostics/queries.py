"""Which tokens of a sequence count: those of the text or the image, and not padding or what a method put in."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from residual_steer.errors import SteerError
from residual_steer.passes import Batch
from residual_steer.tokens import class_token

__all__ = ["QUERIES", "chosen", "places", "query_of"]

QUERIES = ("auto", "first", "last", "all")


def query_of(query: str, model: nn.Module) -> str:
    """Return which queries count, with what "auto" means for a model.

    Raises:
        SteerError: it is none of `QUERIES`.
    """
    if query not in QUERIES:
        raise SteerError(f"`query` is one of {', '.join(QUERIES)}; received {query!r}.")
    if query != "auto":
        return query
    return "first" if class_token(model) else "all"


def chosen(batch: Batch, length: int, query: str, device: torch.device) -> Tensor:
    """Return which tokens of the batch count as queries, `(rows, length)` of booleans; padding never does."""
    real = batch.real((batch.rows, length), device)
    if query == "first":
        return real & (real.cumsum(1) == 1)
    if query == "last":
        return real & (real.flip(1).cumsum(1).flip(1) == 1)
    return real


def places(length: int, longer: int, prefix: int, device: torch.device) -> Tensor:
    """Return where each token stands in a sequence that a method has made longer, `(length,)`.

    Methods put their tokens in one place: in a text before its first token, in an image behind the `prefix` tokens,
    such as CLS. Padding on the left stays before them, and is not followed: it never counts.

    Raises:
        SteerError: the sequence is shorter.
    """
    if longer < length:
        raise SteerError(
            f"the adapted model attends from {longer} tokens where the reference attends from {length}. Queries are "
            "compared one by one: give a reference that sees the same tokens."
        )
    position = torch.arange(length, device=device)
    return position + (longer - length) * (position >= prefix)
