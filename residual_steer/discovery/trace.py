"""Which modules a model calls, with what, and what comes back; and the run that shows it, which leaves no trace."""

from __future__ import annotations

import contextlib
import random
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from residual_steer.nested import dense

from .graph import Edge, edge_of
from .place import Path, tensors

__all__ = ["LISTS", "Call", "Value", "called", "differentiable", "hooked", "is_marked", "suspects", "undisturbed"]

LISTS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)


@dataclass(frozen=True)
class Value:
    """A tensor of a call as it was at that moment: its place, its shape, and where its graph begins."""

    path: Path
    shape: tuple[int, ...]
    edge: Edge | None
    tensor: Tensor

    @classmethod
    def all(cls, tree: Any) -> list[Value]:
        """Return the values of the floating tensors in a tree."""
        return [cls(path, tuple(dense(t).shape), edge_of(t), t) for path, t in tensors(tree)]


@dataclass
class Call:
    """One call of one module.

    Attributes:
        path: the module's name in the model.
        module: the module.
        entered: what it was given, positions and keywords as the first part of a place.
        left: what came back.
        span: when it began and ended, counted in events.
        overwrote: places of what it was given and changed.
    """

    path: str
    module: nn.Module
    entered: list[Value]
    left: list[Value] = field(default_factory=list)
    span: tuple[int, int] = (0, 0)
    overwrote: set[Path] = field(default_factory=set)

    def holds(self, other: Call) -> bool:
        """Return whether another call was made during this one."""
        return self.span[0] < other.span[0] and other.span[1] < self.span[1]


def suspects(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules that could be residual blocks, by name.

    They have parameters and parts, and stand in a list, are marked as a layer by transformers, or have a sibling of
    their own class.
    """
    found: dict[str, nn.Module] = {}
    for path, parent in model.named_modules():
        children = [(name, child) for name, child in parent.named_children() if _is_composite(child)]
        kinds = [type(child) for _, child in children]
        for name, child in children:
            if isinstance(parent, LISTS) or is_marked(child) or kinds.count(type(child)) > 1:
                found[f"{path}.{name}" if path else name] = child
    return found


def is_marked(module: nn.Module) -> bool:
    """Return whether transformers marks a module as a layer whose inside can be computed again."""
    return any(cls.__name__ == "GradientCheckpointingLayer" for cls in type(module).__mro__)


def _is_composite(module: nn.Module) -> bool:
    bare = isinstance(module, (nn.ModuleList, nn.ModuleDict)) and type(module).forward is nn.Module.forward
    return not bare and next(module.parameters(), None) is not None


@contextlib.contextmanager
def hooked(modules: Mapping[str, nn.Module], enter: Callable[..., Any], leave: Callable[..., Any]) -> Iterator[None]:
    """Call `enter(path, module, args, kwargs)` and `leave(…, output)` whenever one of these modules is called.

    What `leave` returns stands for the module's output, unless it is None.
    """
    handles = []

    def watch(path: str, module: nn.Module) -> None:
        handles.append(module.register_forward_pre_hook(lambda *call: enter(path, *call), with_kwargs=True))
        handles.append(module.register_forward_hook(lambda *call: leave(path, *call), with_kwargs=True))

    try:
        for path, module in modules.items():
            watch(path, module)
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def called(modules: Mapping[str, nn.Module]) -> Iterator[list[Call]]:
    """Record the calls of modules that return, in the order in which they began."""
    calls: list[Call] = []
    open_calls: list[Call] = []
    clock = iter(range(10**12))

    def enter(path: str, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        values = Value.all({**dict(enumerate(args)), **kwargs})
        open_calls.append(Call(path, module, values, span=(next(clock), -1)))

    def leave(path: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        while open_calls and open_calls[-1].module is not module:  # of calls that did not return
            open_calls.pop()
        if not open_calls:
            return
        call = open_calls.pop()
        call.left = Value.all(output)
        call.overwrote = {value.path for value in call.entered if edge_of(value.tensor) != value.edge}
        call.span = (call.span[0], next(clock))
        calls.append(call)

    with hooked(modules, enter, leave):
        yield calls
    calls.sort(key=lambda call: call.span)


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Run what is inside in evaluation mode and put back modes, buffers and random generators, whatever happens.

    The modes are set on the modules themselves: a `train` of a model's own may do more than that.
    """
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(module, name, b, b.clone()) for module, _ in modes for name, b in module.named_buffers(recurse=False)]
    there = {(module, name) for module, name, _, _ in buffers}
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(), torch.inference_mode(False), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for module, _ in modes:
            module.training = False
        try:
            yield
        finally:
            for module, mode in modes:
                module.training = mode
            random.setstate(python)
            np.random.set_state(numpy)
            made = [(m, name) for m, _ in modes for name, _ in m.named_buffers(recurse=False) if (m, name) not in there]
            for module, name in made:  # registered as None, and filled in by the run
                setattr(module, name, None)
            for module, name, buffer, value in buffers:
                setattr(module, name, buffer)
                if buffer.shape != value.shape or not torch.equal(buffer.nan_to_num(), value.nan_to_num()):
                    with torch.no_grad():
                        buffer.copy_(value)


@contextlib.contextmanager
def differentiable(model: nn.Module) -> Iterator[None]:
    """Let every parameter require a gradient, so that all that is computed is in one graph, which keeps no values."""
    parameters = [(p, p.requires_grad) for p in model.parameters() if p.is_floating_point()]
    try:
        for parameter, _ in parameters:
            parameter.requires_grad_(True)
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(lambda _: None, _no_backward):
            yield
    finally:
        for parameter, required in parameters:
            parameter.requires_grad_(required)


def _no_backward(_: None) -> Tensor:
    raise RuntimeError("no backward pass runs through a probe.")
