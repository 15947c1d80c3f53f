"""Attention as it is computed: the maps of every block in a call of a model, or the queries and keys they come from.

Each library is asked in its own way, which stays in force while a `Watch` is open:

- transformers computes with whatever function its `AttentionInterface` names. A function of ours is named there, which
  calls the eager one of the model's own file and looks on; masks are made as for eager attention. Models that are older
  than the interface give their maps by `output_attentions`, and no queries and keys.
- timm's attention hands its map through `attn_drop` where it is not fused: `fused_attn` is switched off. (That is what
  timm's own `AttentionExtract` hooks into; it has no way of taking its hooks away again.)
- `torch.nn.MultiheadAttention` is asked for `need_weights`, head by head.
- Queries and keys, but for transformers', are read from calls of torch's `scaled_dot_product_attention`, with timm's
  attention fused.

So what runs is the arithmetic of eager attention, which agrees with other implementations to rounding.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from residual_steer.backbone import Backbone
from residual_steer.errors import SteerError

__all__ = ["Keys", "Map", "Watch"]

NAME = "residual_steer_watched"  # in transformers' interfaces, while a Watch is open


@dataclass(frozen=True)
class Map:
    """One attention in one call of a block: which share of its attention each query gives to each key.

    Attributes:
        block: index of the block.
        weights: `(rows, heads, queries, keys)`.
        visible: which keys a query may attend to, booleans that broadcast to the weights; None is all of them.
    """

    block: int
    weights: Tensor
    visible: Tensor | None = None

    @property
    def seen(self) -> tuple[Tensor, ...]:
        """What was seen, queries in the third dimension of the first."""
        return (self.weights,)


@dataclass(frozen=True)
class Keys:
    """One attention in one call of a block: its queries and keys.

    Attributes:
        block: index of the block.
        query: `(rows, heads, queries, head width)`.
        key: `(rows, heads, keys, head width)`; heads that share a key have it each.
        scale: what the products of queries and keys are multiplied by.
        visible: which keys a query may attend to, booleans that broadcast to `(rows, heads, queries, keys)`; None is
            all of them.
    """

    block: int
    query: Tensor
    key: Tensor
    scale: float
    visible: Tensor | None = None

    @property
    def seen(self) -> tuple[Tensor, ...]:
        """What was seen, queries in the third dimension of the first."""
        return (self.query, self.key)


class Watch:
    """The attentions of a model's blocks, while `with Watch(model, backbone) as watch:`; everything is put back after.

    Args:
        model: the whole model.
        backbone: its blocks. An attention that is called outside of them is not looked at.
        keys: look at queries and keys instead of maps.
    """

    def __init__(self, model: nn.Module, backbone: Backbone, *, keys: bool = False) -> None:
        self._model, self._backbone, self._keys = model, backbone, keys
        self._looks: list[Map | Keys] = []
        self._block: int | None = None

    def __enter__(self) -> Watch:
        """Begin to look."""
        with contextlib.ExitStack() as stack:
            for index, block in enumerate(self._backbone.blocks):
                stack.enter_context(self._inside(index, block))
            for library in (self._transformers, self._timm, self._torch):
                stack.enter_context(library())
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        """Put everything back."""
        self._looks = []
        self._stack.__exit__(*error)

    def take(self) -> list[Map | Keys]:
        """Return what was seen since this was last asked, in the order of the calls."""
        looks, self._looks = self._looks, []
        return looks

    def _see(self, weights: Tensor, visible: Tensor | None = None) -> None:
        if self._block is not None:
            self._looks.append(Map(self._block, weights.detach(), visible))

    def _see_keys(self, query: Tensor, key: Tensor, scale: float | None, visible: Tensor | None) -> None:
        if self._block is not None:
            key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
            scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
            self._looks.append(Keys(self._block, query.detach(), key.detach(), scale, visible))

    @contextlib.contextmanager
    def _inside(self, index: int, block: nn.Module) -> Iterator[None]:
        """Know when a block is being called."""

        def enter(*_: Any) -> None:
            self._block = index

        def leave(*_: Any) -> None:
            self._block = None

        with _hooked(
            block.register_forward_pre_hook(enter, prepend=True), block.register_forward_hook(leave, always_call=True)
        ):
            yield

    @contextlib.contextmanager
    def _transformers(self) -> Iterator[None]:
        """Put a function of ours where transformers looks up its attention, or ask an older model for its maps."""
        if "transformers" not in sys.modules:
            yield
            return
        from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
        from transformers.masking_utils import eager_mask

        inner = next((module for module in self._model.modules() if isinstance(module, PreTrainedModel)), None)
        if inner is None:
            yield
            return
        if not any(_eager_of(part) for block in self._backbone.blocks for part in block.modules()):
            with self._older(inner):
                yield
            return
        mappings: list[Any] = [AttentionInterface._global_mapping, AttentionMaskInterface._global_mapping]
        for mapping, function in zip(mappings, (self._watched, eager_mask), strict=True):
            mapping[NAME] = function
        try:
            with _computed_by(self._model, NAME):
                yield
        finally:
            for mapping in mappings:
                mapping.pop(NAME, None)

    def _watched(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, **more: Any
    ) -> Any:
        """Compute attention as the file of the module's class does eagerly, and look.

        Raises:
            SteerError: it has no eager form.
        """
        eager = _eager_of(module)
        if eager is None:
            raise SteerError(f"the attention of {type(module).__name__} has no eager form that gives maps.")
        output, weights = eager(module, query, key, value, attention_mask, **more)
        visible = _visible(attention_mask, key.shape[2])
        if self._keys:
            self._see_keys(query, key, more.get("scaling"), visible)
        else:
            self._see(weights, visible)
        return output, weights

    @contextlib.contextmanager
    def _older(self, inner: nn.Module) -> Iterator[None]:
        """Ask a model of transformers that knows no interface for its maps."""
        if self._keys:
            with _computed_by(self._model, "sdpa"):
                yield
            return
        if "output_attentions" not in inspect.signature(inner.forward).parameters:
            yield
            return

        def ask(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            return args, {**kwargs, "output_attentions": True, "return_dict": True}

        def look(_: nn.Module, args: Any, output: Any) -> None:
            given = getattr(output, "attentions", None) or ()
            maps = [weights for weights in given if isinstance(weights, Tensor) and weights.dim() == 4]
            if len(maps) == len(self._backbone.blocks):
                self._looks += [Map(index, x.detach(), x.detach() > 0) for index, x in enumerate(maps)]

        with (
            _computed_by(self._model, "eager"),
            _hooked(
                inner.register_forward_pre_hook(ask, with_kwargs=True),
                inner.register_forward_hook(look, prepend=True),
            ),
        ):
            yield

    @contextlib.contextmanager
    def _timm(self) -> Iterator[None]:
        """Switch timm's attention from fused to open, whose map goes through `attn_drop`, or the other way round."""
        found: list[Any] = []
        for module in self._model.modules():
            drop = getattr(module, "attn_drop", None)
            if isinstance(getattr(module, "fused_attn", None), bool) and isinstance(drop, nn.Module):
                found.append(module)
        before = [module.fused_attn for module in found]

        def look(_: nn.Module, args: Any, weights: Tensor) -> None:
            self._see(weights)

        watched = [] if self._keys else [module.attn_drop for module in found]
        with _hooked(*(drop.register_forward_hook(look) for drop in watched)):
            try:
                for module in found:
                    module.fused_attn = self._keys
                yield
            finally:
                for module, fused in zip(found, before, strict=True):
                    module.fused_attn = fused

    @contextlib.contextmanager
    def _torch(self) -> Iterator[None]:
        """Look at torch's own attention: at the calls of the function, or the weights of the module."""
        if self._keys:
            with _Products(self._see_keys):
                yield
            return
        asked: list[tuple[bool, bool]] = []
        signature = inspect.signature(nn.MultiheadAttention.forward)

        def ask(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            call = signature.bind(module, *args, **kwargs)
            call.apply_defaults()
            asked.append((call.arguments["need_weights"], call.arguments["average_attn_weights"]))
            call.arguments |= {"need_weights": True, "average_attn_weights": False}
            return call.args[1:], call.kwargs

        def look(_: nn.Module, args: Any, output: Any) -> Any:
            result, weights = output
            needed, averaged = asked.pop()
            self._see(weights, weights.detach() > 0)
            return result, None if not needed else weights.mean(1) if averaged else weights

        found = [module for module in self._model.modules() if isinstance(module, nn.MultiheadAttention)]
        before = [module.register_forward_pre_hook(ask, with_kwargs=True) for module in found]
        with _hooked(*before, *(module.register_forward_hook(look, prepend=True) for module in found)):
            yield


class _Products(TorchFunctionMode):
    """Look at the queries and keys of torch's `scaled_dot_product_attention`."""

    def __init__(self, see: Callable[..., None]) -> None:
        super().__init__()
        self._watching = see

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            self._look(*args, **kwargs)
        return func(*args, **kwargs)

    def _look(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **more: Any,
    ) -> None:
        visible = _visible(attn_mask, key.shape[-2])
        if is_causal:
            every = torch.ones(1, 1, query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device)
            visible = every.tril()
        if query.dim() == 4:
            self._watching(query, key, more.get("scale"), visible)


@contextlib.contextmanager
def _hooked(*handles: Any) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


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


def _visible(mask: Any, keys: int) -> Tensor | None:
    """Read a mask, boolean or added to the scores, whose low end is the lowest number of its type or -inf.

    Returns:
        Booleans in four dimensions, that broadcast to `(rows, heads, queries, keys)`.
    """
    if not isinstance(mask, Tensor):
        return None
    shown: Tensor = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    return shown[(None,) * (4 - shown.dim())][..., :keys]
