"""The state of a steered model: which fields it holds, which acts, and what has to be put back."""

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

    def name_of(self, name: str | None) -> str:
        """Return the name of a field, the selected one for None.

        Raises:
            SteerError: there is no such field, or none is selected.
        """
        name = self.acting if name is None else name
        if not isinstance(name, str) or name not in self.specs:
            raise SteerError(f"`name` is one of the fields {', '.join(self.specs)}; received {name!r}.")
        return name

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
        self.select(model, None)  # so that what is kept as the base's is the base's, under every name of a tied tensor
        tensors = base_tensors(model)
        for name in spec.train:
            if name not in self.base:
                self.base[name] = tensors[name].detach().clone()
        self.specs[spec.name] = spec
        self.trained[spec.name] = {name: self.base[name].clone() for name in spec.train}
        self.select(model, spec.name)

    def select(self, model: nn.Module, name: str | None) -> None:
        """Let one field act and train, or none, each with its own values of the base tensors it trains.

        Raises:
            SteerError: a base tensor that a field trains was replaced or resized since.
        """
        tensors = base_tensors(model)
        lost = self._lost(tensors, {self.acting, name})
        if lost:
            raise SteerError(
                f"the model was changed since it was steered: {', '.join(lost)}, which a field trains, is gone or has "
                "another shape. Undo that change first, or `unsteer` and steer again."
            )
        self._swap(tensors, name)
        self.acting = name
        opened = self.specs[name].train if name is not None else ()
        for key in self.required.keys() & tensors.keys():
            tensors[key].requires_grad_(False)
        for key in opened:  # second, since tied parameters go by several names
            if isinstance(tensors[key], nn.Parameter) and tensors[key].is_floating_point():
                tensors[key].requires_grad_(True)
        for injector in self.injectors.values():
            injector.acting = name if name is not None and name in injector.fields else None
            for other, module in injector.fields.items():
                module.requires_grad_(other == name)

    def _lost(self, tensors: dict[str, Tensor], names: Iterable[str | None]) -> list[str]:
        """Return the base tensors that fields train and that are no longer what they were."""
        keys = [key for name in names if name is not None for key in self.specs[name].train]
        return [key for key in keys if key not in tensors or tensors[key].shape != self.base[key].shape]

    def _swap(self, tensors: dict[str, Tensor], name: str | None) -> None:
        """Put the values of the acting field aside, and those of another field, or the base's own, in place."""
        with torch.no_grad():
            if self.acting is not None and self.acting != name:
                opened = self.specs[self.acting].train
                self.trained[self.acting] = {key: tensors[key].detach().clone() for key in opened}
                for key in opened:
                    tensors[key].copy_(self.base[key])
            if name is not None and name != self.acting:
                for key, value in self.trained.pop(name, {}).items():
                    tensors[key].copy_(value)

    def remove(self, model: nn.Module) -> None:
        """Take away everything that steering added, and put back what it changed."""
        tensors = base_tensors(model)
        lost = self._lost(tensors, {self.acting})
        if lost:
            warnings.warn(
                f"the values before steering of {', '.join(lost)} were not put back: the model was changed since.",
                stacklevel=4,
            )
        else:
            self.select(model, None)
        for injector in self.injectors.values():
            injector.detach()
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
    found: dict[str, Tensor] = {}

    def visit(module: nn.Module, prefix: str) -> None:
        for name, tensor in {**module._parameters, **module._buffers}.items():
            if tensor is not None and name not in module._non_persistent_buffers_set:
                found[plain_name(prefix + name)] = tensor
        for name, child in module._modules.items():
            if child is not None and not isinstance(child, Injector):
                visit(child, f"{prefix}{name}.")

    visit(model, "")
    return found


def plain_name(name: str) -> str:
    """Drop what `torch.compile` puts into the name of a tensor of a compiled part: `_orig_mod.`."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def _device(module: nn.Module) -> torch.device:
    for tensor in (*module.parameters(), *module.buffers()):
        return tensor.device
    return torch.device("cpu")
