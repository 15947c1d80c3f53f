"""How a method stands in a frozen model: what it is given, what it puts there, and where it would never run."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.machinery import PathFinder
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from residual_steer._internals import compile_with_hooks
from residual_steer.backbone import Backbone, compute_dtype
from residual_steer.config import check_ranks
from residual_steer.errors import SteerError, some

_notes = threading.local()  # of the calls that are running in this thread, by the id of the module that noted them


@dataclass(frozen=True)
class Subject:
    """A model that a method is applied to, and the base parameters that the user asked to train along."""

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


class Trained(NamedTuple):
    """What a method trains, and the paths of the modules that have to be called for it to have an effect."""

    parameters: Sequence[nn.Parameter]
    called: Sequence[str] = ()


class Attached(nn.Module):
    """A child of the module that it serves, whose hooks are its own methods, so that copies and pickles stand alone.

    `enter` may change a call, and note something of it for `leave`, which may change the output. Notes are the
    thread's: several may run one model.
    """

    def attach(self, host: nn.Module, key: str, *, prepend: bool = False) -> None:
        """Become a child of `host`, in its mode, and see its calls from now on, with `prepend` the output first."""
        require_free([host], key)
        compile_with_hooks()
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
            vars(_notes)[str(id(self))] = note
        return args, kwargs

    def _after(self, host: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if torch.compiler.is_compiling():
            note, self._note = self._note, None
        else:
            note = vars(_notes).pop(str(id(self)), None)
        return self.leave(host, output, note)


def place_of(module: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Return the device of a module, and the type that trains beside it: fp32 where its weights have less."""
    device = next((t.device for t in (*module.parameters(), *module.buffers())), torch.device("cpu"))
    return device, torch.promote_types(compute_dtype(module), torch.float32)


def require_free(hosts: Iterable[nn.Module], name: str) -> None:
    """Raise if a host has something of a name under which a child is to be put into each of them."""
    for host in hosts:
        if hasattr(host, name):
            raise SteerError(f"this {type(host).__name__} has a {name!r} of its own, where the method would stand.")


class Part(NamedTuple):
    """A module inside a block, some of which read its weight without calling it: what is attached there never runs."""

    block: int
    name: str  # in the model
    path: str  # in the block
    module: nn.Module
    remedy: str | None  # what makes the block call it, "" if nothing does; None where it does


def parts_of(subject: Subject, layers: Sequence[int] | None, wanted: Callable[[nn.Module], bool]) -> list[Part]:
    """Return the modules that `wanted` takes inside the blocks that `layers` names, None for all."""
    names = {id(module): name for name, module in subject.model.named_modules()}
    found = []
    for index in check_ranks(1, layers, len(subject.backbone.blocks)):
        inside = list(subject.backbone.blocks[index].named_modules())
        silent = {f"{path}.{name}": way for path, module in inside for name, way in _bypassed_in(module).items()}
        for path, module in inside:
            if path and wanted(module):
                found.append(Part(index, names[id(module)], path, module, silent.get(path, silent.get(f".{path}"))))
    return found


def is_linear(module: nn.Module) -> bool:
    """Return whether a module is a linear layer, or GPT-2's `Conv1D`, which is one with its weight transposed."""
    return isinstance(module, nn.Linear) or (type(module).__name__ == "Conv1D" and hasattr(module, "nf"))


def _bypassed_in(module: nn.Module) -> dict[str, str]:
    """Return which children a module does not call, and what makes it do so."""
    found: dict[str, str] = {}
    if isinstance(getattr(module, "conv1d", None), nn.Module):  # a selective SSM
        found |= dict.fromkeys(("conv1d", "dt_proj"), "")
        if _package(module) == "mamba_ssm" and hasattr(module, "dt_proj"):  # Mamba-1 multiplies the weight itself
            found["in_proj"] = ""
        remedy = _fused(module)
        if remedy is not None:
            found |= dict.fromkeys(("x_proj", "norm", "out_proj"), remedy)
    if getattr(module, "fused_add_norm", False):
        found |= dict.fromkeys(("norm", "norm2"), "build the model with fused_add_norm=False")
    if getattr(module, "q_bias", None) is not None and not getattr(module, "qkv_bias_separate", False):  # timm's EVA
        found["qkv"] = "set its attention's `qkv_bias_separate = True`" if hasattr(module, "qkv_bias_separate") else ""
    if isinstance(module, nn.MultiheadAttention):
        found["out_proj"] = ""
    return {name: remedy for name, remedy in found.items() if isinstance(getattr(module, name, None), nn.Module)}


def _fused(mixer: nn.Module) -> str | None:
    """Return what switches a mixer's fused kernel off; None if it does not run one."""
    if _package(mixer) == "mamba_ssm":
        convolution = getattr(sys.modules[type(mixer).__module__], "causal_conv1d_fn", None)
        for switch, there in (("use_fast_path", convolution is not None), ("use_mem_eff_path", True)):
            if there and getattr(mixer, switch, False):
                return f"set its mixer's `{switch} = False`"
        return None
    # transformers takes the fused kernel in training wherever it is installed, and has no switch for it
    return "" if PathFinder.find_spec("selective_scan_cuda") is not None else None


def _package(module: nn.Module) -> str:
    return type(module).__module__.partition(".")[0]


class Guard:
    """A check, in the first training step, that modules are called; it is gone after that.

    Its hooks are its own methods, which follow the model into copies. They do not run in a compiled forward pass.
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
        if missed:
            raise SteerError(
                f"{len(missed)} of the {len(self._paths)} modules that the method was attached to were not called in a "
                f"training step: {some(missed)}. The model does not use them, calls parts of them, or reads their "
                "weight itself, as fused kernels do; so nothing would be trained there. Leave them out (`targets`, "
                "`layers`), switch the fused path off, or choose another method."
            )
        self.remove()
