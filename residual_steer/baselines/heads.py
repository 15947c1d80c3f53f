"""The two ends of the scale: nothing but the head (linear probing), and everything (full fine-tuning)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from residual_steer.errors import UnsuitableError

from .parts import Subject, Trained

__all__ = ["full", "linear"]


def full(subject: Subject) -> Trained:
    """Full fine-tuning: every parameter of the model."""
    return Trained([p for p in subject.model.parameters() if p.is_floating_point()])


def linear(subject: Subject) -> Trained:
    """Linear probing: the head alone.

    That is what `train` names, or else timm's `get_classifier()`, transformers' `classifier` or `score`, or the output
    embeddings of a language model. Output embeddings that are tied to the input ones get a tensor of their own first,
    with the same values, so that the backbone stays as it is; the model's config then says that they are not tied.

    Raises:
        UnsuitableError: the model has no head.
    """
    if subject.opened:
        return Trained([])
    heads = _heads(subject.model)
    found = [p for head in heads for p in head.parameters()]
    if not found:
        raise UnsuitableError(
            f"'linear' trains the head of a model, and this {type(subject.model).__name__} has none where timm or "
            "transformers keep theirs. Add one, and name it in `train`."
        )
    if _untie(subject, heads):
        found = [p for head in heads for p in head.parameters()]
    return Trained(found)


def _heads(model: Any) -> list[nn.Module]:
    if callable(getattr(model, "get_classifier", None)):  # timm; distilled models have a pair
        given = model.get_classifier()
        return [head for head in (given if isinstance(given, tuple) else (given,)) if isinstance(head, nn.Module)]
    names = ("classifier", "cls_classifier", "distillation_classifier", "score")
    found = [getattr(model, name) for name in names if isinstance(getattr(model, name, None), nn.Module)]
    if not found and callable(getattr(model, "get_output_embeddings", None)):
        found = [model.get_output_embeddings()]
    if not found:
        found = [getattr(model, "lm_head", None)]  # mamba_ssm
    return [head for head in found if isinstance(head, nn.Module)]


def _untie(subject: Subject, heads: list[nn.Module]) -> bool:
    """Give heads tensors of their own where others have them too; say whether there were such."""
    mine = {id(module) for head in heads for module in head.modules()}
    others = {
        id(parameter)
        for module in subject.model.modules()
        if id(module) not in mine
        for parameter in module._parameters.values()
        if parameter is not None
    }
    tied = False
    for module in (module for head in heads for module in head.modules()):
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and id(parameter) in others:
                module._parameters[name] = nn.Parameter(parameter.detach().clone(memory_format=torch.preserve_format))
                tied = True
    if tied:
        _forget_tie(subject.model)
    return tied


def _forget_tie(model: Any) -> None:
    """Tell transformers and `mamba_ssm` too, who would tie a saved model again when it is loaded."""
    for name in ("tie_word_embeddings", "tie_embeddings"):
        if getattr(getattr(model, "config", None), name, False):
            setattr(model.config, name, False)
    ties: dict[str, str] = getattr(model, "all_tied_weights_keys", {})
    for one, other in list(ties.items()):
        if model.get_parameter(one) is not model.get_parameter(other):
            del ties[one]
