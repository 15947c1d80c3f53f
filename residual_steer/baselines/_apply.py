"""apply, merge and methods: what a user calls."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import nn

from residual_steer._controller import ATTRIBUTE, base_tensors
from residual_steer.backbone import Handle
from residual_steer.config import match_train
from residual_steer.errors import SteerError
from residual_steer.steering import begin, steer

from ._attach import Guard, Subject, Trained
from .bitfit import bitfit
from .linear import linear
from .lora import lora, merge_layers
from .parallel_adapter import adaptformer, parallel_adapter
from .prefix import prefix
from .prompt import prompt
from .ssf import ssf
from .vpt import vpt_deep, vpt_shallow

__all__ = ["apply", "merge", "methods"]

Model = TypeVar("Model", bound=nn.Module)

_MARK = "_residual_baseline"  # on the model: the method's name, and what `merge` takes away


def _full(subject: Subject) -> Trained:
    """Full fine-tuning: every parameter of the model."""
    return Trained([p for p in subject.model.parameters() if p.is_floating_point()])


_STEERED: Mapping[str, Callable[..., nn.Module]] = {
    "hres": steer,
    "adaptformer": adaptformer,
    "parallel-adapter": parallel_adapter,
}
_ATTACHED: Mapping[str, Callable[..., Trained]] = {
    "lora": lora,
    "prompt": prompt,
    "prefix": prefix,
    "vpt-shallow": vpt_shallow,
    "vpt-deep": vpt_deep,
    "ssf": ssf,
    "bitfit": bitfit,
    "linear": linear,
    "full": _full,
}


def methods() -> tuple[str, ...]:
    """Return the names that `apply` takes."""
    return (*_STEERED, *_ATTACHED)


def apply(
    model: Model,
    method: str,
    *,
    arch: str | None = None,
    train: Sequence[str] | str = (),
    **options: Any,
) -> Model:
    """Freeze `model` and make it trainable by `method`, so that `fit` trains just that.

    >>> for name in residual_steer.baselines.methods():
    ...     model = residual_steer.baselines.apply(build(), name, train="classifier")
    ...     residual_steer.fit(model, train, valid, steps=500)

    Args:
        model: a model with a known backbone, as in `steer`; it is changed in place.
        method: one of `methods()`; `residual_steer.baselines` has a table of them and of the papers they follow.
        arch: a registered backbone's name; None finds it.
        train: names or globs of base modules or parameters that train too, such as a new head. Methods that are fields
            (`hres`, `adaptformer`, `parallel-adapter`) keep their values with the field, as `steer` does.
        **options: of the method: `rank`, `layers`, `length` and the like.

    Returns:
        The same object.

    Raises:
        SteerError: an unknown method or option; a model that carries a method already, is steered, compiled or wrapped.
            Nothing has changed.
        UnsuitableError: the method makes no sense on this backbone, with the reason; nothing has changed either.
    """
    _check_options(method, options)
    _, state = begin(model, arch)
    _refuse_second(model)
    tensors = base_tensors(model)
    opened = [tensors[name] for name in match_train(tensors, train)]
    if method in _STEERED:
        _STEERED[method](model, arch, train=train, **options)
        return model
    subject = Subject(model, state.backbone, [tensor for tensor in opened if isinstance(tensor, nn.Parameter)])
    handles: list[Handle] = []
    try:
        if state.backbone.prepare is not None:
            handles.extend(state.backbone.prepare(state.backbone.blocks))
        with torch.inference_mode(False):  # what is made is to be trained, whatever mode the caller is in
            trained = _ATTACHED[method](subject, **options)
    except BaseException:
        for handle in handles:
            handle.remove()
        raise
    model.requires_grad_(False)
    for parameter in (*trained.parameters, *subject.opened):
        parameter.requires_grad_(True)
    if trained.called:
        handles.append(Guard(model, trained.called))
    setattr(model, _MARK, (method, handles))
    return model


def merge(model: Model) -> Model:
    """Fold LoRA's updates into the weights and put the plain layers back, for inference; the model is frozen then.

    Args:
        model: one that `apply(model, "lora")` returned.

    Raises:
        SteerError: it carries no LoRA, or one that has diverged; nothing has changed.
    """
    carried, handles = getattr(model, _MARK, (None, ()))
    if carried != "lora":
        carries = "carries none" if carried is None else f"carries {carried!r}"
        raise SteerError(f"only LoRA can be folded into the weights; this model {carries}.")
    merge_layers(model)
    for handle in handles:
        handle.remove()
    delattr(model, _MARK)
    model.requires_grad_(False)
    return model


def _check_options(method: str, options: Mapping[str, Any]) -> None:
    """Raise if there is no such method, or it has not these options."""
    function = {**_STEERED, **_ATTACHED}.get(method) if isinstance(method, str) else None
    if function is None:
        raise SteerError(f"unknown method {method!r}; there are: {', '.join(methods())}.")
    keywords = inspect.signature(function).parameters.items()
    known = [name for name, p in keywords if p.kind is p.KEYWORD_ONLY and name != "train"]
    for name in options:
        if name not in known:
            listed = f"its options are: {', '.join(known)}" if known else "it has none"
            raise SteerError(f"{method!r} has no option {name!r}; {listed}.")


def _refuse_second(model: nn.Module) -> None:
    """Raise if the model or one of its parts has a method already."""
    for path, module in model.named_modules():
        where = f"its part {path!r}" if path else "it"
        if ATTRIBUTE in vars(module):
            raise SteerError(f"one method at a time: {where} is steered already. `unsteer` it, or take a fresh model.")
        if _MARK in vars(module):
            raise SteerError(f"one method at a time: {where} carries {vars(module)[_MARK][0]!r}. Take a fresh model.")
        if type(module).__module__.startswith("peft."):
            raise SteerError(f"one method at a time: {where} is PEFT's {type(module).__name__}. Take a fresh model.")
