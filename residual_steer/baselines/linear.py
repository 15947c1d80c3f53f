"""Linear probing: nothing trains but the head."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from residual_steer.errors import UnsuitableError

from ._attach import Subject, Trained

__all__ = ["linear"]

_HEADS = ("classifier", "cls_classifier", "distillation_classifier", "score")


def linear(subject: Subject) -> Trained:
    """Train the head alone.

    That is what `train` names, or else timm's `get_classifier()`, transformers' `classifier` or `score`, or the output
    embeddings of a language model. Output embeddings that are tied to the input ones get a tensor of their own first,
    with the same values, so that the backbone stays as it is; the model's config then says that they are not tied.

    Raises:
        UnsuitableError: the model has no head.
    """
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
        return [head for head in (given if isinstance(given, tuple) else (given,)) if isinstance(head, nn.Module)]
    found = [getattr(model, name) for name in _HEADS if isinstance(getattr(model, name, None), nn.Module)]
    if not found and callable(getattr(model, "get_output_embeddings", None)):
        found = [model.get_output_embeddings()]
    if not found:
        found = [getattr(model, "lm_head", None)]  # mamba_ssm
    return [head for head in found if isinstance(head, nn.Module)]


def _untie(model: nn.Module, heads: list[nn.Module]) -> None:
    """Give heads tensors of their own where others have them too."""
    mine = {id(module): module for head in heads for module in head.modules()}
    rest = (module for module in model.modules() if id(module) not in mine)
    others = {id(parameter) for module in rest for parameter in module.parameters(recurse=False)}
    shared = [(m, name, p) for m in mine.values() for name, p in m.named_parameters(recurse=False) if id(p) in others]
    for module, name, parameter in shared:
        setattr(module, name, nn.Parameter(parameter.detach().clone(memory_format=torch.preserve_format)))
    if shared:
        _forget_tie(model)


def _forget_tie(model: Any) -> None:
    """Let transformers and `mamba_ssm` know too, who would tie a saved model again when it is loaded."""
    for name in ("tie_word_embeddings", "tie_embeddings"):
        if getattr(getattr(model, "config", None), name, False):
            setattr(model.config, name, False)
    ties: dict[str, str] = getattr(model, "all_tied_weights_keys", {})
    for one, other in list(ties.items()):
        if model.get_parameter(one) is not model.get_parameter(other):
            del ties[one]
