"""Private attributes of torch, accelerate and transformers in one place; tests/test_internals.py names each of them.

Tried on torch 2.6 and 2.14, accelerate 1.10 and 1.15, and transformers 5.14 and 5.24.
"""

from __future__ import annotations

import contextlib
import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

ATTENTION = "_attn_implementation"  # under which a config of transformers has the name of its attention
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def backward_pass() -> int:
    """Return the number of the backward pass that is running in this thread, -1 outside of one."""
    number: int = torch._C._current_graph_task_id()
    return number


def version(tensor: Tensor) -> int:
    """Return how often a tensor was changed in place."""
    return tensor._version


def has_hook(tensor: Tensor, kind: type) -> bool:
    """Return whether a hook of a kind waits for the gradient of a tensor."""
    hooks: Mapping[int, Any] = tensor._backward_hooks or {}
    return any(isinstance(hook, kind) for hook in hooks.values())


def run_after(module: nn.Module, handle: Any, other: Any) -> None:
    """Let a forward hook of a module run right after another one, given the handles of both."""
    hooks: Any = module._forward_hooks
    order = [number for number in hooks if number != handle.id]
    order.insert(order.index(other.id) + 1, handle.id)
    for number in order:
        hooks.move_to_end(number)


def is_compiled(module: nn.Module) -> bool:
    """Return whether a module is `torch.compile`d, around it or in place."""
    return type(module).__name__ == "OptimizedModule" or getattr(module, "_compiled_call_impl", None) is not None


def compile_with_hooks() -> None:
    """Have torch.compile look at hooks before it uses code again; it does not by itself.

    What it compiled of a frozen model would run in the place of a steered one of the same class, without its fields.
    What was compiled before is forgotten, once, and compiled again when it is called.
    """
    from torch._dynamo import config, reset

    if config.skip_nnmodule_hook_guards:
        config.skip_nnmodule_hook_guards = False
        reset()


def saves_adapters_alone(model: nn.Module) -> bool:
    """Return whether `save_pretrained` of transformers writes a model's adapters of PEFT, and not the model."""
    return bool(getattr(model, "_hf_peft_config_loaded", False))


def keeps_batching(model: nn.Module) -> bool:
    """Return whether a model of transformers keeps a manager of continuous batching for the next call."""
    return getattr(model, "_cached_continuous_batching_manager", None) is not None


def renew_children(module: nn.Module) -> None:
    """Give a module a new list of its children, so that whoever goes through the old one may go on."""
    module._modules = dict(module._modules)


@contextlib.contextmanager
def answering(module: nn.Module, call: Callable[..., Any]) -> Iterator[None]:
    """Have calls of a module, which is not compiled, answered by `call`; it gets what else would, hooks and all, first.

    It stands where torch keeps what a module was compiled to.
    """
    vars(module)["_compiled_call_impl"] = partial(call, module._call_impl)
    try:
        yield
    finally:
        vars(module).pop("_compiled_call_impl", None)


def is_plainly_called(module: nn.Module) -> bool:
    """Return whether calling a module does no more than its class's `forward`: no hook, no forward of its own."""
    return not (module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)


def offload_hooks(module: nn.Module) -> tuple[Any, ...]:
    """Return what accelerate hung on a module that it dispatches or offloads, one by one."""
    hook = getattr(module, "_hf_hook", None)
    return () if hook is None else (hook, *getattr(hook, "hooks", ()))


def owned_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters and stored buffers that a module itself owns, by their names in it."""
    for name, tensor in (*module._parameters.items(), *module._buffers.items()):
        if tensor is not None and name not in module._non_persistent_buffers_set:
            yield name, tensor


def parts(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the children of a module by every name that they have, where `named_children` takes one of each."""
    for name, child in module._modules.items():
        if child is not None:
            yield name, child


def cast_dtypes(module: nn.Module) -> dict[str, torch.dtype]:
    """Return in which types a module computes with parameters that are kept in another one, by their names in it."""
    found: dict[str, torch.dtype] = module.__dict__.get("_steering_dtypes", {})
    return found


def compute_in(module: nn.Module, dtypes: Mapping[str, torch.dtype]) -> None:
    """Let a module compute with its parameters of these names in other types than they are kept in, and with no others.

    They are fp32 masters of weights that a bf16 module computes with. The class of the module becomes one whose
    `forward` sees them cast; whoever else looks sees the parameters themselves. Without names, its class comes back.
    """
    base: Any = getattr(type(module), "_steering_base", type(module))
    module.__dict__.pop("_steering_seen", None)
    if dtypes:
        module.__dict__["_steering_dtypes"] = dict(dtypes)
        module.__class__ = _mastered(base, frozenset(dtypes))
        _look(module)
    else:
        module.__dict__.pop("_steering_dtypes", None)
        module.__class__ = base


def _look(module: nn.Module) -> None:
    """Make what `forward` sees of a module: an object with its attributes, but for parameters that are cast."""
    kind: Any = type(module)
    seen = object.__new__(kind._steering_seen_as)
    seen.__dict__ = module.__dict__
    module.__dict__["_steering_seen"] = (seen,)


@cache
def _mastered(base: Any, names: frozenset[str]) -> Any:
    def read(name: str, module: nn.Module) -> Tensor:
        tensor: Any = module._parameters[name]
        return tensor.to(cast_dtypes(module)[name])  # type: ignore[no-any-return]

    def forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return base.forward(module.__dict__["_steering_seen"][0], *args, **kwargs)

    def apply(module: nn.Module, fn: Any, recurse: bool = True) -> nn.Module:
        base._apply(module, fn, recurse)
        dtypes = cast_dtypes(module)
        for name, dtype in dtypes.items():
            dtypes[name] = fn(torch.empty(0, dtype=dtype)).dtype
        return module

    def reduce(module: nn.Module, protocol: int) -> Any:
        return _rebuild, (base, names), {k: v for k, v in module.__dict__.items() if k != "_steering_seen"}

    def set_state(module: nn.Module, state: dict[str, Any]) -> None:
        base.__setstate__(module, state)
        _look(module)

    named = {"__module__": base.__module__, "__qualname__": base.__qualname__}
    seen = type(base.__name__, (base,), {**{name: property(partial(read, name)) for name in names}, **named})
    members = {"forward": forward, "_apply": apply, "__reduce_ex__": reduce, "__setstate__": set_state}
    return type(base.__name__, (base,), {**members, **named, "_steering_base": base, "_steering_seen_as": seen})


def _rebuild(base: Any, names: frozenset[str]) -> nn.Module:
    made = _mastered(base, names)
    return made.__new__(made)  # type: ignore[no-any-return]


def twin(host: nn.Module, tensors: Mapping[str, Tensor], dtypes: Mapping[str, torch.dtype]) -> nn.Module:
    """Return a module that computes what `host`, which has no children, does, without anybody's hooks.

    It has other parameters and buffers, by name, and computes with those kept in another type in these types.
    `torch.func.functional_call` does the same by putting the tensors into `host` for the time of the call, which
    another thread that runs the model would see. Buffers are copied: running statistics of rows that several fields
    share belong to none of them. What is not in `tensors` is shared.
    """
    other = copy.copy(host)
    hooks: dict[str, Any] = {name: OrderedDict() for name in _HOOKS}
    buffers = {name: None if buffer is None else buffer.clone() for name, buffer in host._buffers.items()}
    other.__dict__.update(hooks, _parameters=dict(host._parameters), _buffers=buffers, _modules={})
    other.__dict__.pop("forward", None)
    for name, value in tensors.items():
        place: dict[str, Any] = other._buffers if name in buffers else other._parameters
        place[name] = value
    compute_in(other, {name: dtype for name, dtype in dtypes.items() if tensors[name].dtype != dtype})
    return other
