"""What is selected at a point, as one operation of a compiled graph, which finds it when it runs.

A graph with every field of the point in it serves any selection, and is too large where hundreds stand. This one has
none: other fields, rows and weights are the same graph, and a field's tensors are read when they are used.
"""

from __future__ import annotations

import inspect
import secrets
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from .errors import SteerError

_owners: WeakValueDictionary[int, Any] = WeakValueDictionary()


class Place:
    """A number under which a graph finds the module that adds what is selected; a copy of the module has its own."""

    def __init__(self, owner: Any) -> None:
        self.owner = owner
        self.number = torch.tensor(secrets.randbits(62), device="cpu")  # of no other module, in another process either
        _owners[int(self.number)] = owner

    def __reduce__(self) -> tuple[Any, ...]:
        return Place, (self.owner,)


def _add_selected(y: Tensor, z: Tensor, place: Tensor) -> Tensor:
    owner = _owners.get(int(place))
    if owner is None:
        raise SteerError("this compiled graph belongs to a model that is no more. Compile the one that runs it.")
    added: Tensor = owner.add_selected(y, z)
    expected = torch.empty_like(y, device="meta")
    if added is y or added.stride() != expected.stride():
        return torch.empty_like(y).copy_(added)
    return added


# Never part of a CUDA graph, which would replay what was selected when it was recorded. Older releases have no tag for
# it; there the number, which is on the CPU, keeps a graph from being recorded.
_tag = getattr(torch.Tag, "cudagraph_unsafe", None)
_takes_tags = "tags" in inspect.signature(torch.library.custom_op).parameters
_more: dict[str, Any] = {"tags": (_tag,)} if _tag is not None and _takes_tags else {}
add_selected = torch.library.custom_op("residual_steer::add_selected", _add_selected, mutates_args=(), **_more)


@add_selected.register_fake
def _(y: Tensor, z: Tensor, place: Tensor) -> Tensor:
    return torch.empty_like(y)
