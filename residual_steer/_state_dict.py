"""State dicts of a steered model, with the heads that fields trained along: at most one field's are in place.

The others stand beside what is in the model, under `residual_steer.NAME.train.KEY`, as in what transformers saves. What
is loaded goes to the field that it belongs to, whatever was selected then and is selected now.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ._controller import Steering, attachments, base_tensors, steering_of
from .backbone import Handle
from .errors import SteerError

__all__ = ["ENTRY", "finding"]

ENTRY = "residual_steer"  # in front of what is no tensor of the model as it stands
_BASE = ""  # in the place of a field's name, for the base's own where a sum is in place


def _put(root: nn.Module, module: nn.Module, tensors: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """After a state dict was made: add what is not in place."""
    heads, added = steering_of(root)[1].heads, {}
    for name, own in heads.own.items():
        for key, tensor in own.items():
            there = heads.there.get(key)
            if there != name:
                added[f"{ENTRY}.{name}.train.{key}"] = tensor.detach()
            if there == "":
                added[f"{ENTRY}.{_BASE}.train.{key}"] = heads.base[key].detach()
    for key, tensor in added.items():
        tensors[prefix + key] = tensor
        place = vars(root)
        for part in key.split("."):  # torch.distributed.checkpoint takes every key for a path from the model on
            place = vars(place.setdefault(part, SimpleNamespace()))


@torch.no_grad()
def _take(root: nn.Module, module: nn.Module, tensors: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Before a state dict is loaded: let the module find under its own names what has others.

    Raises:
        SteerError: a head of a field has another shape here.
    """
    before = f"{prefix}{ENTRY}."
    stored = {key.removeprefix(before): tensors.pop(key) for key in list(tensors) if key.startswith(before)}
    root, state = steering_of(root)
    if not stored and (module is not root or not state.heads.own):
        return
    places: dict[int, list[str]] = {}
    for key, tensor in module.state_dict(keep_vars=True).items():
        places.setdefault(id(tensor), []).append(f"{prefix}{key}")
    for name in state.specs:
        for key, tensor in state.tensors(root, name).items():
            value = stored.get(f"{name}.{key}")
            if value is not None and not (module is root and key.startswith("train.")):
                _give(tensor, value, f"{key} of field {name!r}", places, tensors)
    if module is root:
        _take_heads(root, state, stored, places, tensors)


def _take_heads(
    root: nn.Module,
    state: Steering,
    stored: Mapping[str, Tensor],
    places: Mapping[int, list[str]],
    tensors: dict[str, Tensor],
) -> None:
    """Give each field and the base their own values of what fields trained along."""
    heads, here = state.heads, base_tensors(root)
    known = [name for name in heads.own if places.get(id(state.parameters(name)[0]), [""])[0] in tensors]
    for key, base in heads.base.items():
        keys = places.get(id(here.get(key)), [])
        owners = {name: own[key] for name, own in heads.own.items() if key in own}
        if not known or not keys or keys[-1] not in tensors:
            continue  # of a base, which goes to what is in place
        values = {name: stored.get(f"{name}.train.{key}") for name in (*owners, _BASE)}
        left = [name for name in known if name in owners and values[name] is None]
        if values[_BASE] is None:
            values[left[0] if len(left) == 1 else _BASE] = tensors[keys[-1]]
        for place in keys:
            tensors[place] = here[key].detach()
        for name, value in values.items():
            if value is not None:
                _give(owners.get(name, base), value, f"{key} of field {name!r}", places, tensors)
    if "" in heads.there.values():
        state.select(root, state.mix)  # the sum of what was given
        for key, tensor in base_tensors(root).items():
            for place in places.get(id(here.get(key)), []) if heads.there.get(key) == "" else ():
                tensors[place] = tensor.detach()


def _give(
    tensor: Tensor, value: Tensor, what: str, places: Mapping[int, list[str]], tensors: dict[str, Tensor]
) -> None:
    """Hand a value to a tensor: by its names in the state dict where it is in place, else by itself."""
    if id(tensor) in places:
        tensors.update(dict.fromkeys(places[id(tensor)], value))
    elif tensor.shape == value.shape:
        tensor.copy_(value)
    else:
        raise SteerError(f"{what} has shape {tuple(value.shape)}; here {tuple(tensor.shape)}.")


def finding(root: nn.Module, module: nn.Module) -> Handle:
    """Let a module in a steered model find its tensors in what is loaded; by a partial, which copies follow."""
    handle: Handle = module.register_load_state_dict_pre_hook(partial(_take, root))  # type: ignore[no-untyped-call]
    return handle


class _Paths:
    """What stands in a model where the added keys lead, until `remove`."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def remove(self) -> None:
        vars(self._model).pop(ENTRY, None)


def _attach(model: nn.Module, state: Steering) -> list[Handle]:
    """Watch the state dicts of a steered model."""
    made = model.register_state_dict_post_hook(partial(_put, model))  # type: ignore[no-untyped-call]
    return [made, finding(model, model), _Paths(model)]


attachments.append(_attach)
