"""Methods that train parameters the model has: all, its biases (Ben Zaken et al. 2022, arXiv 2106.10199), its head."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from residual_steer.errors import UnsuitableError

from ._attach import Subject, Trained

__all__ = ["bitfit", "full", "is_key", "linear"]

_KEYS = ("key", "k_proj", "k_lin", "to_k", "wk")
_ROTARY = ("rope", "rotary")
_HEADS = ("classifier", "cls_classifier", "distillation_classifier", "score")


def full(subject: Subject) -> Trained:
    """Full fine-tuning: every parameter of the model."""
    return Trained([p for p in subject.model.parameters() if p.is_floating_point()])


def bitfit(subject: Subject) -> Trained:
    """Train every bias but those of keys: without rotary positions a softmax over keys does not change with them."""
    found = []
    for full_name, parameter in subject.inner.named_parameters():
        path, _, name = full_name.rpartition(".")
        if (name == "bias" or name.endswith("_bias")) and not is_key(subject, path, name):
            found.append(parameter)
    if not found:
        raise UnsuitableError(
            f"'bitfit' trains the biases of the backbone, and this {type(subject.inner).__name__} has none. Choose "
            "another method."
        )
    return Trained(found)


def is_key(subject: Subject, path: str, name: str = "bias") -> bool:
    """Return whether a bias is one of keys alone, in an attention without rotary positions."""
    if path.rpartition(".")[2] not in _KEYS and name not in ("k_bias", "key_bias"):
        return False
    return not any(mark in part for part, _ in subject.inner.named_modules() for mark in _ROTARY)


def linear(subject: Subject) -> Trained:
    """Train the head alone: what `train` names, or where libraries keep it; what is tied gets a tensor of its own."""
    if subject.opened:
        return Trained([])
    heads = _heads(subject.model)
    if not any(True for head in heads for _ in head.parameters()):
        raise UnsuitableError(
            f"'linear' trains the head of a model, and this {type(subject.model).__name__} has none where timm or "
            "transformers keep theirs. Add one, and name it in `train`."
        )
    _untie(subject.model, heads)
    return Trained([p for head in heads for p in head.parameters()])


def _heads(model: Any) -> list[nn.Module]:
    if callable(getattr(model, "get_classifier", None)):  # timm; distilled models have a pair
        given = model.get_classifier()
        found: list[Any] = list(given) if isinstance(given, tuple) else [given]
    else:
        found = [getattr(model, name) for name in _HEADS if isinstance(getattr(model, name, None), nn.Module)]
        if not found and callable(getattr(model, "get_output_embeddings", None)):
            found = [model.get_output_embeddings()]
        found = found or [getattr(model, "lm_head", None)]  # mamba_ssm
    return [head for head in found if isinstance(head, nn.Module)]


def _untie(model: Any, heads: list[nn.Module]) -> None:
    """Give heads tensors of their own where others have them too, and let a saved model stay so when it is loaded."""
    mine = {id(module): module for head in heads for module in head.modules()}
    rest = (module for module in model.modules() if id(module) not in mine)
    others = {id(parameter) for module in rest for parameter in module.parameters(recurse=False)}
    shared = [(m, name, p) for m in mine.values() for name, p in m.named_parameters(recurse=False) if id(p) in others]
    for module, name, parameter in shared:
        setattr(module, name, nn.Parameter(parameter.detach().clone(memory_format=torch.preserve_format)))
    if not shared:
        return
    for name in ("tie_word_embeddings", "tie_embeddings"):  # transformers' and mamba_ssm's
        if getattr(getattr(model, "config", None), name, False):
            setattr(model.config, name, False)
    ties: dict[str, str] = getattr(model, "all_tied_weights_keys", {})
    for one, other in list(ties.items()):
        if model.get_parameter(one) is not model.get_parameter(other):
            del ties[one]
