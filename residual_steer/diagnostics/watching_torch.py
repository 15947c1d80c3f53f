"""The attention of timm and of torch itself.

- timm's attention hands its map through `attn_drop` where it is not fused: `fused_attn` is switched off. (That is what
  timm's own `AttentionExtract` hooks into; it has no way of taking its hooks away again.)
- `torch.nn.MultiheadAttention` is asked for `need_weights`, head by head.
- Queries and keys are read from calls of torch's `scaled_dot_product_attention`, with timm's attention fused.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from .looks import Looks, visible_in

__all__ = ["watching_timm", "watching_torch"]


@contextlib.contextmanager
def watching_timm(model: nn.Module, looks: Looks) -> Iterator[None]:
    """Switch timm's attention from fused to open, whose map goes through `attn_drop`, or the other way round."""
    found: list[Any] = []
    for module in model.modules():
        drop = getattr(module, "attn_drop", None)
        if isinstance(getattr(module, "fused_attn", None), bool) and isinstance(drop, nn.Module):
            found.append(module)
    before = [module.fused_attn for module in found]

    def look(_: nn.Module, args: Any, weights: Tensor) -> None:
        looks.see(weights)

    handles = [] if looks.keys else [module.attn_drop.register_forward_hook(look) for module in found]
    try:
        for module in found:
            module.fused_attn = looks.keys
        yield
    finally:
        for module, fused in zip(found, before, strict=True):
            module.fused_attn = fused
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def watching_torch(model: nn.Module, looks: Looks) -> Iterator[None]:
    """Look at torch's own attention: at the calls of the function, or the weights of the module."""
    if looks.keys:
        with _Products(looks):
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
        looks.see(weights, weights.detach() > 0)
        return result, None if not needed else weights.mean(1) if averaged else weights

    found = [module for module in model.modules() if isinstance(module, nn.MultiheadAttention)]
    handles = [module.register_forward_pre_hook(ask, with_kwargs=True) for module in found]
    handles += [module.register_forward_hook(look, prepend=True) for module in found]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Products(TorchFunctionMode):
    """Look at the queries and keys of torch's `scaled_dot_product_attention`."""

    def __init__(self, looks: Looks) -> None:
        super().__init__()
        self._looks = looks

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
        visible = visible_in(attn_mask, key.shape[-2])
        if is_causal:
            every = torch.ones(1, 1, query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device)
            visible = every.tril()
        if query.dim() == 4:
            self._looks.see_keys(query, key, more.get("scale"), visible)
