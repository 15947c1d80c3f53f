"""What a pass costs by count, the same on every machine: bytes kept for the backward pass, FLOPs, operations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

__all__ = ["Counts", "count", "flops", "operations"]

# What makes tensors and computes nothing; views are known by their schema.
_NO_KERNEL = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view")


@dataclass(frozen=True)
class Counts:
    """What one training step costs.

    Attributes:
        saved: bytes that autograd keeps for the backward pass, beside parameters and the batch; each storage once.
        flops: floating-point operations of matrix products, forward and backward.
        operations: kernels that are launched, forward and backward; views and memory that is set aside are none.
        trainable: parameters that train.
    """

    saved: int
    flops: int
    operations: int
    trainable: int


class _Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]  # its base hints nothing
    """Count operations that compute something."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.number = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = func._schema.name.removeprefix("aten::")
        self.number += not func.is_view and name not in _NO_KERNEL
        return func(*args, **(kwargs or {}))


def operations(run: Callable[[], object]) -> int:
    """Return how many kernels a call launches."""
    with _Operations() as mode:
        run()
    return int(mode.number)


def flops(run: Callable[[], object]) -> int:
    """Return the floating-point operations of all matrix products in a call, backward passes inside it included."""
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: _addmm}) as counter:
        run()
    return int(counter.get_total_flops())


def _addmm(_: Any, one: Any, other: Any, **__: Any) -> int:
    """Return the operations of `a.addmm_(b, c)`, which torch's counter does not know."""
    return int(2 * one[0] * one[1] * other[1])


def count(model: nn.Module, loss: Callable[[], Tensor], given: Tensor) -> Counts:
    """Run a forward and a backward pass three times, and count; afterwards the model has no gradients.

    Args:
        model: whose parameters and buffers do not count as saved.
        loss: runs the model and returns a scalar.
        given: the batch, which does not count either.
    """
    known = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers(), given)}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        value = loss()  # kept alive, so that no storage is counted again under an address that was free
    torch.autograd.backward(value)
    model.zero_grad()
    products = flops(lambda: torch.autograd.backward(loss()))
    model.zero_grad()
    number = operations(lambda: torch.autograd.backward(loss()))
    model.zero_grad()
    return Counts(
        saved=sum(saved.values()),
        flops=products,
        operations=number,
        trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
    )
