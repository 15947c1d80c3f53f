"""What several processes do together with the tensors of a model: begin alike, gather what is sharded, write once.

FSDP2 and tensor parallelism make DTensors of parameters, FSDP1 pieces of one flat tensor for every wrapped module, and
ZeRO-3 of DeepSpeed tensors of no size. Every process of the group has to call these functions.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from .errors import SteerError

Returned = TypeVar("Returned")

_alone: ContextVar[bool] = ContextVar("alone", default=False)


def several() -> bool:
    """Return whether a process group exists, be it of one process."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def is_sharded(tensor: Any) -> bool:
    """Return whether a tensor is a DTensor, or one that ZeRO-3 took apart."""
    return hasattr(tensor, "full_tensor") or hasattr(tensor, "ds_id")


def whole(tree: Any) -> Any:
    """Return a tree of plain values with its DTensors put together."""
    return tree_map(lambda leaf: leaf.detach().full_tensor() if hasattr(leaf, "full_tensor") else leaf, tree)


def like(value: Any, parameter: Tensor) -> Any:
    """Return a whole tensor of a parameter's shape sharded as the parameter is."""
    if not hasattr(parameter, "full_tensor") or not isinstance(value, Tensor) or value.shape != parameter.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    shard: Any = parameter
    return distribute_tensor(value.to(parameter.device), shard.device_mesh, shard.placements)


def flat_units(model: nn.Module) -> list[Any]:
    """Return the modules that FSDP1 wrapped, the outer ones first."""
    if not several():
        return []
    from torch.distributed.fsdp import FullyShardedDataParallel

    return [module for module in model.modules() if isinstance(module, FullyShardedDataParallel)]


def gather(model: nn.Module, tensors: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return whole copies of some tensors on the CPU; of the base no more is put together than one wrapped module.

    Args:
        model: as it was wrapped.
        tensors: returns them by name.

    Raises:
        SteerError: FSDP1 wrapped something around this model.
    """
    found: dict[str, Tensor] = {}
    units = flat_units(model)
    if units:
        inner = {id(part) for unit in units for part in unit.modules() if part is not unit}
        if len([unit for unit in units if id(unit) not in inner]) > 1:
            raise SteerError("FSDP1 wrapped more than this part of the model. Give the outermost wrapper.")
        with _summoned(units[0]):  # the outer one comes first, or an inner one would take itself for it
            pass
    for unit in units:
        inside = {id(parameter) for parameter in _own(unit)}
        if any(id(tensor) in inside for tensor in tensors().values()):
            with _summoned(unit):
                found |= {key: _copy(tensor) for key, tensor in tensors().items() if id(tensor) in inside}
    for key, tensor in tensors().items():
        if hasattr(tensor, "ds_id"):
            import deepspeed

            with deepspeed.zero.GatheredParameters([tensor]):
                found[key] = _copy(tensor)
        elif key not in found:
            found[key] = tensor if tensor.is_meta else _copy(whole(tensor))
    return {key: found[key] for key in tensors()}


def _summoned(unit: Any) -> Any:
    return type(unit).summon_full_params(unit, recurse=False, writeback=False)


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().clone()


def _own(unit: nn.Module) -> Iterator[nn.Parameter]:
    """Yield the parameters of a module that FSDP1 wrapped, but for those of others inside it."""
    waiting = [unit]
    while waiting:
        module = waiting.pop()
        yield from module.parameters(recurse=False)
        waiting += [child for child in module.children() if not isinstance(child, type(unit))]


def align(tensors: Iterable[Tensor]) -> None:
    """Give every process what the first one has, except `alone`."""
    if _alone.get() or not several() or torch.distributed.get_world_size() == 1:
        return
    for tensor in tensors:
        if not tensor.is_meta:
            far = torch.distributed.get_backend() == "nccl" and tensor.device.type == "cpu"
            value = tensor.detach().cuda() if far else tensor.detach().contiguous()
            torch.distributed.broadcast(value, 0)
            with torch.no_grad():
                tensor.copy_(value)


@contextlib.contextmanager
def alone(on: bool) -> Iterator[None]:
    """Make fields without the other processes: they are about to be read from a file, maybe by one process."""
    token = _alone.set(on)
    try:
        yield
    finally:
        _alone.reset(token)


def once(act: Callable[[], Returned]) -> Returned:
    """Let the first process act, and return what that returned on all, once it is done; all raise if it fails."""
    found: list[Any] = [None, None]
    failed: Exception | None = None
    if torch.distributed.get_rank() == 0:
        try:
            found[0] = act()
        except Exception as error:  # of any kind: the others wait, and are to raise too
            failed, found[1] = error, str(error) or type(error).__name__
    torch.distributed.broadcast_object_list(found)
    if failed is not None:
        raise failed
    if found[1] is not None:
        raise SteerError(found[1])
    return found[0]  # type: ignore[no-any-return]
