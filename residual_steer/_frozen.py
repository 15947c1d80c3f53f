"""The base of a steered model: its modules without what steering attaches, and what is frozen in them.

What others opened is theirs: adapters of another library train on, a model that somebody froze stays as it is, and what
is opened after the first field came trains, and is not saved with a field.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ._internals import parts, run_after, version
from .errors import SteerError, some

COMPUTED = (torch.float64, torch.float32, torch.bfloat16, torch.float16)  # types that matrix products are computed in
_ADAPTERS = ("peft", "adapters", "pyreft", "pyvene")  # packages whose modules bring parameters of their own
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module"}
_INSTANCE = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
_log = logging.getLogger("residual_steer")


@dataclass
class Replaced:
    """A method of one model with another in its place, until `remove`; copies of a partial follow the model's."""

    model: nn.Module
    name: str
    by: partial[Any]
    before: Any = field(init=False)  # what somebody had put there already; None if it was the class's own

    def __post_init__(self) -> None:
        self.before = self.model.__dict__.get(self.name)
        self.model.__dict__[self.name] = self.by

    @staticmethod
    def own(model: nn.Module, name: str, handles: Iterable[Any]) -> Callable[..., Any]:
        """Return the method in whose place another stands, given the handles of a model's steering."""
        mine = (one for one in handles if isinstance(one, Replaced) and one.name == name)
        before = next((one.before for one in mine), None)
        return partial(getattr(type(model), name), model) if before is None else before

    def remove(self) -> None:
        """Let the method that was there run again, unless somebody has put a third one there."""
        if getattr(self.model.__dict__.get(self.name), "func", None) is self.by.func:
            del self.model.__dict__[self.name]
            if self.before is not None:
                self.model.__dict__[self.name] = self.before


class Attachment(nn.Module):
    """What steering adds to a module of the base: a registered child, to which that module's hooks lead.

    So the base's keys in the state dict stay as they are, and `copy.deepcopy` and pickling carry it along without a
    reference back to the original.

    Args:
        host: the module of the base.
        key: under which name it is registered there, which has to be free.
    """

    def __init__(self, host: nn.Module, key: str) -> None:
        super().__init__()
        if hasattr(host, key):
            raise SteerError(f"this {type(host).__name__} has a {key!r} of its own, where steering would stand.")
        self.key, self._host = key, (host,)  # in a tuple, since a module would become a child
        self._handles: list[RemovableHandle] = []
        host.add_module(key, self)

    @property
    def host(self) -> nn.Module:
        """The module of the base."""
        return self._host[0]

    @property
    def handles(self) -> Sequence[RemovableHandle]:
        """Those of its hooks, the one that changes what leaves the host first."""
        return self._handles

    def detach(self) -> None:
        """Take away the child and the hooks that were added to the host, and nothing else."""
        for handle in self._handles:
            handle.remove()
        delattr(self.host, self.key)


def follow(block: nn.Module, handle: RemovableHandle) -> None:
    """Let a hook of a block run right after the fields beside that block have added to what leaves it."""
    beside = getattr(block, "steering_block", None)
    if isinstance(beside, Attachment):
        run_after(block, handle, beside.handles[0])


def base_modules(model: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules of a model by every path that they have, without what steering added."""
    yield path, model
    for name, child in parts(model):
        if not isinstance(child, Attachment):
            yield from base_modules(child, f"{path}.{name}" if path else name)


def chain(model: nn.Module, path: str) -> list[nn.Module]:
    """Return the modules that a path leads through, from the model to what stands at its end."""
    found = [model]
    for name in path.split(".") if path else ():
        found.append(found[-1].get_submodule(name))
    return found


def can_train(parameter: nn.Parameter) -> bool:
    """Return whether gradients make sense for a parameter: no packed integers, float8, or subclass of a quantiser."""
    return type(parameter) is nn.Parameter and parameter.dtype in COMPUTED


def adapters_own(modules: Iterable[nn.Module]) -> set[int]:
    """Return the ids of the parameters that other adapters brought: their own, and those in their dicts by name."""
    found: set[int] = set()
    for module in modules:
        if type(module).__module__.partition(".")[0] in _ADAPTERS:
            dicts = [child for child in module.children() if isinstance(child, (nn.ModuleDict, nn.ParameterDict))]
            found |= {id(p) for child in dicts for p in child.parameters()}
            found |= {id(p) for p in module.parameters(recurse=False)}
    return found


@dataclass
class Frozen:
    """What was frozen in a model."""

    closed: list[str] = field(default_factory=list)  # names of parameters
    # modules with running statistics, and the attribute that moves them with its value before steering
    statistics: list[tuple[nn.Module, str, object]] = field(default_factory=list)

    def close(self, model: nn.Module, blocks: Iterable[nn.Module]) -> None:
        """Freeze a model that nobody froze yet, but for the parameters of other adapters.

        Where less than half of the numbers in the blocks require a gradient, somebody chose those that do.
        """
        inside = {id(p): p for block in blocks for p in block.parameters() if can_train(p)}.values()
        opened = sum(p.numel() for p in inside if p.requires_grad)
        if 2 * opened >= sum(p.numel() for p in inside):
            foreign = adapters_own(model.modules())
            for name, parameter in model.named_parameters():
                if parameter.requires_grad and id(parameter) not in foreign:
                    self.closed.append(plain_name(name))
                    parameter.requires_grad_(False)
        _log.info("froze %d tensors of a %s", len(self.closed), type(model).__name__)
        for module in model.modules():
            attribute = "momentum" if isinstance(module, _INSTANCE) else "track_running_stats"
            if getattr(module, "running_mean", None) is not None and hasattr(module, attribute):
                self.statistics.append((module, attribute, getattr(module, attribute)))
                self.move(module, any(p.requires_grad for p in module.parameters(recurse=False)))

    def move(self, module: nn.Module, on: bool) -> None:
        """Let the running statistics of a module move, if it has any, or keep them still."""
        for each, attribute, value in self.statistics:
            if each is module:  # without momentum an instance norm keeps what it has, and uses it in evaluation
                setattr(module, attribute, value if on else 0.0 if attribute == "momentum" else False)

    def reopen(self, model: nn.Module) -> None:
        """Put back what `close` changed."""
        there = {plain_name(name): parameter for name, parameter in model.named_parameters()}
        for name in self.closed:
            if name in there:
                there[name].requires_grad_(True)
        for module, attribute, value in self.statistics:
            setattr(module, attribute, value)


class Moving:
    """Stored buffers, watched during one call in training mode."""

    def __init__(self, buffers: Iterable[tuple[str, Tensor]]) -> None:
        self._seen = [(name, tensor, version(tensor)) for name, tensor in buffers if not tensor.is_inference()]

    def warn(self, own: Collection[int]) -> None:
        """Warn of frozen buffers that the call moved: what `use(None)` gives back is then no more what it was."""
        moved = [name for name, tensor, before in self._seen if version(tensor) != before and id(tensor) not in own]
        if moved:
            warnings.warn(
                f"a call in training mode changed {some(moved)}, which is frozen and not saved with a field. "
                "Call `eval()` on that module after `model.train()`, or train it along: `train=[...]`.",
                stacklevel=3,
            )


def plain_name(name: str) -> str:
    """Drop what `torch.compile` and FSDP1 put into the name of a tensor of a part that they wrapped."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS) if "_" in name else name
