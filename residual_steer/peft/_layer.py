"""The fields of one point as a layer of PEFT, in the place where the injector keeps its fields."""

from __future__ import annotations

import warnings
from collections.abc import ItemsView, Iterator, KeysView, Sequence, ValuesView
from dataclasses import dataclass
from typing import cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from residual_steer._internals import renew_children
from residual_steer._summary import FieldInfo, fields
from residual_steer.backbone import execution_device
from residual_steer.errors import SteerError
from residual_steer.field import HRes
from residual_steer.injector import Injector
from residual_steer.routing import Asked
from residual_steer.steering import freeze, thaw, unsteer, use


@dataclass
class Chosen:
    """What PEFT chose on a model. What acts stands in the model's mix; this remembers it while it is switched off."""

    model: nn.Module
    asked: Asked = None


class HResLayer(nn.ModuleDict, BaseTunerLayer):
    """Hold the fields of one point by name, as the injector reads them, under the names that PEFT's loaders expect.

    These have the adapter's name second to last: `hres_down.<name>.weight`. So the parts of a field are the children,
    and the field made of them is not. What is done to one layer is done to the whole model, since what acts there is
    one mix; PEFT and transformers call every layer, and the first call does it.

    Args:
        chosen: shared by the layers of a model.
        injector: has the fields that move here.
    """

    adapter_layer_names = ("hres_down", "hres_up")

    def __init__(self, chosen: Chosen, injector: Injector) -> None:
        super().__init__()
        self._chosen, self._injector = chosen, (injector,)  # in a tuple, since a module would become a child
        self._fields: dict[str, HRes] = {}
        self.hres_down, self.hres_up, self.hres_drop = nn.ModuleDict(), nn.ModuleDict(), nn.ModuleDict()
        self.training = injector.training
        for name, field in injector.held.items():
            self[name] = field

    @property
    def injector(self) -> Injector:
        """The module whose fields these are."""
        return self._injector[0]

    def __getitem__(self, key: str) -> HRes:
        return self._fields[key]

    def __setitem__(self, key: str, module: nn.Module) -> None:
        field = cast(HRes, module)
        self._fields[key], self.hres_down[key], self.hres_up[key] = field, field.down, field.up
        if field.drop is not None:
            self.hres_drop[key] = field.drop

    def __delitem__(self, key: str) -> None:
        for parts in (self._fields, self.hres_down, self.hres_up, self.hres_drop):
            if key in parts:
                del parts[key]

    def __len__(self) -> int:
        return len(self._fields)

    def __iter__(self) -> Iterator[str]:
        return iter(self._fields)

    def __contains__(self, key: object) -> bool:
        return key in self._fields

    def keys(self) -> KeysView[str]:
        """Return the fields' names."""
        return self._fields.keys()

    def values(self) -> ValuesView[HRes]:
        """Return the fields."""
        return self._fields.values()

    def items(self) -> ItemsView[str, HRes]:
        """Return the fields and their names."""
        return self._fields.items()

    def get_base_layer(self) -> nn.Module:
        """Return the module at the point, which stays where it is."""
        return self.injector.host

    @property
    def active_adapter(self) -> list[str]:
        """The names of the fields that act, or did before they were switched off."""
        if self.injector.mix.names:
            self._chosen.asked = self.injector.mix.asked()
        asked = self._chosen.asked
        names = [asked] if isinstance(asked, str) else asked or ()
        return list(dict.fromkeys(name for name in names if name is not None))

    @property
    def disable_adapters(self) -> bool:
        """Whether fields that were chosen are switched off."""
        return bool(self.active_adapter) and not self.injector.mix.names

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Leave the field as it is, while the layers of another adapter of the same model are merged."""

    def unmerge(self) -> None:
        """Leave the field as it is."""

    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        """Let these fields act, side by side, and train unless `inference_mode`; names of other layers are not here."""
        model, off = self._chosen.model, self.disable_adapters
        there = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        names = [name for name in there if any(name == field.name for field in _fields(model))]
        asked = _side_by_side(names)
        if not off and self.injector.mix.asked() != asked:
            use(model, asked)
        self._chosen.asked = asked
        self.set_requires_grad(names, not inference_mode)

    def enable_adapters(self, enabled: bool) -> None:
        """Switch on what acted before, or switch all off."""
        if enabled and self.disable_adapters:
            use(self._chosen.model, self._chosen.asked)
        elif not enabled and self.active_adapter and not self.disable_adapters:
            use(self._chosen.model, None)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Let fields train where they act, or keep them from it."""
        model, names = self._chosen.model, [adapter_names] if isinstance(adapter_names, str) else adapter_names
        for field in _fields(model):
            if field.name in names and requires_grad and (field.frozen or (field.acting and not field.trains)):
                thaw(model, field.name)
            elif field.name in names and not requires_grad and not field.frozen:
                freeze(model, field.name)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove a field from the model. If it acted alone, the first that is left acts, as with PEFT's own layers."""
        model, active, off = self._chosen.model, self.active_adapter, self.disable_adapters
        if all(adapter_name != field.name for field in _fields(model)):
            return
        for module in (self.injector, self.injector.host):  # PEFT goes through the model's layers
            renew_children(module)
        unsteer(model, adapter_name)
        if adapter_name not in active:
            return
        left = [name for name in active if name != adapter_name]
        if not left and _fields(model):
            left = [_fields(model)[0].name]
            warnings.warn(
                f"the adapter {adapter_name!r} acted and is deleted now; {left[0]!r} acts in its place.", stacklevel=2
            )
        asked = _side_by_side(left)
        if left and not off:
            use(model, asked)
        self._chosen.asked = asked

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Bring a field that was read from a file to where its block computes."""
        if adapter_name in self and not self[adapter_name].down.weight.is_meta:
            self[adapter_name].to(device or execution_device(self.injector.host))


def adopt(model: nn.Module) -> None:
    """Make layers of PEFT of the points of a steered model that are none yet."""
    layers = [module for module in model.modules() if isinstance(module, HResLayer)]
    chosen = layers[0]._chosen if layers else Chosen(model)
    for module in list(model.modules()):
        if isinstance(module, Injector) and not isinstance(module.fields, HResLayer):
            module.fields = HResLayer(chosen, module)


def _side_by_side(names: Sequence[str]) -> Asked:
    """Return what `use` takes to let these fields act."""
    return dict.fromkeys(names, 1.0) if len(names) > 1 else next(iter(names), None)


def _fields(model: nn.Module) -> list[FieldInfo]:
    """List the fields of a model, which may have none any more."""
    try:
        return list(fields(model))
    except SteerError:
        return []
