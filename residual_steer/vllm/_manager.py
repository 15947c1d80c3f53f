"""Fields in the place of LoRA adapters: what vLLM's model runner asks of its adapter manager."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from residual_steer._field_file import differences, flat_config
from residual_steer.config import Place
from residual_steer.errors import SteerError, some

from ._bank import Bank
from ._layers import FAMILIES, install
from ._requests import Mix, Units

_log = logging.getLogger("vllm.residual_steer")  # vLLM shows what is logged under its name


def open_mix(path: str, config: Any, *, pinned: bool = False) -> Mix:
    """Open and read fields that vLLM, configured so, can serve; raise if not, warn if their model was another one."""
    mix = Mix.open(path)
    if pinned and mix.path != path:
        raise SteerError(
            f"a request names the contents of its field, so that nothing that was cached under others is used; "
            f"{path:.300} does not. Make it with residual_steer.vllm.request."
        )
    base, most = config.model_config, config.lora_config.max_lora_rank
    text = base.hf_config.get_text_config()
    family, widths = FAMILIES[base.architecture][1], [text.hidden_size] * text.num_hidden_layers
    for folder, (_, stored) in mix.parts.items():
        there = stored.described["backbone"]
        if (there["name"], there["widths"]) != (family, widths):
            raise SteerError(
                f"the field in {folder} was trained on {there['name']:.99}, {len(there['widths'])} blocks of width "
                f"{some(sorted({*map(str, there['widths'])}))}; this server has {family}, {len(widths)} of width "
                f"{text.hidden_size}. Serve the model that it was trained on."
            )
        different = differences(there, {"class": there["class"], "config": flat_config(text.to_dict())})
        if different:
            _log.warning("The field in %s was trained on another model of this shape: %.600s", folder, different)
    if mix.rank > most:
        raise SteerError(
            f"{' and '.join(mix.parts)} need {mix.rank} units of a slot, the sum of their ranks; a slot has {most}. "
            "Start vLLM with a larger --max-lora-rank."
        )
    mix.read(base.dtype)
    return mix


def check_number_of(request: Any, paths: Mapping[int, str]) -> None:
    """Check that the number of a request stands for its path alone, and for ever."""
    number, path = request.lora_int_id, request.lora_path
    if request.load_inplace:
        raise SteerError("a field is not reloaded in place, under requests on their way: unload its name first.")
    if paths.get(number, path) != path:
        raise SteerError(f"the number {number} of {path:.300} is that of {paths[number]:.300}. Give each its own.")


class FieldManager:
    """Opens fields, keeps `max_cpu_loras` of them in memory and `max_loras` in the slots of a bank.

    A field that was opened can be read again after it was put out of memory, also where another was saved in its place
    or its folder removed: its file stays open.
    """

    def __init__(self, model: nn.Module, config: Any, device: torch.device) -> None:
        lora, base = config.lora_config, config.model_config
        text, layer = base.hf_config.get_text_config(), FAMILIES[base.architecture][0]
        self.bank = Bank(text.hidden_size, lora.max_loras, lora.max_lora_rank, device=device, dtype=base.dtype)
        self.opened: dict[str, Mix] = {}
        self._config, self._paths, self._warming = config, dict[int, str](), False
        self._units: OrderedDict[int, Mapping[Place, Units]] = OrderedDict()  # the least recently used one first
        self._slots: OrderedDict[int, int] = OrderedDict()
        install(model, self.bank, text.num_hidden_layers, layer)

    def set_active_adapters(self, requests: Collection[Any], mapping: Any) -> None:
        """Begin a step: bring the fields of a batch into slots. `mapping` has the number of every token's field."""
        if self._warming or mapping is None:
            self.bank.rest()
            return
        for request in requests:
            self._open(request)
        numbers, where = np.unique(np.asarray(mapping.index_mapping, dtype=np.int64), return_inverse=True)
        batch = [int(number) for number in numbers if number > 0]
        for number in batch:
            self._activate(number, batch)
        slots = np.array([self._slots[int(number)] if number > 0 else -1 for number in numbers], dtype=np.int64)
        self.bank.step(slots[where].tolist())

    def add_adapter(self, request: Any) -> bool:
        """Open and read a field before a batch needs it; return whether it is new. Raise if it cannot be served."""
        new = request.lora_int_id not in self._paths
        self._open(request)
        self._load(request.lora_int_id)
        return new

    def _open(self, request: Any) -> None:
        check_number_of(request, self._paths)
        if request.lora_path not in self.opened:
            self.opened[request.lora_path] = open_mix(request.lora_path, self._config, pinned=True)
        self._paths[request.lora_int_id] = request.lora_path

    def _load(self, number: int, batch: Collection[int] = ()) -> None:
        """Bring a field into memory, in the place of one that the batch does not need."""
        if number not in self._units:
            units = self.opened[self._paths[number]].read(self.bank.dtype)
            while len(self._units) >= self._config.lora_config.max_cpu_loras:
                self.remove_adapter(next(old for old in self._units if old not in batch))
            self._units[number] = units
        self._units.move_to_end(number)

    def _activate(self, number: int, batch: Collection[int]) -> None:
        """Bring a field into a slot, in the place of one that the batch does not need."""
        self._load(number, batch)
        if number not in self._slots:
            free = {*range(self._config.lora_config.max_loras)} - {*self._slots.values()}
            slot = min(free) if free else self._slots.pop(next(old for old in self._slots if old not in batch))
            self.bank.put(slot, self._units[number])
            self._slots[number] = slot
        self._slots.move_to_end(number)

    def remove_adapter(self, number: int) -> bool:
        """Put a field out of memory; return whether it was there."""
        if number in self._slots:
            self.bank.put(self._slots.pop(number), {})
        return self._units.pop(number, None) is not None

    def remove_all_adapters(self) -> None:
        """Put all fields out of memory; a batch that needs one reads it again."""
        for number in [*self._units]:
            self.remove_adapter(number)
        self.bank.rest()

    def list_adapters(self) -> set[int]:
        """Return the numbers of the fields in memory."""
        return {*self._units}

    def pin_adapter(self, number: int) -> bool:
        """Refuse to keep a field in its slot."""
        raise SteerError(f"a field is not pinned to a slot; received {number}. Start vLLM with a larger --max-loras.")

    @contextmanager
    def dummy_lora_cache(self) -> Iterator[None]:
        """Compute steps of warming up without fields."""
        self._warming = True
        yield
        self._warming = False

    def add_dummy_lora(self, request: Any, rank: int) -> bool:
        """Return that no field is made for warming up."""
        return False

    def get_dummy_lora_warmup_rank(self, default: int) -> int:
        """Return what vLLM proposes."""
        return default

    def supports_tower_connector_lora(self) -> bool:
        """Return that fields act in the language model only."""
        return False
