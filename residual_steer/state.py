"""The state of a steered model: which fields it holds, which act, and what has to be put back."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .backbone import Backbone, bulk_dtype
from .errors import SteerError
from .field import HRes
from .injector import Injector
from .mix import OFF, Mix
from .spec import FieldSpec
from .switch import Switch

__all__ = ["ATTRIBUTE", "Steering", "base_tensors", "plain_name", "steering_of"]

ATTRIBUTE = "_residual_steering"


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
        switches: the module at each head of which fields have their own values.
        handles: hooks that the family needs while the model is steered.
        base: original values of the base tensors that any field trains.
        trained: those tensors as each field left them, but for the field whose values are in the model now.
    """

    backbone: Backbone
    required: dict[str, bool]
    specs: dict[str, FieldSpec] = field(default_factory=dict)
    mix: Mix = OFF
    wish: dict[str, bool] = field(default_factory=dict)
    injectors: dict[tuple[str, int], Injector] = field(default_factory=dict)
    switches: list[Switch] = field(default_factory=list)
    handles: list[RemovableHandle] = field(default_factory=list)
    base: dict[str, Tensor] = field(default_factory=dict)
    trained: dict[str, dict[str, Tensor]] = field(default_factory=dict)

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
        return name in self.mix.names and self.wish.get(name, self.mix.by_name)

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
        """Return the base tensors that one field trains, with that field's values."""
        if name != self.mix.alone:
            return self.trained[name]
        tensors = base_tensors(model)
        return {key: tensors[key] for key in self.specs[name].train}

    def tensors(self, model: nn.Module, name: str) -> dict[str, Tensor]:
        """Return every tensor of a field: its own, by block, and those of the base that it trains, `train.…`."""
        own = {
            f"blocks.{index}.{key}": tensor
            for index, module in self.fields(name).items()
            for key, tensor in module.state_dict().items()
        }
        return own | {f"train.{key}": tensor for key, tensor in self.values(model, name).items()}

    def add(self, model: nn.Module, spec: FieldSpec) -> None:
        """Make the field of `spec` and select it. Every check has been made before."""
        made = {}
        for index in spec.ranks:
            block = self.backbone.blocks[index]
            dtype = torch.promote_types(bulk_dtype(block), torch.float32)
            made[index] = spec.build(index, self.backbone, device=_device(block), dtype=dtype)
        for index, module in made.items():
            injector = self.injectors.get((spec.site, index))
            if injector is None:
                injector = self.injectors[spec.site, index] = Injector(self.backbone, index, spec.site)
            module.train(injector.training)
            injector.fields[spec.name] = module
        self.select(model, OFF)  # so that what is kept as the base's is the base's, under every name of a tied tensor
        tensors = base_tensors(model)
        for name in spec.train:
            if name not in self.base:
                self.base[name] = tensors[name].detach().clone()
        self.specs[spec.name] = spec
        self.trained[spec.name] = {name: self.base[name].clone() for name in spec.train}
        self._attach_switches(model)
        self.select(model, Mix.parse(spec.name, self.specs))

    @torch.inference_mode(False)  # what is made here may be saved for a backward pass later
    @torch.no_grad()
    def select(self, model: nn.Module, mix: Mix) -> None:
        """Let the fields of a mix act, and train as `trains` says.

        A field's own values of the base tensors that it trains act with it: they are put in place if it acts alone,
        with weights their differences from the base's values are summed, and by row the module is computed for each.

        Raises:
            SteerError: a base tensor that a field trains was replaced or resized since, or cannot differ by row.
        """
        tensors = base_tensors(model)
        lost = self._lost(tensors, {*self.mix.names, *mix.names})
        if lost:
            raise SteerError(
                f"the model was changed since it was steered: {', '.join(lost)}, which a field trains, is gone or has "
                "another shape. Undo that change first, or `unsteer` and steer again."
            )
        heads = self._heads(model, mix.names) if mix.differs else {}
        self._place(tensors, mix)
        self.mix = mix
        opened = self.specs[mix.alone].train if mix.alone is not None and self.trains(mix.alone) else ()
        for key in self.required.keys() & tensors.keys():
            if tensors[key].requires_grad:
                tensors[key].requires_grad_(False)
        for key in opened:  # second, since tied parameters go by several names
            if isinstance(tensors[key], nn.Parameter) and tensors[key].is_floating_point():
                tensors[key].requires_grad_(True)
        trains = {name: self.trains(name) for name in self.specs}
        for injector in self.injectors.values():
            injector.select(mix)
            for name, module in injector.fields.items():
                _let_train(module, trains.get(name, False))
        for switch in self.switches:
            own = heads.get(id(switch), {})
            switch.select(mix, {name: {k: self.trained[name][v] for k, v in at.items()} for name, at in own.items()})

    def _lost(self, tensors: dict[str, Tensor], names: Iterable[str]) -> list[str]:
        """Return the base tensors that fields train and that are no longer what they were."""
        keys = [key for name in names for key in self.specs[name].train]
        return [key for key in keys if key not in tensors or tensors[key].shape != self.base[key].shape]

    def _place(self, tensors: dict[str, Tensor], mix: Mix) -> None:
        """Put aside the values of the field that acted alone, and in place those that a mix asks for."""
        before, after = self.mix.alone, mix.alone
        if before is not None and before == after:
            return
        if before is not None:
            self.trained[before] = {key: tensors[key].detach().clone() for key in self.specs[before].train}
        for name in self.mix.names:
            for key in self.specs[name].train:
                tensors[key].copy_(self.base[key])
        if after is not None:
            for key, value in self.trained.pop(after, {}).items():
                tensors[key].copy_(value)
        elif not mix.differs:
            self._compose(tensors, mix)

    def _compose(self, tensors: dict[str, Tensor], mix: Mix) -> None:
        """Set base + Σ w·(the field's − base), once for a tied tensor; buffers, such as counts, stay the base's."""
        parts: dict[int, tuple[str, list[tuple[float, Tensor]]]] = {}
        for name, weight in zip(mix.names, mix.table[0], strict=True):
            own = {id(tensors[key]): (key, value) for key, value in self.trained[name].items()}
            for place, (key, value) in own.items():
                if isinstance(tensors[key], nn.Parameter) and value.is_floating_point():
                    parts.setdefault(place, (key, []))[1].append((weight, value))
        for key, moves in parts.values():
            base = self.base[key].double()
            total = sum((weight * (value.to(base) - base) for weight, value in moves), base)
            tensors[key].copy_(total)

    def _attach_switches(self, model: nn.Module) -> None:
        """Put a switch on every module of which fields have their own values, where one can stand."""
        opened = {id(tensor) for key, tensor in base_tensors(model).items() if key in self.base}
        inside = {id(module) for block in self.backbone.blocks for module in block.modules()}
        standing = {id(switch.host) for switch in self.switches}
        for _, module, _, tensor in _base_entries(model):
            if id(tensor) in opened and id(module) not in inside | standing and Switch.fits(module):
                if not self.switches:
                    self.handles.append(model.register_forward_hook(self._settle))
                self.switches.append(Switch(module))
                standing.add(id(module))

    def _settle(self, model: nn.Module, args: object, output: object) -> None:
        if not torch.compiler.is_compiling():
            for switch in self.switches:
                switch.settle()

    def _heads(self, model: nn.Module, names: Iterable[str]) -> dict[int, dict[str, dict[str, str]]]:
        """Say where the base tensors that fields train are: by switch and field, the host's name of each and its key.

        Raises:
            SteerError: one is in a module that cannot be computed for every field.
        """
        found: dict[int, dict[str, dict[str, str]]] = {}
        switches = {id(switch.host): switch for switch in self.switches}
        names = [name for name in names if self.specs[name].train]
        entries = _base_entries(model) if names else []
        tensors = {key: tensor for key, _, _, tensor in entries}
        for name in names:
            own = {id(tensors[key]): key for key in self.specs[name].train}
            for key, module, local, tensor in entries:
                if id(tensor) not in own:
                    continue
                if id(module) not in switches:
                    raise SteerError(
                        f"field {name!r} has its own value of {key}, in which the rows of one batch cannot differ: it "
                        "is used inside the blocks, or by a module that has others inside it. Use such a field by name "
                        "or with weights, for the whole batch."
                    )
                found.setdefault(id(switches[id(module)]), {}).setdefault(name, {})[local] = own[id(tensor)]
        return found

    def discard(self, model: nn.Module, name: str) -> None:
        """Take one of several fields away; a mix in which it acts ends."""
        self.select(model, OFF if name in self.mix.names else self.mix)
        for index in self.specs[name].ranks:
            injector = self.injectors[self.specs[name].site, index]
            del injector.fields[name]
            if not injector.fields:
                self.injectors.pop((self.specs[name].site, index)).detach()
        del self.specs[name]
        self.trained.pop(name, None)
        self.wish.pop(name, None)
        opened = {key for spec in self.specs.values() for key in spec.train}
        self.base = {key: value for key, value in self.base.items() if key in opened}
        shared = {id(tensor) for key, tensor in base_tensors(model).items() if key in opened}
        for switch in list(self.switches):
            if not any(id(tensor) in shared for tensor in (*switch.host.parameters(), *switch.host.buffers())):
                switch.detach()
                self.switches.remove(switch)
        self.select(model, self.mix)

    def remove(self, model: nn.Module) -> None:
        """Take away everything that steering added, and put back what it changed."""
        tensors = base_tensors(model)
        lost = self._lost(tensors, self.mix.names)
        if lost:
            warnings.warn(
                f"the values before steering of {', '.join(lost)} were not put back: the model was changed since.",
                stacklevel=4,
            )
        else:
            self.select(model, OFF)
        for injector in self.injectors.values():
            injector.detach()
        for switch in self.switches:
            switch.detach()
        for handle in self.handles:
            handle.remove()
        for name in self.required.keys() & tensors.keys():
            tensors[name].requires_grad_(self.required[name])
        delattr(model, ATTRIBUTE)


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


def _base_entries(model: nn.Module) -> list[tuple[str, nn.Module, str, Tensor]]:
    """List the base's tensors: plain name, the module that has it, its name there, and the tensor."""
    found: list[tuple[str, nn.Module, str, Tensor]] = []

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


def _let_train(field: nn.Module, on: bool) -> None:
    for linear in field._modules.values():
        for parameter in linear._parameters.values() if linear is not None else ():
            if parameter is not None and parameter.requires_grad is not on:
                parameter.requires_grad_(on)


def _device(module: nn.Module) -> torch.device:
    for tensor in (*module.parameters(), *module.buffers()):
        return tensor.device
    return torch.device("cpu")
