"""The attention maps of a batch, or its queries and keys, of the frozen and of the adapted model.

Each library is read in its own way, and everything is put back. Meanwhile the arithmetic of eager attention runs, which
agrees with other implementations to rounding.

- transformers: a function of ours, registered in its `AttentionInterface`, calls the eager one of the model's own file
  and takes note. Models older than the interface return their maps for `output_attentions`.
- timm: its attention hands the map through `attn_drop` where it is not fused.
- torch: `multi_head_attention_forward` returns its weights head by head, and `scaled_dot_product_attention` receives
  queries and keys.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from residual_steer._batches import Batch, has_two_stacks, require_finite
from residual_steer._internals import ATTENTION
from residual_steer._undisturbed import changed, watch
from residual_steer.backbone import Backbone
from residual_steer.errors import SteerError

from .compare import SIDES, Pair, places

__all__ = ["Attention", "attentions_of", "queries_of", "values_of"]

NAME = "residual_steer_recorded"  # of our function, among those of transformers


@dataclass(frozen=True)
class Attention:
    """One attention in one call of a block.

    Attributes:
        block: index of the block.
        seen: its map, `(rows, heads, queries, keys)`, the share of its attention that each query gives to each key; or
            its queries and keys, `(rows, heads, tokens, head width)` each, where heads that share a key have it each.
        visible: which keys a query may attend to, booleans that broadcast to the map; None is all of them.
        scale: what products of queries and keys are multiplied by.
    """

    block: int
    seen: tuple[Tensor, ...]
    visible: Tensor | None = None
    scale: float = 1.0


class _Recorder(TorchFunctionMode):
    """What attention computes in the blocks of a model, in the order of the calls; torch's own is looked at here."""

    def __init__(self, keys: bool) -> None:
        super().__init__()
        self.keys = keys  # whether queries and keys are looked at, instead of maps
        self.block: int | None = None  # that is being called; outside of them nothing is looked at
        self.found: list[Attention] = []

    def enter(self, index: int, *_: Any) -> None:
        self.block = index

    def leave(self, *_: Any) -> None:
        self.block = None

    def see_map(self, weights: Tensor, visible: Tensor | None = None) -> None:
        if self.block is not None and not self.keys:
            self.found.append(Attention(self.block, (weights.detach(),), visible))

    def see_keys(self, query: Tensor, key: Tensor, scale: float | None, visible: Tensor | None) -> None:
        if self.block is not None and self.keys:
            key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
            scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
            self.found.append(Attention(self.block, (query.detach(), key.detach()), visible, scale))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            self._see_products(*args, **kwargs)
        wanted = {"need_weights": True, "average_attn_weights": True, **kwargs}
        if func is not F.multi_head_attention_forward or self.keys or self.block is None:
            return func(*args, **kwargs)
        found: Any = func(*args, **{**kwargs, "need_weights": True, "average_attn_weights": False})
        output, weights = found
        self.see_map(weights, weights.detach() > 0)
        average = weights.mean(1) if wanted["average_attn_weights"] else weights
        return output, average if wanted["need_weights"] else None

    def _see_products(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, dropout_p: float = 0.0,
        is_causal: bool = False, **more: Any,
    ) -> None:  # fmt: skip
        visible = _visible_in(attn_mask, key.shape[-2])
        if is_causal:
            visible = query.new_ones(1, 1, query.shape[-2], key.shape[-2], dtype=torch.bool).tril()
        if query.dim() == 4:
            self.see_keys(query, key, more.get("scale"), visible)


def attentions_of(pair: Pair, batch: Batch, *, keys: bool) -> dict[str, list[Attention]]:
    """Return every attention of a batch, in the order of the calls, by side: maps, or with `keys` queries and keys."""
    found = {side: _look(pair, side, batch, keys) for side in SIDES}
    frozen, adapted = ([one.seen[0].shape[1] for one in found[side]] for side in SIDES)
    if frozen != adapted or len(set(frozen)) > 1:
        raise SteerError(
            f"attention is compared layer by layer and head by head; the reference has layers of {frozen} heads, the "
            f"adapted model of {adapted}."
        )
    return found


def queries_of(batch: Batch, found: dict[str, list[Attention]], which: str = "all") -> Tensor:
    """Return which tokens of a batch count as queries, `(rows, length)` of booleans; padding never does."""
    lengths = {one.seen[0].shape[2] for one in found["frozen"]}
    if len(lengths) > 1:
        raise SteerError(f"every layer attends from the same tokens; here from {sorted(lengths)} of them.")
    real = batch.real((batch.rows, lengths.pop()), found["frozen"][0].seen[0].device)
    if which == "all":
        return real
    return real & ((real.cumsum(1) if which == "first" else real.flip(1).cumsum(1).flip(1)) == 1)


def values_of(values: Tensor, length: int, prefix: int) -> Tensor:
    """Return the values of those queries that the reference has, `(rows, heads, queries) -> (rows, heads, length)`."""
    return values.index_select(2, places(length, values.shape[2], prefix, values.device))


def _look(pair: Pair, side: str, batch: Batch, keys: bool) -> list[Attention]:
    """Run a batch through the model of a side and look, or raise if its attentions cannot be looked at."""
    backbone, seen = pair.backbones[side], _Recorder(keys)
    with pair.on(side) as model, contextlib.ExitStack() as stack:
        if has_two_stacks(model):
            raise SteerError(
                f"attention is measured in one stack of blocks, and this {type(model).__name__} has an encoder and a "
                "decoder that attends to it. Steer and measure one of them: model.get_encoder()."
            )
        for index, block in enumerate(backbone.blocks):
            stack.enter_context(watch([block], functools.partial(seen.enter, index), seen.leave, first=True))
        for context in (_of_transformers(model, backbone, seen), _of_timm(model, seen), seen):
            stack.enter_context(context)
        batch.run(model)
    if not seen.found:
        raise SteerError(_why_nothing(backbone, keys))
    for one in seen.found:
        shape = tuple(one.seen[0].shape)
        if len(shape) != 4 or shape[0] != batch.rows:
            raise SteerError(
                f"attention is measured from the tokens of a row to the same row; that of block {one.block} has the "
                f"shape {shape} for {batch.rows} rows: it attends inside windows, as Swin's does, or across rows."
            )
        for tensor in one.seen:
            tokens = tensor.transpose(1, 2)
            if batch.mask is not None and batch.mask.shape == tokens.shape[:2]:
                tokens = tokens[batch.mask.to(tokens.device)]  # for padding a kernel may have computed anything
            require_finite(f"the attention of block {one.block}", tokens)
    return seen.found


def _why_nothing(backbone: Backbone, keys: bool) -> str:
    kinds = ", ".join(dict.fromkeys(type(block).__name__ for block in backbone.blocks))
    if any(name.endswith("A_log") for block in backbone.blocks for name, _ in block.named_parameters()):
        return f"blocks of {kinds} have a state and no attention. How far it remembers is diagnostics.memory_length."
    if keys:
        return (
            "queries and keys are read where transformers' AttentionInterface or torch's scaled_dot_product_attention "
            f"is given them; the blocks of {kinds} give them to neither."
        )
    return (
        f"the blocks of {kinds} gave no attention map. Maps are read from attention of transformers and timm and from "
        "torch.nn.MultiheadAttention; build your own on one of these."
    )


_recorder: _Recorder | None = None  # to which our function hands what it sees, while a model is looked at


@contextlib.contextmanager
def _of_transformers(model: nn.Module, backbone: Backbone, seen: _Recorder) -> Iterator[None]:
    """Let the models of transformers in a model attend by our function; ask one that cannot for its maps."""
    global _recorder
    if "transformers" not in sys.modules:
        yield
        return
    from transformers import PreTrainedModel

    inner = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    attend = None
    with contextlib.ExitStack() as stack:
        if any(_eager_of(part) for block in backbone.blocks for part in block.modules()):
            attend = _register()
        elif inner is not None and seen.keys:
            attend = "sdpa"
        elif inner is not None and "output_attentions" in inspect.signature(inner.forward).parameters:
            attend = "eager"
        if attend is not None:
            stack.enter_context(changed(_configs(model), ATTENTION, attend))
        if inner is not None and attend == "eager":
            for name in ("output_attentions", "return_dict"):
                stack.enter_context(changed([inner.config], name, True))
            given = functools.partial(_given, len(backbone.blocks), seen)
            stack.enter_context(watch([inner], after=given, first=True))
        before, _recorder = _recorder, seen
        try:
            yield
        finally:
            _recorder = before


def _given(blocks: int, seen: _Recorder, _: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
    """Take the maps that a model without the interface gives, one of each block."""
    given = getattr(output, "attentions", None) or ()
    maps = [weights.detach() for weights in given if isinstance(weights, Tensor) and weights.dim() == 4]
    if len(maps) == blocks:
        seen.found += [Attention(index, (weights,), weights > 0) for index, weights in enumerate(maps)]


@functools.cache
def _register() -> str:
    """Give transformers our function, and for it the masks of eager attention; return its name there."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, eager_mask)
    return NAME


def _attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any = None, **more: Any) -> Any:
    """Attend as the file of the module's class does eagerly, and take note, or raise if it has no eager form."""
    eager = _eager_of(module)
    if eager is None:
        raise SteerError(f"the attention of {type(module).__name__} has no eager form that gives maps.")
    output, weights = eager(module, query, key, value, mask, **more)
    if _recorder is not None:
        visible = _visible_in(mask, key.shape[2])
        _recorder.see_map(weights, visible)
        _recorder.see_keys(query, key, more.get("scaling"), visible)
    return output, weights


def _eager_of(module: nn.Module) -> Callable[..., Any] | None:
    """Return the eager attention of the file in which a class of transformers stands."""
    for cls in type(module).__mro__:
        if cls.__module__.startswith("torch."):
            break
        found: Callable[..., Any] | None = getattr(sys.modules.get(cls.__module__), "eager_attention_forward", None)
        if found is not None:
            return found
    return None


def _configs(model: nn.Module) -> list[Any]:
    """Return every config in a model of transformers, those inside another one behind it."""
    found: dict[int, Any] = {}
    left: list[Any] = [module.config for module in model.modules() if hasattr(module, "config")]
    while left:
        config = left.pop(0)
        if hasattr(config, ATTENTION) and id(config) not in found:
            found[id(config)] = config
            left[:0] = [getattr(config, part, None) for part in getattr(config, "sub_configs", ())]
    return list(found.values())


@contextlib.contextmanager
def _of_timm(model: nn.Module, seen: _Recorder) -> Iterator[None]:
    """Switch timm's attention from fused to open, whose map goes through `attn_drop`, or the other way round."""
    fused: list[Any] = [module for module in model.modules() if isinstance(getattr(module, "fused_attn", None), bool)]
    drops = {module: drop for module in fused if isinstance(drop := getattr(module, "attn_drop", None), nn.Module)}

    def see(_: nn.Module, args: Any, kwargs: Any, weights: Tensor) -> None:
        seen.see_map(weights)

    with changed(drops, "fused_attn", seen.keys), watch(drops.values(), after=see):
        yield


def _visible_in(mask: Any, keys: int) -> Tensor | None:
    """Read a mask, boolean or added to the scores, whose low end is the lowest number of its type or -inf."""
    if not isinstance(mask, Tensor):
        return None
    shown: Tensor = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    return shown[(None,) * (4 - shown.dim())][..., :keys]
