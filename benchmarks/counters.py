"""What a pass costs by count, the same on every machine: bytes kept and at the peak, FLOPs, operations."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

__all__ = ["Counts", "count", "flops", "operations"]

# What makes tensors and computes nothing; views are known by their schema.
_NO_KERNEL = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view")


@dataclass(frozen=True)
class Counts:
    """What one training step costs.

    Attributes:
        saved: bytes that autograd keeps for the backward pass, beside parameters and the batch; each storage once.
        peak: the most bytes that tensors made in the step take at one time, gradients included; not what was there
            before, such as weights and the batch. On a CPU what a kernel sets aside for itself while it runs is not
            seen; on a CUDA device it is the allocator's own count.
        flops: floating-point operations of matrix products, forward and backward; 0 where they were not counted.
        operations: kernels that are launched, forward and backward; views and memory that is set aside are none.
        trainable: parameters that train.
    """

    saved: int
    peak: int
    flops: int
    operations: int
    trainable: int


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]  # its base hints nothing
    """Count operations that compute something, and the bytes of what they make while it lives."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.number = self.alive = self.peak = 0
        self._living: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = func._schema.name.removeprefix("aten::")
        self.number += not func.is_view and name not in _NO_KERNEL
        output = func(*args, **(kwargs or {}))
        entered = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in entered:
                self._note(tensor.untyped_storage())
        return output

    def _note(self, storage: torch.UntypedStorage) -> None:
        """Add a storage's bytes until it is freed."""
        key, size = storage._cdata, storage.nbytes()
        if key in self._living:
            return

        def gone(_: object) -> None:
            del self._living[key]
            self.alive -= size

        self._living[key] = weakref.ref(storage, gone)
        self.alive += size
        self.peak = max(self.peak, self.alive)


def operations(run: Callable[[], object]) -> int:
    """Return how many kernels a call launches."""
    with _Watch() as watch:
        run()
    return int(watch.number)


def flops(run: Callable[[], object]) -> int:
    """Return the floating-point operations of all matrix products in a call, backward passes inside it included."""
    with _flop_counter() as counter:
        run()
    return int(counter.get_total_flops())


def _flop_counter() -> FlopCounterMode:
    return FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: _addmm})


def _addmm(_: Any, one: Any, other: Any, **__: Any) -> int:
    """Return the operations of `a.addmm_(b, c)`, which torch's counter does not know."""
    return int(2 * one[0] * one[1] * other[1])


def count(model: nn.Module, loss: Callable[[], Tensor], given: Tensor, *, products: bool = True) -> Counts:
    """Run a forward and a backward pass, and count; afterwards the model has no gradients.

    Args:
        model: whose parameters and buffers do not count as saved.
        loss: runs the model and returns a scalar.
        given: the batch, which does not count either.
        products: whether to count the FLOPs, too; torch's counter stops at attention whose keys have fewer heads, where
            a CUDA kernel takes it as it is.
    """
    known = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers(), given)}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    model.zero_grad()
    before = 0
    if given.is_cuda:
        torch.cuda.reset_peak_memory_stats(given.device)
        before = torch.cuda.memory_allocated(given.device)
    counting = _flop_counter() if products else contextlib.nullcontext()
    with counting as counter, _Watch() as watch:  # the watch is asked first: the counter takes some ops apart
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            value = loss()  # kept alive, so that no storage is counted again under an address that was free
        torch.autograd.backward(value)
    peak = torch.cuda.max_memory_allocated(given.device) - before if given.is_cuda else watch.peak
    model.zero_grad()
    return Counts(
        saved=sum(saved.values()),
        peak=peak,
        flops=int(counter.get_total_flops()) if counter else 0,
        operations=int(watch.number),
        trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
    )
