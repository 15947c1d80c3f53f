"""The attention maps of a batch, or its queries and keys, of the frozen and of the adapted model.

Each library is asked in its own way, and everything is put back. What runs meanwhile is the arithmetic of eager
attention, which agrees with other implementations to rounding.

- transformers: a function of ours, registered once in its `AttentionInterface`, calls the eager one of the model's own
  file and takes note. Models older than the interface are asked for `output_attentions`.
- timm: its attention hands the map through `attn_drop` where it is not fused.
- torch: `multi_head_attention_forward` is asked for its weights, head by head, and `scaled_dot_product_attention` is
  looked at for queries and keys.

Configs name their attention in `_attn_implementation`, which is private and read and written here alone. Tried with
transformers 5.14 and 5.24.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from residual_steer._batches import Batch, has_two_stacks, require_finite
from residual_steer.backbone import Backbone
from residual_steer.errors import SteerError
from residual_steer.recording import changed, watch
from residual_steer.tokens import class_token

from .compare import SIDES, Pair, places

__all__ = ["Attention", "attentions_of", "chosen", "of_queries", "query_of"]

NAME = "residual_steer_recorded"  # of our function, among those of transformers
_QUERIES = ("auto", "first", "last", "all")


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


@dataclass
class _Recorder:
    """What was seen in the blocks of a model, in the order of the calls."""

    keys: bool  # whether queries and keys are looked at, instead of maps
    block: int | None = None  # that is being called; outside of them nothing is looked at
    found: list[Attention] = field(default_factory=list)

    def see_map(self, weights: Tensor, visible: Tensor | None = None) -> None:
        if self.block is not None and not self.keys:
            self.found.append(Attention(self.block, (weights.detach(),), visible))

    def see_keys(self, query: Tensor, key: Tensor, scale: float | None, visible: Tensor | None) -> None:
        if self.block is not None and self.keys:
            key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
            scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
            self.found.append(Attention(self.block, (query.detach(), key.detach()), visible, scale))

    def enter(self, index: int, *_: Any) -> None:
        self.block = index

    def leave(self, *_: Any) -> None:
        self.block = None


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
            stack.enter_context(watch([block], functools.partial(seen.enter, index), first=True))
            stack.enter_context(watch([block], after=seen.leave))
        stack.enter_context(_of_transformers(model, backbone, seen))
        stack.enter_context(_of_timm(model, seen))
        stack.enter_context(_OfTorch(seen))
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
        return (
            f"blocks of {kinds} have a state and no attention. Its counterpart, how far back the state remembers, is "
            "residual_steer.diagnostics.memory_length."
        )
    if keys:
        return (
            "queries and keys are read where transformers' AttentionInterface or torch's scaled_dot_product_attention "
            f"is given them; the blocks of {kinds} give them to neither."
        )
    return (
        f"the blocks of {kinds} gave no attention map. Maps are read from attention of transformers and timm and from "
        "torch.nn.MultiheadAttention; build your own on one of these."
    )


_recorder: _Recorder | None = None  # that our function tells, while a model of transformers is looked at


@contextlib.contextmanager
def _of_transformers(model: nn.Module, backbone: Backbone, seen: _Recorder) -> Iterator[None]:
    """Let the models of transformers in a model attend by our function; ask one that cannot for its maps."""
    global _recorder
    if "transformers" not in sys.modules:
        yield
        return
    from transformers import PreTrainedModel

    inner = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    with contextlib.ExitStack() as stack:
        if any(_eager_of(part) for block in backbone.blocks for part in block.modules()):
            _register()
            stack.enter_context(changed(_configs(model), "_attn_implementation", NAME))
        elif inner is not None and seen.keys:
            stack.enter_context(changed(_configs(model), "_attn_implementation", "sdpa"))
        elif inner is not None and "output_attentions" in inspect.signature(inner.forward).parameters:
            stack.enter_context(changed(_configs(model), "_attn_implementation", "eager"))
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
    maps = [weights for weights in given if isinstance(weights, Tensor) and weights.dim() == 4]
    if len(maps) == blocks:
        seen.found += [Attention(index, (x.detach(),), x.detach() > 0) for index, x in enumerate(maps)]


@functools.cache
def _register() -> None:
    """Give transformers our function, and for it the masks of eager attention."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, eager_mask)


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
            return None
        found: Callable[..., Any] | None = getattr(sys.modules.get(cls.__module__), "eager_attention_forward", None)
        if found is not None:
            return found
    return None


def _configs(model: nn.Module) -> list[Any]:
    """Return every config in a model of transformers, those inside another one behind it."""
    found: list[Any] = []

    def visit(config: Any) -> None:
        if hasattr(config, "_attn_implementation") and not any(config is one for one in found):
            found.append(config)
            for part in getattr(config, "sub_configs", ()):
                visit(getattr(config, part, None))

    for module in model.modules():
        visit(getattr(module, "config", None))
    return found


@contextlib.contextmanager
def _of_timm(model: nn.Module, seen: _Recorder) -> Iterator[None]:
    """Switch timm's attention from fused to open, whose map goes through `attn_drop`, or the other way round."""
    fused = [module for module in model.modules() if isinstance(getattr(module, "fused_attn", None), bool)]
    found: list[Any] = [module for module in fused if isinstance(getattr(module, "attn_drop", None), nn.Module)]

    def see(_: nn.Module, args: Any, kwargs: Any, weights: Tensor) -> None:
        seen.see_map(weights)

    with changed(found, "fused_attn", seen.keys), watch([module.attn_drop for module in found], after=see):
        yield


class _OfTorch(TorchFunctionMode):
    """Look at the calls of torch's own attention."""

    def __init__(self, seen: _Recorder) -> None:
        super().__init__()
        self._seen = seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            self._products(*args, **kwargs)
        if func is F.multi_head_attention_forward and not self._seen.keys and self._seen.block is not None:
            return self._module(func, args, kwargs)
        return func(*args, **kwargs)

    def _module(self, func: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
        """Ask for weights, head by head, and hand on what was asked for."""
        output, weights = func(*args, **{**kwargs, "need_weights": True, "average_attn_weights": False})
        self._seen.see_map(weights, weights.detach() > 0)
        if not kwargs.get("need_weights", True):
            return output, None
        return output, weights.mean(1) if kwargs.get("average_attn_weights", True) else weights

    def _products(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, dropout_p: float = 0.0,
        is_causal: bool = False, **more: Any,
    ) -> None:  # fmt: skip
        visible = _visible_in(attn_mask, key.shape[-2])
        if is_causal:
            visible = query.new_ones(1, 1, query.shape[-2], key.shape[-2], dtype=torch.bool).tril()
        if query.dim() == 4:
            self._seen.see_keys(query, key, more.get("scale"), visible)


def _visible_in(mask: Any, keys: int) -> Tensor | None:
    """Read a mask, boolean or added to the scores, whose low end is the lowest number of its type or -inf."""
    if not isinstance(mask, Tensor):
        return None
    shown: Tensor = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    return shown[(None,) * (4 - shown.dim())][..., :keys]


def query_of(query: str, model: nn.Module) -> str:
    """Return which tokens attend, with what "auto" means for a model, or raise if it is no such word."""
    if query not in _QUERIES:
        raise SteerError(f"`query` is one of {', '.join(_QUERIES)}; received {query!r}.")
    if query != "auto":
        return query
    return "first" if class_token(model) else "all"


def chosen(batch: Batch, found: Mapping[str, list[Attention]], query: str) -> Tensor:
    """Return which tokens of a batch count as queries, `(rows, length)` of booleans; padding never does."""
    lengths = {one.seen[0].shape[2] for one in found["frozen"]}
    if len(lengths) > 1:
        raise SteerError(
            f"every layer attends from the same tokens; here from {', '.join(map(str, sorted(lengths)))} of them."
        )
    real = batch.real((batch.rows, lengths.pop()), found["frozen"][0].seen[0].device)
    if query == "first":
        return real & (real.cumsum(1) == 1)
    if query == "last":
        return real & (real.flip(1).cumsum(1).flip(1) == 1)
    return real


def of_queries(values: Tensor, length: int, prefix: int) -> Tensor:
    """Return the values of those queries that the reference has, `(rows, heads, queries) -> (rows, heads, length)`."""
    return values.index_select(2, places(length, values.shape[2], prefix, values.device))
