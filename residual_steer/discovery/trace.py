"""Which modules a model calls, with what, and what comes back; and the run that shows it, which leaves no trace."""

from __future__ import annotations

import contextlib
import itertools
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from residual_steer._undisturbed import buffers_as_before, changed, undisturbed, watch
from residual_steer.stream import dense

from .graph import Edge, edge_of

__all__ = ["LISTS", "Call", "Path", "Value", "called", "differentiable", "is_marked", "probed", "suspects", "tensors"]

LISTS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)
Path = tuple[int | str, ...]


@dataclass(frozen=True)
class Value:
    """A tensor of a call as it was at that moment: its place, its shape, and where its graph begins."""

    path: Path
    shape: tuple[int, ...]
    edge: Edge
    tensor: Tensor

    @classmethod
    def all(cls, tree: Any) -> list[Value]:
        """Return the values of the floating tensors in a tree."""
        return [cls(path, tuple(dense(t).shape), edge_of(t), t) for path, t in tensors(tree)]


@dataclass
class Call:
    """One call of one module."""

    path: str  # the module's name in the model
    module: nn.Module
    entered: list[Value]  # positions and keywords are the first part of a place
    left: list[Value] = field(default_factory=list)
    span: tuple[int, int] = (0, 0)  # when it began and ended, counted in events
    overwrote: set[Path] = field(default_factory=set)  # places of what it was given and changed

    def holds(self, other: Call) -> bool:
        """Return whether another call was made during this one."""
        return self.span[0] < other.span[0] and other.span[1] < self.span[1]


def tensors(tree: Any, path: Path = (), depth: int = 2) -> Iterator[tuple[Path, Tensor]]:
    """Yield the floating tensors of nested tuples, lists and mappings with their places."""
    if isinstance(tree, Tensor):
        if tree.is_floating_point() and tree.dim() > 1:
            yield path, tree
    elif depth and isinstance(tree, (tuple, list, Mapping)):
        for key, value in tree.items() if isinstance(tree, Mapping) else enumerate(tree):
            if isinstance(key, (int, str)):
                yield from tensors(value, (*path, key), depth - 1)


def suspects(model: nn.Module) -> dict[str, nn.Module]:
    """Return what could be a residual block: in a list, marked by transformers, or beside another of its class."""
    found: dict[str, nn.Module] = {}
    for path, parent in model.named_modules():
        children = [(name, child) for name, child in parent.named_children() if _runs(child)]
        kinds = [type(child) for _, child in children]
        for name, child in children:
            if isinstance(parent, LISTS) or is_marked(child) or kinds.count(type(child)) > 1:
                found[f"{path}.{name}" if path else name] = child
    return found


def is_marked(module: nn.Module) -> bool:
    """Return whether transformers marks a module as a layer whose inside can be computed again."""
    return any(cls.__name__ == "GradientCheckpointingLayer" for cls in type(module).__mro__)


def _runs(module: nn.Module) -> bool:
    """Return whether a module has parameters, and is no mere list."""
    bare = isinstance(module, (nn.ModuleList, nn.ModuleDict)) and type(module).forward is nn.Module.forward
    return not bare and next(module.parameters(), None) is not None


@contextlib.contextmanager
def called(modules: Mapping[str, nn.Module]) -> Iterator[list[Call]]:
    """Record the calls of modules that return, in the order in which they began."""
    calls: list[Call] = []
    open_calls: list[Call] = []
    clock = itertools.count()

    def enter(path: str, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        values = Value.all({**dict(enumerate(args)), **kwargs})
        open_calls.append(Call(path, module, values, span=(next(clock), -1)))

    def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        while open_calls and open_calls[-1].module is not module:  # of calls that did not return
            open_calls.pop()
        if open_calls:
            call = open_calls.pop()
            call.left = Value.all(output)
            call.overwrote = {value.path for value in call.entered if edge_of(value.tensor) != value.edge}
            call.span = (call.span[0], next(clock))
            calls.append(call)

    with contextlib.ExitStack() as stack:
        for path, module in modules.items():
            stack.enter_context(watch([module], partial(enter, path), leave))
        yield calls
    calls.sort(key=lambda call: call.span)


@contextlib.contextmanager
def probed(model: nn.Module) -> Iterator[None]:
    """Run what is inside in evaluation mode and put back modes, buffers and random generators, whatever happens."""
    with undisturbed(model), torch.inference_mode(False), buffers_as_before(model), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def differentiable(model: nn.Module) -> Iterator[None]:
    """Let every parameter require a gradient, so that all that is computed is in one graph, which keeps no values."""
    floating = [parameter for parameter in model.parameters() if parameter.is_floating_point()]
    forgetful = torch.autograd.graph.saved_tensors_hooks(lambda _: None, _no_backward)
    with changed(floating, "requires_grad", True), torch.enable_grad(), forgetful:
        yield


def _no_backward(_: None) -> Tensor:
    raise RuntimeError("no backward pass runs through a probe.")
