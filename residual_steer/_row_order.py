"""Whether a module is fed the rows of a batch one after the other, or otherwise, as `(length, batch, width)`.

Shapes do not tell windows, frames and transposed rows apart. So the first row is changed, and what then changes in
front of the module is looked at; what comes behind it does not run.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ._caches import cache_of
from ._undisturbed import undisturbed, watch

Call = tuple[tuple[Any, ...], Mapping[str, Any]]


def length_first(block: nn.Module) -> bool:
    """Return whether a block is one of torch's layers that carry `(length, batch, width)`."""
    layer = isinstance(block, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer))
    return layer and not block.self_attn.batch_first  # type: ignore[union-attr]


class _ReachedError(Exception):
    """What enters the module was seen."""


def rows_in_order(
    model: nn.Module, call: Call, host: nn.Module, read: Callable[..., Tensor], rows: int, like: Tensor
) -> bool:
    """Return whether `host`, in `model`, is fed `rows` parts one after the other that are the rows of a call of it.

    `like` is what the host returned in that call.
    """
    with undisturbed(model):
        seen, other = (_entering(model, call, host, read, change) for change in (lambda x: x, _first_row(rows)))
    if seen.dim() != like.dim() or not len(seen) == len(other) == len(like) or len(seen) % rows:
        return False
    moved = (seen - other).float().abs().nan_to_num(nan=0.0).reshape(rows, -1).amax(1)
    return bool(moved[0] > 0) and bool((moved[1:] <= 1e-3 * moved[0]).all())


def _entering(
    model: nn.Module, call: Call, host: nn.Module, read: Callable[..., Tensor], change: Callable[[Any], Any]
) -> Tensor:
    """Run a model until a module is reached, and return the stream that enters that; caches stay as they are."""
    found: list[Tensor] = []

    def reach(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        found.append(read(args, kwargs).detach().clone())
        raise _ReachedError

    cache = cache_of([*call[0], *call[1].values()])
    spare = copy.deepcopy(cache, {id(tensor): tensor.detach().clone() for tensor in _tensors(cache, set())})
    args, kwargs = tree_map(
        lambda x: spare if x is cache else change(x), call, is_leaf=lambda x: x is not None and x is cache
    )
    with watch([host], reach, first=True), contextlib.suppress(_ReachedError):
        model.forward(*args, **kwargs)
    return found[0]


def _tensors(value: Any, seen: set[int]) -> Iterator[Tensor]:
    """Yield the tensors in an object, those in the midst of a graph too, which cannot be copied as they are."""
    if isinstance(value, Tensor):
        yield value
    elif id(value) not in seen:
        seen.add(id(value))
        parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
        for part in (*parts, *getattr(value, "__dict__", {}).values()):
            yield from _tensors(part, seen)


def _first_row(rows: int) -> Callable[[Any], Any]:
    """Return what changes the first row of a tensor that has as many rows, and leaves all else."""
    generator = torch.Generator().manual_seed(0)

    def change(x: Any) -> Any:
        if not isinstance(x, Tensor) or x.dim() < 2 or len(x) != rows or x.dtype == torch.bool:
            return x
        x = x.detach().clone()
        if x.is_floating_point():
            x[0] += torch.randn(x[0].shape, generator=generator).to(x)
        elif int(x.max()) > 1:  # no mask
            x[0] = (x[0] - 1).abs()  # a number that a table of tokens or positions has
        return x

    return change
