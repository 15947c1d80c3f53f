"""How a method stands in a frozen model: what it is given, what it puts there, and the package's only hooks."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from residual_steer.backbone import Backbone, compute_dtype
from residual_steer.config import check_ranks
from residual_steer.errors import SteerError

__all__ = ["Attached", "Guard", "Subject", "Trained", "count", "place_of", "require_free"]


@dataclass(frozen=True)
class Subject:
    """A model that a method is applied to.

    Attributes:
        model: what the user gave.
        backbone: where its stream is.
        opened: the base parameters that the user asked to train along.
    """

    model: nn.Module
    backbone: Backbone
    opened: Sequence[nn.Parameter] = ()

    @property
    def inner(self) -> nn.Module:
        """The module that the backbone describes, without heads and wrappers."""
        return self.model.get_submodule(self.backbone.path)

    @property
    def is_ssm(self) -> bool:
        """Whether every block mixes tokens by a selective state space alone."""
        blocks = self.backbone.blocks
        return all(any(isinstance(getattr(m, "A_log", None), Tensor) for m in block.modules()) for block in blocks)

    def blocks(self, layers: Sequence[int] | None = None) -> dict[int, nn.Module]:
        """Return the blocks that `layers` names, by index; None names all.

        Raises:
            SteerError: a block that is not there, or named twice.
        """
        chosen = check_ranks(1, layers, len(self.backbone.blocks))
        return {index: self.backbone.blocks[index] for index in chosen}


@dataclass(frozen=True)
class Trained:
    """What a method trains.

    Attributes:
        parameters: what it opens, beside what the user asked for.
        called: paths of modules in the model that have to be called for the method to have an effect.
    """

    parameters: Sequence[nn.Parameter]
    called: Sequence[str] = ()


class _Notes(threading.local):
    """What `enter` notes of the calls that are running in this thread, by the id of its module."""

    def __init__(self) -> None:
        self.of: dict[int, Any] = {}


_notes = _Notes()


class Attached(nn.Module):
    """What a method puts into a model: a child of the module that it serves, whose hooks are its own bound methods.

    So copies and pickles stand on their own. `enter` may change a call, and note something of it for `leave`, which may
    change the output. Nothing of a call is kept on the module: several threads may run one model.
    """

    def attach(self, host: nn.Module, key: str, *, prepend: bool = False) -> None:
        """Become a child of `host`, in the mode that it is in, and see its calls from now on.

        Args:
            host: the module.
            key: the child's name in it.
            prepend: whether to be the first to see the output.

        Raises:
            SteerError: the host has something of that name.
        """
        require_free([host], key)
        self._note: Any = None  # inside torch.compile alone
        host.add_module(key, self)
        self.train(host.training)
        if type(self).enter is not Attached.enter:
            host.register_forward_pre_hook(self._before, with_kwargs=True)
        host.register_forward_hook(self._after, prepend=prepend)

    def forward(self, z: Any) -> Any:
        """Return what comes in: a host that calls all its children, an `nn.Sequential`, calls this too."""
        return z

    def enter(self, host: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any, Any]:
        """Return the arguments and keywords that the host is to get, and a note for `leave`."""
        return args, kwargs, None

    def leave(self, host: Any, output: Any, note: Any) -> Any:
        """Return what is to leave the host."""
        return output

    def _before(self, host: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        args, kwargs, note = self.enter(host, args, kwargs)
        if torch.compiler.is_compiling():
            self._note = note
        else:
            _notes.of[id(self)] = note
        return args, kwargs

    def _after(self, host: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if torch.compiler.is_compiling():
            note, self._note = self._note, None
        else:
            note = _notes.of.pop(id(self), None)
        return self.leave(host, output, note)


class Guard:
    """A check, in the first training step, that what a method was attached to is called at all; it is gone after that.

    Some models read a module's weight without calling the module, above all in fused kernels (peft #2274, mamba #279),
    or call what is in a module past it. Whatever was attached there would train nothing, without a word.

    Its hooks are its own bound methods, so that they follow the model into copies. A compiled forward pass is not
    watched: what the hooks would note is no part of the graph.

    Args:
        model: the model that is called.
        paths: of the modules that have to be called.
    """

    def __init__(self, model: nn.Module, paths: Sequence[str]) -> None:
        self._paths = tuple(paths)
        self._called: set[nn.Module] = set()
        self._handles: list[RemovableHandle] = [model.register_forward_pre_hook(self._begin)]
        for module in {model.get_submodule(path) for path in paths}:
            self._handles.append(module.register_forward_pre_hook(self._note))
        self._handles.append(model.register_forward_hook(self._judge))

    def remove(self) -> None:
        """Take the hooks away."""
        while self._handles:
            self._handles.pop().remove()

    def _begin(self, model: nn.Module, args: tuple[Any, ...]) -> None:
        if not torch.compiler.is_compiling():
            self._called.clear()

    def _note(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if not torch.compiler.is_compiling():
            self._called.add(module)

    def _judge(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Raise if a module that has to be called was not."""
        if torch.compiler.is_compiling() or not model.training:
            return
        missed = [path for path in self._paths if model.get_submodule(path) not in self._called]
        self._called.clear()
        if missed:
            listed = ", ".join(missed[:6]) + (", …" if len(missed) > 6 else "")
            raise SteerError(
                f"{len(missed)} of the {len(self._paths)} modules that the method was attached to were not called in a "
                f"training step: {listed}. The model does not use them, calls parts of them, or reads their weight "
                "itself, as fused kernels do; so nothing would be trained there. Leave them out (`targets`, `layers`), "
                "switch the fused path off, or choose another method."
            )
        self.remove()


def place_of(module: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Return the device of a module, and the type that trains beside it: fp32 where its weights have less."""
    device = next((t.device for t in (*module.parameters(), *module.buffers())), torch.device("cpu"))
    return device, torch.promote_types(compute_dtype(module), torch.float32)


def require_free(hosts: Iterable[nn.Module], name: str) -> None:
    """Raise if a host has something of a name under which a child is to be put into each of them."""
    for host in hosts:
        if hasattr(host, name):
            raise SteerError(f"this {type(host).__name__} has a {name!r} of its own, where the method would stand.")


def count(name: str, value: object, *, least: int = 1) -> int:
    """Return an option that is a whole number; raise if it is none, or too small."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise SteerError(f"`{name}` is an integer from {least}; received {value!r}.")
    return value
