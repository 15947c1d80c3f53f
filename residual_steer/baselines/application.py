"""apply, merge and methods: what a user calls."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import nn

from residual_steer._controller import ATTRIBUTE, base_tensors
from residual_steer.backbone import Handle
from residual_steer.config import match_train
from residual_steer.errors import SteerError
from residual_steer.steering import begin, steer

from .bitfit import bitfit
from .guard import Guard
from .heads import full, linear
from .lora import lora, merge_layers
from .parts import Subject, Trained
from .prefix import prefix
from .presets import adaptformer, hres, parallel_adapter
from .prompt import prompt
from .ssf import ssf
from .vpt import vpt_deep, vpt_shallow

__all__ = ["apply", "merge", "methods"]

Model = TypeVar("Model", bound=nn.Module)

MARK = "_residual_baseline"

_STEERED: Mapping[str, Callable[..., nn.Module]] = {
    "hres": hres,
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
    "full": full,
}


@dataclass
class Applied:
    """What was done to a model, kept on the model itself.

    Attributes:
        method: its name.
        handles: hooks that the family needs while it trains.
        guard: the check of the first training step, if the method needs one.
    """

    method: str
    handles: list[Handle] = field(default_factory=list)
    guard: Guard | None = None


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
    function = _find(method)
    _check_options(method, function, options)
    _, state = begin(model, arch)
    _refuse_second(model)
    tensors = base_tensors(model)
    opened = [tensors[name] for name in match_train(tensors, train)]
    if method in _STEERED:
        function(model, arch, train, **options)
        return model
    subject = Subject(model, state.backbone, [tensor for tensor in opened if isinstance(tensor, nn.Parameter)])
    applied = Applied(method)
    try:
        if state.backbone.prepare is not None:
            applied.handles.extend(state.backbone.prepare(state.backbone.blocks))
        with torch.inference_mode(False):  # what is made is to be trained, whatever mode the caller is in
            trained = function(subject, **options)
    except BaseException:
        for handle in applied.handles:
            handle.remove()
        raise
    model.requires_grad_(False)
    for parameter in (*trained.parameters, *subject.opened):
        parameter.requires_grad_(True)
    if trained.called:
        applied.guard = Guard(model, trained.called)
    setattr(model, MARK, applied)
    return model


def merge(model: Model) -> Model:
    """Fold LoRA's updates into the weights and put the plain layers back, for inference; the model is frozen then.

    Args:
        model: one that `apply(model, "lora")` returned.

    Raises:
        SteerError: it carries no LoRA, or one that has diverged; nothing has changed.
    """
    applied = model.__dict__.get(MARK) if isinstance(model, nn.Module) else None
    if not isinstance(applied, Applied) or applied.method != "lora":
        carried = f"carries {applied.method!r}" if isinstance(applied, Applied) else "carries none"
        raise SteerError(f"only LoRA can be folded into the weights; this model {carried}.")
    merge_layers(model)
    if applied.guard is not None:
        applied.guard.remove()
    for handle in applied.handles:
        handle.remove()
    delattr(model, MARK)
    model.requires_grad_(False)
    return model


def _find(method: str) -> Callable[..., Any]:
    """Return the function of a method.

    Raises:
        SteerError: there is none.
    """
    found = {**_STEERED, **_ATTACHED}.get(method) if isinstance(method, str) else None
    if found is None:
        raise SteerError(f"unknown method {method!r}; there are: {', '.join(methods())}.")
    return found


def _check_options(method: str, function: Callable[..., Any], options: Mapping[str, Any]) -> None:
    """Hold the options against those of the method; H-Res has those of `steer`.

    Raises:
        SteerError: one that it does not have.
    """
    signature = inspect.signature(steer if method == "hres" else function)
    known = [name for name, p in signature.parameters.items() if p.kind is p.KEYWORD_ONLY and name != "train"]
    for name in options:
        if name not in known:
            listed = f"its options are: {', '.join(known)}" if known else "it has none"
            raise SteerError(f"{method!r} has no option {name!r}; {listed}.")


def _refuse_second(model: nn.Module) -> None:
    """Look for a method in the model and its parts.

    Raises:
        SteerError: there is one.
    """
    for path, module in model.named_modules():
        where = f"its part {path!r}" if path else "it"
        if ATTRIBUTE in module.__dict__:
            raise SteerError(f"one method at a time: {where} is steered already. `unsteer` it, or take a fresh model.")
        applied = module.__dict__.get(MARK)
        if isinstance(applied, Applied):
            raise SteerError(f"one method at a time: {where} carries {applied.method!r}. Take a fresh model.")
        if type(module).__module__.startswith("peft."):
            raise SteerError(f"one method at a time: {where} is PEFT's {type(module).__name__}. Take a fresh model.")
