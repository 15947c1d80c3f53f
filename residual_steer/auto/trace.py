"""Which modules a model calls, with what, and what comes back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from .graph import Edge, edge_of
from .place import Path, tensors

__all__ = ["Call", "Value", "called", "is_marked", "suspects"]


@dataclass(frozen=True)
class Value:
    """A tensor of a call as it was at that moment: its place, its shape, and where its graph begins."""

    path: Path
    shape: tuple[int, ...]
    edge: Edge | None
    tensor: Tensor
    version: int

    @classmethod
    def all(cls, tree: Any) -> list[Value]:
        """Return the values of the floating tensors in a tree."""
        return [cls(path, tuple(t.shape), edge_of(t), t, t._version) for path, t in tensors(tree)]


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
        """Say whether another call was made during this one."""
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
        listed = isinstance(parent, (nn.ModuleList, nn.Sequential, nn.ModuleDict))
        for name, child in children:
            if listed or is_marked(child) or kinds.count(type(child)) > 1:
                found[f"{path}.{name}" if path else name] = child
    return found


def is_marked(module: nn.Module) -> bool:
    """Say whether transformers marks a module as a layer whose inside can be computed again."""
    return any(cls.__name__ == "GradientCheckpointingLayer" for cls in type(module).__mro__)


def _is_composite(module: nn.Module) -> bool:
    bare = isinstance(module, (nn.ModuleList, nn.ModuleDict)) and type(module).forward is nn.Module.forward
    return not bare and next(module.parameters(), None) is not None


@contextlib.contextmanager
def called(modules: Mapping[str, nn.Module] | Iterable[tuple[str, nn.Module]]) -> Iterator[list[Call]]:
    """Record the calls of modules that return, in the order in which they began."""
    calls: list[Call] = []
    open_calls: list[Call] = []
    clock = iter(range(10**12))
    handles = []
    for path, module in dict(modules).items():

        def enter(module: nn.Module, args: Any, kwargs: Any, path: str = path) -> None:
            values = Value.all(dict(enumerate_call(args, kwargs)))
            open_calls.append(Call(path, module, values, span=(next(clock), -1)))

        def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            while open_calls and open_calls[-1].module is not module:  # of calls that did not return
                open_calls.pop()
            if not open_calls:
                return
            call = open_calls.pop()
            call.left = Value.all(output)
            call.overwrote = {value.path for value in call.entered if value.tensor._version != value.version}
            call.span = (call.span[0], next(clock))
            calls.append(call)

        handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
        handles.append(module.register_forward_hook(leave, with_kwargs=True))
    try:
        yield calls
        calls.sort(key=lambda call: call.span)
    finally:
        for handle in handles:
            handle.remove()


def enumerate_call(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[tuple[Any, Any]]:
    """Yield the arguments of a call by position and keyword."""
    yield from enumerate(args)
    yield from kwargs.items()
