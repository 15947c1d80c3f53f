"""The state of a steered model: which fields it holds, which acts, and what has to be put back."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .backbone import Backbone, bulk_dtype
from .errors import SteerError
from .field import HRes
from .injector import Injector
from .spec import FieldSpec

__all__ = ["ATTRIBUTE", "Steering", "base_tensors", "plain_name", "steering_of"]

ATTRIBUTE = "_residual_steering"


@dataclass
class Steering:
    """What steering did to a model, kept on the model itself.

    Attributes:
        backbone: where the stream is.
        required: `requires_grad` of every base parameter before steering, by name.
        specs: the fields, by name.
        acting: the selected field.
        injectors: the module at each steered point, by site and block index.
        handles: hooks that the family needs while the model is steered.
        base: original values of the base tensors that any field trains.
        trained: those tensors as each field that does not act at present left them.
    """

    backbone: Backbone
    required: dict[str, bool]
    specs: dict[str, FieldSpec] = field(default_factory=dict)
    acting: str | None = None
    injectors: dict[tuple[str, int], Injector] = field(default_factory=dict)
    handles: list[RemovableHandle] = field(default_factory=list)
    base: dict[str, Tensor] = field(default_factory=dict)
    trained: dict[str, dict[str, Tensor]] = field(default_factory=dict)

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
        if name != self.acting:
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
        tensors = base_tensors(model)
        for name in spec.train:
            if name not in self.base:
                self.base[name] = tensors[name].detach().clone()
        self.specs[spec.name] = spec
        self.trained[spec.name] = {name: self.base[name].clone() for name in spec.train}
        self.select(model, spec.name)

    def select(self, model: nn.Module, name: str | None) -> None:
        """Let one field act and train, or none, each with its own values of the base tensors it trains."""
        tensors = base_tensors(model)
        with torch.no_grad():
            if self.acting is not None and self.acting != name:
                opened = self.specs[self.acting].train
                self.trained[self.acting] = {key: tensors[key].detach().clone() for key in opened}
                for key in opened:
                    tensors[key].copy_(self.base[key])
            if name is not None and name != self.acting:
                for key, value in self.trained.pop(name, {}).items():
                    tensors[key].copy_(value)
        self.acting = name
        opened = self.specs[name].train if name is not None else ()
        for key in self.required:
            tensors[key].requires_grad_(False)
        for key in opened:  # second, since tied parameters go by several names
            if isinstance(tensors[key], nn.Parameter) and tensors[key].is_floating_point():
                tensors[key].requires_grad_(True)
        for injector in self.injectors.values():
            injector.acting = name if name is not None and name in injector.fields else None
            for other, module in injector.fields.items():
                module.requires_grad_(other == name)

    def remove(self, model: nn.Module) -> None:
        """Take away everything that steering added, and put back what it changed."""
        self.select(model, None)
        for (site, index), injector in self.injectors.items():
            host = self.backbone.point(index, site)
            if host is not None:
                injector.detach_from(host)
        for handle in self.handles:
            handle.remove()
        tensors = base_tensors(model)
        for name, required in self.required.items():
            tensors[name].requires_grad_(required)
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
    found: dict[str, Tensor] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if ".steering_" in f".{path}":
            continue
        own = {**module._parameters, **module._buffers}
        for name, tensor in own.items():
            if tensor is not None and name not in module._non_persistent_buffers_set:
                found[plain_name(f"{path}.{name}" if path else name)] = tensor
    return found


def plain_name(name: str) -> str:
    """Drop what data parallelism and `torch.compile` put into a tensor's name: `module.` in front, `_orig_mod.`."""
    return ".".join(part for part in name.removeprefix("module.").split(".") if part != "_orig_mod")


def _device(module: nn.Module) -> torch.device:
    for tensor in (*module.parameters(), *module.buffers()):
        return tensor.device
    return torch.device("cpu")
