"""apply, merge and methods: what a user calls."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import nn

from residual_steer._checks import check_choice, check_options
from residual_steer._controller import base_tensors
from residual_steer.backbone import ATTRIBUTE, Handle
from residual_steer.config import match_train
from residual_steer.errors import SteerError, UnsuitableError
from residual_steer.steering import begin, steer

from ._attach import Guard, Subject, Trained
from .lora import lora, merge_layers
from .prefix import prefix
from .prompt import prompt
from .selective import bitfit, full, linear
from .ssf import ssf
from .vpt import vpt_deep, vpt_shallow

Model = TypeVar("Model", bound=nn.Module)

_MARK = "_residual_baseline"  # on the model: the method's name, and what `merge` takes away

# ReLU fields beside the first of these parts that blocks have: AdaptFormer (Chen et al. 2022, eq. 1 to 3), and the
# parallel adapter (He et al. 2022, table 6), on a Mamba beside the mixer (Yoshimura et al. 2025, arXiv 2411.03855).
_FIELDS: Mapping[str, tuple[Sequence[str], Mapping[str, Any]]] = {
    "adaptformer": (("mlp",), {"rank": 64, "scale": 0.1, "dropout": 0.0, "layers": None}),
    "parallel-adapter": (("mlp", "mixer"), {"rank": 32, "scale": 4.0, "dropout": 0.0, "layers": None}),
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


def methods() -> tuple[str, ...]:
    """Return the names that `apply` takes."""
    return ("hres", *_FIELDS, *_ATTACHED)


def apply(
    model: Model, method: str, *, arch: str | None = None, train: Sequence[str] | str = (), **options: Any
) -> Model:
    """Freeze `model` and make it trainable by `method`, so that `fit` trains just that.

    Args:
        model: a model with a known backbone, as in `steer`; it is changed in place.
        method: one of `methods()`, of which `residual_steer.baselines` has a table.
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
    check_choice("method", method, methods())
    check_options(method, options, _options(method))
    _, state = begin(model, arch)
    _refuse_second(model)
    tensors = base_tensors(model)
    opened = [tensors[name] for name in match_train(tensors, train)]
    if method == "hres":
        return steer(model, arch, train=train, **options)
    if method in _FIELDS:
        parts, defaults = _FIELDS[method]
        sites = state.backbone.sites
        site = next((part for part in parts if part in sites), None)
        if site is None:
            raise UnsuitableError(
                f"{method!r} stands beside the {' or '.join(parts)} of a block; sites of {state.backbone.name!r} are "
                f"{', '.join(sites)}. 'parallel-adapter' stands beside a mixer too, 'hres' beside any block."
            )
        return steer(model, arch, site=site, activation="relu", train=train, **{**defaults, **options})
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


def _options(method: str) -> list[str]:
    """Return the names of a method's options."""
    if method in _FIELDS:
        return list(_FIELDS[method][1])
    keywords = inspect.signature(_ATTACHED.get(method, steer)).parameters.items()
    return [name for name, p in keywords if p.kind is p.KEYWORD_ONLY and name != "train"]


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
