"""The state of a steered model: which fields it holds, which act, and what has to be put back."""

from __future__ import annotations

import sys
import warnings
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .backbone import ATTRIBUTE, Backbone, Handle, bulk_dtype
from .blend import Tables
from .errors import SteerError
from .field import HRes
from .heads import Entry, Heads
from .injector import Injector
from .mix import OFF, Mix
from .spec import FieldSpec
from .switch import Switch

__all__ = ["ATTRIBUTE", "Steering", "base_tensors", "plain_name", "steering_of"]


@dataclass
class Steering:
    """What steering did to a model, kept on the model itself.

    Attributes:
        backbone: where the stream is.
        required: `requires_grad` of every base parameter before steering, by name.
        specs: the fields, by name.
        mix: which fields act.
        wish: by field, whether it was asked to train (`thaw`) or not to (`freeze`).
        injectors: the module at each steered point, by site and block index.
        heads: the base tensors that fields train along.
        handles: hooks on the model itself, and those that the family needs while it is steered.
    """

    backbone: Backbone
    required: dict[str, bool]
    specs: dict[str, FieldSpec] = field(default_factory=dict)
    mix: Mix = OFF
    wish: dict[str, bool] = field(default_factory=dict)
    injectors: dict[tuple[str, int], Injector] = field(default_factory=dict)
    heads: Heads = field(default_factory=Heads)
    handles: list[Handle] = field(default_factory=list)

    def install(self, model: nn.Module) -> None:
        """Attach to a model that is about to get its first field."""
        if self.backbone.prepare is not None:  # first, since it may raise, as may a warning
            self.handles.extend(self.backbone.prepare(self.backbone.blocks))
        self.handles.append(model.register_forward_pre_hook(self._enter, with_kwargs=True))
        self.handles.append(model.register_forward_hook(self._leave, always_call=True))
        setattr(model, ATTRIBUTE, self)

    def name_of(self, name: str | None) -> str:
        """Return the name of a field, the one that acts for None.

        Raises:
            SteerError: there is no such field, or not one that acts.
        """
        known = ", ".join(self.specs)
        if name is None and len(self.mix.names) != 1:
            now = "several of them act" if self.mix.names else "none of them acts"
            raise SteerError(f"`name` is one of the fields {known}; received None, while {now}.")
        name = self.mix.names[0] if name is None else name
        if not isinstance(name, str) or name not in self.specs:
            raise SteerError(f"`name` is one of the fields {known}; received {name!r}.")
        return name

    def trains(self, name: str) -> bool:
        """Say whether a field trains: selected by name it does unless frozen, in other mixes only if thawed.

        So mixes for serving require no gradient, and neither other weights nor other rows are another graph to compile.
        """
        return self._trains_in(self.mix, name)

    def _trains_in(self, mix: Mix, name: str) -> bool:
        return name in mix.names and self.wish.get(name, mix.by_name)

    def fields(self, name: str) -> dict[int, HRes]:
        """Return the modules of one field by block index."""
        spec = self.specs[name]
        found: dict[int, HRes] = {}
        for index in spec.ranks:
            module = self.injectors[spec.site, index].fields[name]
            if isinstance(module, HRes):
                found[index] = module
        return found

    def values(self, model: nn.Module, name: str) -> dict[str, Tensor]:
        """Return the base tensors that one field trains, its own."""
        return self.heads.values(name, _base_entries(model))

    def tensors(self, model: nn.Module, name: str) -> dict[str, Tensor]:
        """Return every tensor of a field: its own, by block, and those of the base that it trains, `train.…`."""
        own = {
            f"blocks.{index}.{key}": tensor
            for index, module in self.fields(name).items()
            for key, tensor in module.state_dict().items()
        }
        return own | {f"train.{key}": tensor for key, tensor in self.values(model, name).items()}

    @torch.inference_mode(False)  # what is made here is to be trained, whatever mode the caller is in
    def add(self, model: nn.Module, spec: FieldSpec) -> None:
        """Make the field of `spec` and select it; if that fails, all is as it was."""
        made = {}
        for index in spec.ranks:
            block = self.backbone.blocks[index]
            dtype = torch.promote_types(bulk_dtype(block), torch.float32)
            made[index] = spec.build(index, self.backbone, device=_device(block), dtype=dtype)
        before = self.mix
        self.select(model, OFF)  # so that what the field begins with, and what is kept as the base's, is the base's
        try:
            inside = {id(module) for block in self.backbone.blocks for module in block.modules()}
            self.specs[spec.name] = spec
            self.heads.open(spec.name, spec.train, _base_entries(model), inside)
            for index, module in made.items():
                injector = self.injectors.get((spec.site, index))
                if injector is None:
                    injector = self.injectors[spec.site, index] = Injector(self.backbone, index, spec.site)
                module.train(injector.training)
                injector.fields[spec.name] = module
            self.select(model, Mix.parse(spec.name, self.specs))
        except BaseException:
            self.mix = OFF if spec.name in self.mix.names else self.mix
            self.discard(model, spec.name)
            self.select(model, before)
            raise

    @torch.inference_mode(False)  # what is made here may be saved for a backward pass later
    @torch.no_grad()
    def select(self, model: nn.Module, mix: Mix) -> None:
        """Let the fields of a mix act, with what they trained along, and train as `trains` says.

        Raises:
            SteerError: a base tensor that a field trains was removed or resized since, or cannot be mixed as asked.
                Nothing has changed.
        """
        entries = _base_entries(model)
        lost = self.heads.lost(dict.fromkeys((*self.mix.names, *mix.names)), entries)
        if lost:
            raise SteerError(
                f"the model was changed since it was steered: {', '.join(lost)}, which a field trains, is gone or has "
                "another shape. Undo that change first, or `unsteer` and steer again."
            )
        for key, _, _, tensor in entries:
            if key in self.required and key not in self.heads.there and tensor.requires_grad:
                tensor.requires_grad_(False)
        self.heads.select(mix, entries, lambda name: self._trains_in(mix, name))
        self.mix = mix
        tables: Tables = {}
        for injector in self.injectors.values():
            injector.select(mix, tables)
            for name, module in injector.fields.items():
                _let_train(module, name, self.trains(name))

    def discard(self, model: nn.Module, name: str) -> None:
        """Take one of several fields away; a mix in which it acts ends."""
        self.select(model, OFF if name in self.mix.names else self.mix)
        for (site, index), injector in list(self.injectors.items()):
            if name in injector.fields:
                del injector.fields[name]
            if not injector.fields:
                self.injectors.pop((site, index)).detach()
        del self.specs[name]
        self.wish.pop(name, None)
        self.heads.close(name, _base_entries(model))
        self.select(model, self.mix)

    def remove(self, model: nn.Module) -> None:
        """Take away everything that steering added, and put back what it changed."""
        entries = _base_entries(model)
        lost = self.heads.lost(self.mix.names, entries)
        if lost:
            warnings.warn(
                f"the values before steering of {', '.join(lost)} were not put back: the model was changed since.",
                stacklevel=4,
            )
        else:
            self.select(model, OFF)
        for injector in self.injectors.values():
            injector.detach()
        for switch in self.heads.switches:
            switch.detach()
        for handle in self.handles:
            handle.remove()
        tensors = base_tensors(model)
        for name in self.required.keys() & tensors.keys():
            tensors[name].requires_grad_(self.required[name])
        delattr(model, ATTRIBUTE)

    def _enter(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Hold the rows of a mix against the batch that the model is called with.

        `generate` calls it with every row repeated; what a model does to its rows inside, each point finds out itself.

        Raises:
            SteerError: the batch has another number of rows.
        """
        if torch.compiler.is_compiling() or self.mix.rows is None:
            return
        given = (*args, *(value for key, value in kwargs.items() if key != "position_ids"))  # which may be one for all
        batch = next((x.shape[0] for x in given if isinstance(x, Tensor) and x.dim() > 1), None)
        rows = self.mix.rows
        if batch is None:
            return
        if batch != rows and (batch % rows or not _generating()):
            raise SteerError(
                f"the list given to `use` has {rows} rows, and this batch has {batch}. Give one name or None for every "
                "row; only `generate` may repeat rows, for beams and several sequences."
            )
        for switch in self.heads.switches:
            switch.batch = batch

    def _leave(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Forget the batch, and hear from the switches if the call has finished."""
        if torch.compiler.is_compiling() or self.mix.rows is None:
            return
        for switch in self.heads.switches:
            switch.batch = None
            if output is not None:
                switch.settle()


def steering_of(model: nn.Module) -> tuple[nn.Module, Steering]:
    """Return the steered module and its steering, through the wrappers of `torch.compile` and data parallelism.

    Raises:
        SteerError: the model is not steered.
    """
    base: object = model
    while isinstance(base, nn.Module):
        state = base.__dict__.get(ATTRIBUTE)
        if isinstance(state, Steering):
            return base, state
        base = getattr(base, "_orig_mod", None) or getattr(base, "module", None)
    raise SteerError(f"this {type(model).__name__} is not steered; call residual_steer.steer(model) first.")


def base_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return every parameter and stored buffer that is not steering's, under each of its plain names."""
    return {name: tensor for name, _, _, tensor in _base_entries(model)}


def _base_entries(model: nn.Module) -> list[Entry]:
    """List the base's tensors."""
    found: list[Entry] = []

    def visit(module: nn.Module, prefix: str) -> None:
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and name not in module._non_persistent_buffers_set:
                found.append((plain_name(prefix + name), module, name, tensor))
        for name, child in module._modules.items():
            if child is not None and not isinstance(child, (Injector, Switch)):
                visit(child, f"{prefix}{name}.")

    visit(model, "")
    return found


def plain_name(name: str) -> str:
    """Drop what `torch.compile` puts into the name of a tensor of a compiled part: `_orig_mod.`."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod") if "_orig_mod" in name else name


def _let_train(module: nn.Module, name: str, on: bool) -> None:
    """Open or close a field's parameters; the last of them notices a backward pass after it was closed."""
    last: Any = getattr(module.get_submodule("up"), "weight", None)
    for linear in module._modules.values():
        for parameter in linear._parameters.values() if linear is not None else ():
            if parameter is not None and parameter.requires_grad is not on:
                parameter.requires_grad_(on)
                if on and parameter is last and not parameter._backward_hooks:
                    parameter.register_hook(_Watch(name, parameter))


class _Watch:
    """Refuse a gradient for a parameter that trains no more, which autograd would drop without a word."""

    def __init__(self, name: str, parameter: nn.Parameter) -> None:
        self._name, self._parameter = name, weakref.ref(parameter)

    def __call__(self, gradient: Tensor) -> None:
        parameter = self._parameter()
        if parameter is not None and not parameter.requires_grad:
            raise SteerError(
                f"backward() reached field {self._name!r} after a selection was made in which it does not train: its "
                "gradient would be lost. Call backward() before the selection changes, inside the `with`."
            )


def _generating() -> bool:
    """Say whether some `generate` is running: it repeats the rows that it was called with."""
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name == "generate":
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def _device(module: nn.Module) -> torch.device:
    for tensor in (*module.parameters(), *module.buffers()):
        return tensor.device
    return torch.device("cpu")
