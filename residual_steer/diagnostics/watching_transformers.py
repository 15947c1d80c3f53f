"""The attention of transformers, looked at through its own `AttentionInterface`.

What it computes with is named by `config._attn_implementation`. While a model is watched that names a function of ours,
which calls the eager one of the model's own file and looks on; masks are made as for eager attention. Models that are
older than the interface give their maps by `output_attentions`, and queries and keys where they call torch's function.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from torch import Tensor, nn

from residual_steer.backbone import Backbone
from residual_steer.errors import SteerError

from .looks import Looks, Map, visible_in

__all__ = ["watching_transformers"]

NAME = "residual_steer_watched"  # in the interfaces, while a model is watched


@contextlib.contextmanager
def watching_transformers(model: nn.Module, backbone: Backbone, looks: Looks) -> Iterator[None]:
    """Put a function of ours where transformers looks up its attention, or ask an older model for its maps."""
    with contextlib.ExitStack() as stack:
        if "transformers" in sys.modules:
            from transformers import PreTrainedModel

            inner = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
            if any(_eager_of(part) for block in backbone.blocks for part in block.modules()):
                stack.enter_context(_interface(looks))
                stack.enter_context(_computed_by(model, NAME))
            elif inner is not None and looks.keys:
                stack.enter_context(_computed_by(model, "sdpa"))
            elif inner is not None and "output_attentions" in inspect.signature(inner.forward).parameters:
                stack.enter_context(_computed_by(model, "eager"))
                stack.enter_context(_asked_for_maps(inner, len(backbone.blocks), looks))
        yield


@contextlib.contextmanager
def _interface(looks: Looks) -> Iterator[None]:
    """Register a function that looks on, and the masks of eager attention for it."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    mappings: list[Any] = [AttentionInterface._global_mapping, AttentionMaskInterface._global_mapping]
    for mapping, function in zip(mappings, (partial(_watched, looks), eager_mask), strict=True):
        mapping[NAME] = function
    try:
        yield
    finally:
        for mapping in mappings:  # which have a `register`, and nothing that undoes it
            mapping.pop(NAME, None)


def _watched(
    looks: Looks, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, **more: Any
) -> Any:
    """Compute attention as the file of the module's class does eagerly, and look.

    Raises:
        SteerError: it has no eager form.
    """
    eager = _eager_of(module)
    if eager is None:
        raise SteerError(f"the attention of {type(module).__name__} has no eager form that gives maps.")
    output, weights = eager(module, query, key, value, attention_mask, **more)
    visible = visible_in(attention_mask, key.shape[2])
    if looks.keys:
        looks.see_keys(query, key, more.get("scaling"), visible)
    else:
        looks.see(weights, visible)
    return output, weights


@contextlib.contextmanager
def _asked_for_maps(inner: nn.Module, blocks: int, looks: Looks) -> Iterator[None]:
    """Ask a model that knows no interface for its maps, one of each block."""

    def ask(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, "output_attentions": True, "return_dict": True}

    def look(_: nn.Module, args: Any, output: Any) -> None:
        given = getattr(output, "attentions", None) or ()
        maps = [weights for weights in given if isinstance(weights, Tensor) and weights.dim() == 4]
        if len(maps) == blocks:
            looks.found += [Map(index, x.detach(), x.detach() > 0) for index, x in enumerate(maps)]

    before = inner.register_forward_pre_hook(ask, with_kwargs=True)
    after = inner.register_forward_hook(look, prepend=True)
    try:
        yield
    finally:
        before.remove()
        after.remove()


@contextlib.contextmanager
def _computed_by(model: nn.Module, name: str) -> Iterator[None]:
    """Let every config in a model of transformers, and every config inside one, name an attention implementation."""
    configs: list[Any] = []

    def visit(config: Any) -> None:
        if hasattr(config, "_attn_implementation") and not any(config is one for one in configs):
            configs.append(config)
            for part in getattr(config, "sub_configs", ()):
                visit(getattr(config, part, None))

    for module in model.modules():
        visit(module.__dict__.get("config"))
    before = [config._attn_implementation for config in configs]
    try:
        for config in configs:
            config._attn_implementation = name
        yield
    finally:
        for config, named in zip(configs, before, strict=True):  # the outer first, which tell those inside
            config._attn_implementation = named


def _eager_of(module: nn.Module) -> Callable[..., Any] | None:
    """Return the eager attention of the file in which a class of transformers stands."""
    for cls in type(module).__mro__:
        if cls.__module__.startswith("torch."):
            return None
        found: Callable[..., Any] | None = getattr(sys.modules.get(cls.__module__), "eager_attention_forward", None)
        if found is not None:
            return found
    return None
