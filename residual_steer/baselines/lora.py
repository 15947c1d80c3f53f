"""LoRA (Hu et al. 2021, arXiv 2106.09685), by PEFT, put into the model where it stands."""

from __future__ import annotations

import fnmatch
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from residual_steer._checks import check_flag, check_integer, check_number, import_optional
from residual_steer.errors import SteerError, UnsuitableError

from ._attach import Part, Subject, Trained, is_linear, parts_of

__all__ = ["lora", "merge_layers"]

# What LoRA usually adapts in a mixer, the first that is there: the joint projection of attention, queries and values as
# in the paper, and the projections of an SSM. Any other mixer gets it on all its linear layers.
_USUAL = ({"c_attn"}, {"qkv"}, {"q_proj", "v_proj"}, {"query", "value"}, {"in_proj", "x_proj"}, {"in_proj"})


def lora(
    subject: Subject,
    *,
    rank: int = 8,
    alpha: float | None = None,
    dropout: float = 0.0,
    layers: Sequence[int] | None = None,
    targets: Sequence[str] | str | None = None,
    dora: bool = False,
) -> Trained:
    """Add alpha/rank · B·A to the weight of linear maps, at first with B = 0; PEFT's keys for them differ."""
    check_integer("rank", rank, 1)
    alpha = float(rank) if alpha is None else check_number("alpha", alpha, above=0)
    check_number("dropout", dropout, at_least=0, below=1)
    check_flag("dora", dora)
    parts = parts_of(subject, layers, is_linear) or parts_of(subject, layers, _is_pointwise)
    paths = _usual(subject, parts) if targets is None else _chosen(parts, targets)
    peft = import_optional("peft", "'lora' is PEFT's", "peft")
    model: Any = subject.model
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        use_dora=dora,
        target_modules="|".join(map(re.escape, paths)),  # matched as a whole, so that nothing else is
        fan_in_fan_out=any(type(model.get_submodule(path)).__name__ == "Conv1D" for path in paths),
    )
    try:
        peft.inject_adapter_in_model(config, model)
    except (ValueError, TypeError) as error:
        merge_layers(model, update=False)
        raise SteerError(f"PEFT refused: {error}") from error
    parameters = []
    for layer in _layers(model):
        layer.train(layer.get_base_layer().training)
        for parameter in _own(layer):
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
            parameters.append(parameter)
    return Trained(parameters, called=paths)


def merge_layers(model: Any, update: bool = True) -> None:
    """Put the plain layers back, with what LoRA learned added to their weights if it is finite, or without."""
    layers = set(_layers(model))
    if update and not all(bool(p.isfinite().all()) for layer in layers for p in _own(layer)):
        raise SteerError("LoRA has diverged: its weights are not finite, and would spoil the model's own.")
    for layer in layers if update else ():
        layer.merge()
    paths = [(path, module) for path, module in model.named_modules(remove_duplicate=False) if module in layers]
    for path, layer in paths:
        model.set_submodule(path, layer.get_base_layer())
    vars(model).pop("peft_config", None)


def _layers(model: nn.Module) -> Iterator[Any]:
    from peft.tuners.lora import LoraLayer

    return (module for module in model.modules() if isinstance(module, LoraLayer))


def _is_pointwise(module: nn.Module) -> bool:
    """Return whether a module is a convolution that mixes channels alone: a linear map of every position."""
    return isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) and module.groups == 1


def _own(layer: nn.Module) -> list[nn.Parameter]:
    return [parameter for name, parameter in layer.named_parameters() if "lora_" in name]


def _usual(subject: Subject, parts: list[Part]) -> list[str]:
    """Return what LoRA usually adapts in each block, of what is called there."""
    called = [part for part in parts if part.remedy is None]
    if not called:
        ways = _ways(parts)
        raise UnsuitableError(
            "'lora' adapts linear layers, or else 1 × 1 convolutions, inside the blocks that are called as modules; "
            "here are none. "
            + (f"The model reads the weights itself; to change that, {ways}." if ways else "Choose another method.")
        )
    found = []
    for index, group in itertools.groupby(called, key=lambda part: part.block):  # blocks of a hybrid differ
        block, mixer = list(group), subject.backbone.point(index, "mixer")
        mixing = set() if mixer is None else {id(module) for module in mixer.modules()}
        inside = [part for part in block if id(part.module) in mixing] or block
        there = {part.path.rpartition(".")[2] for part in inside}
        usual = next((names for names in _USUAL if names <= there), there)
        found += [part.name for part in inside if part.path.rpartition(".")[2] in usual]
    return found


def _chosen(parts: list[Part], targets: Sequence[str] | str) -> list[str]:
    """Return what `targets` names, as a path inside a block or the end of one from a dot on."""
    patterns = (targets,) if isinstance(targets, str) else tuple(targets)
    if not patterns or not all(isinstance(pattern, str) and pattern for pattern in patterns):
        raise SteerError(f"`targets` is a list of names or globs of linear maps inside blocks; received {targets!r}.")
    found: dict[str, Part] = {}
    for pattern in patterns:
        either = (pattern, f"*.{pattern}")
        hits = {part.name: part for part in parts if any(fnmatch.fnmatchcase(part.path, glob) for glob in either)}
        if not hits:
            there = ", ".join(sorted({part.path for part in parts})) or "none"
            raise SteerError(f"the target {pattern!r} matches no linear map inside a block; there are: {there}.")
        found |= hits
    silent = [part for part in found.values() if part.remedy is not None]
    if silent:
        ways = _ways(silent)
        raise SteerError(
            f"LoRA on {', '.join(sorted({part.path for part in silent}))} would do nothing: the model reads the weight "
            f"there without calling the layer. {f'To adapt it, {ways}.' if ways else 'Choose other `targets`.'}"
        )
    return list(found)


def _ways(parts: Iterable[Part]) -> str:
    """Return what makes blocks call those parts of theirs that they do not call."""
    return " or ".join(sorted({part.remedy for part in parts if part.remedy}))
