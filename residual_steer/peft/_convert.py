"""A field between the library's own files and those of PEFT."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors.torch
from peft.config import PeftConfig
from safetensors import SafetensorError
from torch import Tensor, nn

from residual_steer._controller import Steering, base_tensors, steering_of
from residual_steer._field_file import describe
from residual_steer.backbone import Backbone
from residual_steer.config import FieldConfig, Place, check_sites
from residual_steer.errors import SteerError, some
from residual_steer.injector import key_of
from residual_steer.steering import begin

from ._config import WRAPPER, HResConfig, card, check_backbone, place

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_KEY = re.compile(r"(.*\.steering_\w+)\.fields\.hres_(down|up)\.(\w+)")


@dataclass(frozen=True)
class Adapter:
    """An adapter as `load` takes a stored field: see `_field_file.Stored`."""

    spec: FieldConfig
    described: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    tensors: Mapping[str, Tensor]
    arch: str | None  # the backbone's name, where the config has it

    def read(self) -> Mapping[str, Tensor]:
        """Return the tensors."""
        return self.tensors


def pack_adapter(model: nn.Module, name: str, tensors: Mapping[str, Tensor], folder: Path) -> dict[str, bytes]:
    """Return a field as the files of an adapter by their names, with the card of a folder if there is one; or raise."""
    base, state = steering_of(model)
    spec, kind = state.specs[name], type(base)
    by_site = {site: _rank(ranks, len(state.backbone.blocks)) for site, ranks in spec.sites.items()}
    config = HResConfig(
        rank=by_site if len(by_site) > 1 else next(iter(by_site.values())),
        scale=spec.scale,
        site=spec.site if isinstance(spec.site, str) else list(spec.site),
        activation=spec.activation,
        field_bias=spec.bias,
        dropout=spec.dropout,
        arch=state.backbone.name if state.backbone.name == "auto" else None,
        modules_to_save=_whole_modules(base, spec) or None,
        base_model_name_or_path=getattr(base, "name_or_path", None) or None,
        inference_mode=True,
        auto_mapping={"base_model_class": kind.__name__, "parent_library": kind.__module__},
    )
    config.here = place(state.backbone)
    points = {spec.point(place): path for path, place in _points(base, state, spec).items()}
    stored = {}
    for key, tensor in tensors.items():
        inner = key.removeprefix("train.")
        if inner == key:
            point, side, what = key.rsplit(".", 2)
            inner = f"{points[point]}.fields.hres_{side}.{what}"
        stored[WRAPPER + inner] = tensor
    files = {
        WEIGHTS: safetensors.torch.save(stored, {"format": "pt"}),
        CONFIG: json.dumps(config.to_dict(), indent=2, sort_keys=True).encode(),
    }
    text = card(folder)
    return files if text is None else {**files, "README.md": text.encode()}


def open_adapter(folder: Path, model: nn.Module, arch: str | Backbone | None) -> Adapter:
    """Read an adapter for a model; raise if it is of another method or backbone, or damaged."""
    try:
        config = PeftConfig.from_pretrained(str(folder))
        tensors = safetensors.torch.load_file(folder / WEIGHTS)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise SteerError(f"could not read an adapter from {folder}: {type(error).__name__}: {error!s:.200}") from error
    if not isinstance(config, HResConfig):
        raise SteerError(f"{folder} holds an adapter of {config.peft_type}, which is no field. Load it with PEFT.")
    base, state = begin(model, arch or config.arch)
    check_backbone(config, state.backbone)
    sites = check_sites(config.site, config.rank, config.layers, state.backbone)
    spec = FieldConfig("default", sites)
    points = _points(base, state, spec)
    named = {}
    for key, tensor in tensors.items():
        found = _KEY.fullmatch(key)
        plain = (found.group(1) if found else key).removeprefix(WRAPPER)
        if found:
            point = spec.point(points[plain]) if plain in points else f"blocks.{plain}"
            named[f"{point}.{found.group(2)}.{found.group(3)}"] = tensor
        else:
            named[f"train.{plain}"] = tensor
    order = list(base_tensors(base))
    train = [key.removeprefix("train.") for key in named if key.startswith("train.")]
    spec = replace(
        spec,
        scale=config.scale,
        activation=config.activation,
        bias=config.field_bias,
        dropout=config.dropout,
        train=tuple(sorted(train, key=lambda key: order.index(key) if key in order else len(order))),
    )
    shapes = {key: tuple(tensor.shape) for key, tensor in named.items()}
    return Adapter(spec, describe(spec, base, state.backbone), shapes, named, config.arch)


def _rank(by_block: Mapping[int, int], blocks: int) -> int | dict[int, int]:
    """Return ranks as one number, where all blocks have it."""
    alike = len(set(by_block.values())) == 1 and len(by_block) == blocks
    return next(iter(by_block.values())) if alike else dict(by_block)


def _points(base: nn.Module, state: Steering, spec: FieldConfig) -> dict[str, Place]:
    """Return each place at a field's sites, by the path in the model of what would hold it there."""
    paths = {id(module): path for path, module in base.named_modules()}
    every = {(site, index) for site in spec.sites for index in range(len(state.backbone.blocks))}
    places = [*(every - {*spec.places}), *spec.places]  # blocks may share a module, which is then that of the field
    points = {(site, index): state.backbone.point(index, site) for site, index in places}
    return {f"{paths[id(point)]}.{key_of(place[0])}": place for place, point in points.items() if point is not None}


def _whole_modules(base: nn.Module, spec: FieldConfig) -> list[str]:
    """Return the modules of which a field trained every tensor, by names that mean these modules to PEFT."""
    tensors = base_tensors(base)
    modules = list(dict.fromkeys(key.rpartition(".")[0] for key in spec.train))
    for path in modules:
        left = [key for key in tensors if key.startswith(f"{path}.") and key not in spec.train]
        twins = [other for other, _ in base.named_modules() if other.endswith(path) and other != path]
        if not path or left or twins:
            why = f"{some(left)} did not train" if left else f"PEFT would take {some(twins)} for it, too"
            raise SteerError(
                f"PEFT stores whole modules, and the field trained a part of {path!r}: {why}. Save it without `format`."
            )
    return modules
