"""The attention maps of a batch, or its queries and keys, of the frozen and of the adapted model.

Each library is asked in its own way, and everything is put back. What runs meanwhile is the arithmetic of eager
attention, which agrees with other implementations to rounding.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TypeVar

from torch import Tensor, nn

from residual_steer.backbone import Backbone
from residual_steer.errors import SteerError
from residual_steer.passes import Batch, has_two_stacks, require_finite

from .looks import Keys, Looks, Map
from .pairs import SIDES, Pair
from .queries import chosen, places
from .watching_torch import watching_timm, watching_torch
from .watching_transformers import watching_transformers

__all__ = ["counts_of", "keys_of", "maps_of", "real"]

Look = TypeVar("Look", Map, Keys)


def maps_of(pair: Pair, batch: Batch) -> dict[str, list[Map]]:
    """Return the map of every attention in the order of their calls, by side.

    Raises:
        SteerError: there are none, the two models have different ones, or one is not finite; with the reason.
    """
    return _alike({side: [x for x in _look(pair, side, batch, False) if isinstance(x, Map)] for side in SIDES})


def keys_of(pair: Pair, batch: Batch) -> dict[str, list[Keys]]:
    """Return the queries and keys of every attention in the order of their calls, by side.

    Raises:
        SteerError: there are none, the two models have different ones, or one is not finite; with the reason.
    """
    return _alike({side: [x for x in _look(pair, side, batch, True) if isinstance(x, Keys)] for side in SIDES})


def real(x: Tensor, length: int, prefix: int) -> Tensor:
    """Return what is known of the queries that are tokens of the batch, `(rows, heads, length)`, in their order.

    Args:
        x: a number for every query, `(rows, heads, queries)`.
        length: how many queries the reference has.
        prefix: how many tokens stand before those of an image.
    """
    return x.index_select(2, places(length, x.shape[2], prefix, x.device))


def _look(pair: Pair, side: str, batch: Batch, keys: bool) -> Sequence[Map | Keys]:
    """Run a batch through the model of a side and look.

    Raises:
        SteerError: it has two streams, or its attentions cannot be looked at.
    """
    backbone = pair.backbone(side)
    with pair.on(side) as model:
        if has_two_stacks(model):
            raise SteerError(
                f"attention is measured in one stack of blocks, and this {type(model).__name__} has an encoder and a "
                "decoder that attends to it. Steer and measure one of them: model.get_encoder()."
            )
        with _watching(model, backbone, keys) as seen:
            batch.run(model)
    looks = seen.found
    if not looks:
        raise SteerError(_why_nothing(backbone, keys))
    for look in looks:
        shape = tuple(look.seen[0].shape)
        if len(shape) != 4 or shape[0] != batch.rows:
            raise SteerError(
                f"attention is measured from the tokens of a row to the same row; that of block {look.block} has the "
                f"shape {shape} for {batch.rows} rows: it attends inside windows, as Swin's does, or across rows."
            )
        for tensor in look.seen:
            require_finite(f"the attention of block {look.block}", _of_text(tensor, batch))
    return looks


@contextlib.contextmanager
def _watching(model: nn.Module, backbone: Backbone, keys: bool) -> Iterator[Looks]:
    """Look at every attention that is called inside a block."""
    looks, handles = Looks(keys), []
    for index, block in enumerate(backbone.blocks):
        enter, leave = looks.around(index)
        handles.append(block.register_forward_pre_hook(enter, prepend=True))
        handles.append(block.register_forward_hook(leave))
    try:
        with watching_transformers(model, backbone, looks), watching_timm(model, looks), watching_torch(model, looks):
            yield looks
    finally:
        for handle in handles:
            handle.remove()


def _of_text(tensor: Tensor, batch: Batch) -> Tensor:
    """Leave the padding out, `(rows, heads, queries or keys, ...)`, for which a kernel may have computed anything."""
    return tensor.transpose(1, 2)[batch.real((batch.rows, tensor.shape[2]), tensor.device)]


def _why_nothing(backbone: Backbone, keys: bool) -> str:
    kinds = ", ".join(dict.fromkeys(type(block).__name__ for block in backbone.blocks))
    if any("A_log" in part._parameters for block in backbone.blocks for part in block.modules()):
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


def _alike(looks: dict[str, list[Look]]) -> dict[str, list[Look]]:
    """Hold the layers of both models against each other.

    Raises:
        SteerError: they differ in number or heads.
    """
    frozen, adapted = ([look.seen[0].shape[1] for look in looks[side]] for side in SIDES)
    if frozen != adapted or len(set(frozen)) > 1:
        raise SteerError(
            f"attention is compared layer by layer and head by head; the reference has layers of {frozen} heads, the "
            f"adapted model of {adapted}."
        )
    return looks


def counts_of(batch: Batch, looks: dict[str, list[Look]], query: str) -> Tensor:
    """Return which tokens of the batch count as queries, `(rows, length)` of booleans.

    Raises:
        SteerError: layers attend from different numbers of tokens.
    """
    lengths = {look.seen[0].shape[2] for look in looks["frozen"]}
    if len(lengths) > 1:
        raise SteerError(
            f"every layer attends from the same tokens; here from {', '.join(map(str, sorted(lengths)))} of them."
        )
    return chosen(batch, lengths.pop(), query, looks["frozen"][0].seen[0].device)
