"""What a batch can be steered by: fields of this library, and PEFT's LoRA adapters as its peer.

Both stand on the same frozen shape, under names `f0`, `f1`, …, with random weights: zeros could be multiplied faster,
and a wrong row would not be seen.
"""

from __future__ import annotations

import importlib.util
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

import residual_steer as rs
from residual_steer.routing import Asked

__all__ = ["Contender", "adapters", "add_fields", "deal", "fields", "has_peft", "names_of"]


@dataclass(frozen=True)
class Contender:
    """A batch under some selection.

    Attributes:
        name: as in the table.
        reference: the contender whose time is 1.
        call: the model, compiled if asked for.
        plain: the model, not compiled.
        select: makes the selection.
        choose: selects one field, or adapter, by name; what the rows of a batch are checked against.
        asked: the selection, as `use` takes it.
        more: keywords of the call.
    """

    name: str
    reference: str
    call: Callable[..., Any]
    plain: Callable[..., Any]
    select: Callable[[], object]
    choose: Callable[[str], object]
    asked: Asked
    more: dict[str, Any] = field(default_factory=dict)


def names_of(count: int) -> list[str]:
    """Return the names of `count` fields or adapters."""
    return [f"f{index}" for index in range(count)]


def deal(names: Sequence[str], rows: int) -> list[str]:
    """Deal rows of a batch round robin."""
    return [names[row % len(names)] for row in range(rows)]


def add_fields(model: nn.Module, number: int, rank: int) -> list[float]:
    """Steer a frozen model by as many fields, with random weights; return the seconds that each took to add."""
    seconds = []
    for name in names_of(number):
        start = time.perf_counter()
        rs.steer(model, rank=rank, name=name)
        seconds.append(time.perf_counter() - start)
    _randomise(model, "steering_")
    return seconds


def fields(
    model: nn.Module, counts: Sequence[int], weighted: Sequence[int], rows: int, compiled: bool = False
) -> list[Contender]:
    """Return what to time of a model that holds fields: those that act are spread over all that it holds.

    Args:
        model: what `add_fields` steered.
        counts: how many fields act in one batch, row by row.
        weighted: how many fields act with weights on every row.
        rows: of the batch.
        compiled: whether to call the model compiled.
    """
    every = [field.name for field in rs.fields(model)]
    names = every[:: len(every) // max(*counts, *weighted, 1)]
    mixes: dict[str, Asked] = {"frozen": None, "one field": names[0]}
    for count in counts:
        mixes[f"{count} by row"] = deal(names[:count], rows)
    for count in weighted:
        mixes[f"{count} with weights"] = {name: (-1) ** i / (i + 1) for i, name in enumerate(names[:count])}
    call = torch.compile(model) if compiled else model

    def selecting(mix: Asked) -> Callable[[], object]:
        return lambda: rs.use(model, mix)

    def choose(name: str) -> object:
        return rs.use(model, name)

    return [Contender(name, "one field", call, model, selecting(mix), choose, mix) for name, mix in mixes.items()]


def has_peft() -> bool:
    """Whether PEFT is installed."""
    return importlib.util.find_spec("peft") is not None


def adapters(model: nn.Module, counts: Sequence[int], rows: int, rank: int) -> list[Contender]:
    """Give a GPT-2 LoRA adapters where PEFT puts them, on `c_attn` of every block, and return what to time.

    Args:
        model: a frozen model, changed by this.
        counts: how many adapters act in one batch.
        rows: of the batch.
        rank: of each adapter.
    """
    import peft

    names = names_of(max(counts))
    config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=["c_attn"], fan_in_fan_out=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lora = peft.get_peft_model(model, config, adapter_name=names[0])
        for name in names[1:]:
            lora.add_adapter(name, config)
    lora.eval()
    _randomise(lora, "lora_")

    def choose(name: str) -> None:
        lora.set_adapter(name)

    def first() -> None:
        choose(names[0])

    one = "PEFT: one adapter"
    found = [Contender(one, one, lora, lora, first, choose, names[0])]
    for count in counts:
        dealt = deal(names[:count], rows)
        more = {"adapter_names": dealt}
        found.append(Contender(f"PEFT: {count} by row", one, lora, lora, first, choose, dealt, more))
    return found


@torch.no_grad()
def _randomise(model: nn.Module, part: str) -> None:
    """Fill every parameter whose name has `part` in it, the same each time."""
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if part in name:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
