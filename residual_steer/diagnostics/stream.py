"""States of the residual stream: what leaves the blocks of a model, and which tokens of two models belong together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from residual_steer.backbone import Backbone
from residual_steer.errors import SteerError
from residual_steer.passes import Batch, Streams, require_finite

from .moments import exact

__all__ = ["States", "beside", "layer_of", "left", "real_tokens", "states_of"]


@dataclass(frozen=True)
class States:
    """The states of a batch in one model, in fp64; pixels of a ConvNet are tokens.

    Attributes:
        entering: what enters the first block, `(rows, tokens, width)`.
        leaving: what leaves each block that was asked for, of the same form.
    """

    entering: Tensor
    leaving: dict[int, Tensor]


def states_of(model: nn.Module, backbone: Backbone, batch: Batch, indices: Sequence[int]) -> States:
    """Run a model and return its states.

    Args:
        model: in the mode and with the fields that are wanted.
        backbone: where its stream is.
        batch: what it is called with.
        indices: of the blocks.

    Raises:
        SteerError: the model runs without one of the blocks, or a state is NaN or infinite.
    """
    with Streams(backbone, sorted({0, *indices})) as streams:
        batch.run(model)
    missing = [index for index in (0, *indices) if index not in streams.leaving]
    if missing:
        raise SteerError(f"the model ran without calling block {missing[0]}, so that there is no stream to look at.")

    def tokens(z: Tensor) -> Tensor:
        z = exact(z.movedim(backbone.channels, -1))
        return z.unsqueeze(1) if z.dim() == 2 else z.flatten(1, -2)

    leaving = {index: tokens(streams.leaving[index]) for index in indices}
    for index, z in leaving.items():
        require_finite(f"the stream that leaves block {index}", z)
    return States(tokens(streams.entering[0]), leaving)


def left(backbone: Backbone, output: Any) -> Tensor:
    """Return the stream in a block's output."""
    found: list[Tensor] = []

    def note(z: Tensor) -> Tensor:
        found.append(z)
        return z

    backbone.write(output, note)
    return found[0]


def beside(adapted: States, frozen: States, index: int) -> Tensor:
    """Return the adapted states at a block of those tokens that the frozen model has, `(rows, tokens, width)`.

    A method that puts tokens of its own into the stream (prompts, VPT-shallow) puts them there in one piece per row. It
    is found at the entrance of the first block: where taking as many tokens out leaves the least squared distance from
    what enters there in the frozen model.

    Args:
        adapted: of the adapted model.
        frozen: of the frozen model, on the same batch.
        index: of the block.

    Raises:
        SteerError: the two streams have other rows, another width, or fewer tokens than the frozen one.
    """
    z, reference = adapted.leaving[index], frozen.leaving[index]
    if z.shape == reference.shape:
        return z
    more = z.shape[1] - reference.shape[1]
    entered = adapted.entering.shape[1] - frozen.entering.shape[1]
    if z.shape[::2] != reference.shape[::2] or more < 0 or more != entered:
        raise SteerError(
            f"both models have the same tokens, or the adapted one more that enter at its first block; behind block "
            f"{index} the frozen states are {tuple(reference.shape)} and the adapted ones {tuple(z.shape)}. Compare "
            "models of one backbone."
        )
    at = _place(adapted.entering, frozen.entering)
    position = torch.arange(reference.shape[1], device=z.device)
    kept = position + more * (position >= at[:, None])
    return z.gather(1, kept[..., None].expand_as(reference))


def real_tokens(batch: Batch, z: Tensor) -> Tensor:
    """Return which of the tokens of z, `(rows, tokens, width)`, are not padding, `(rows, tokens)` of booleans."""
    mask = batch.mask
    if mask is None or mask.shape != z.shape[:2]:
        return torch.ones(z.shape[:2], dtype=torch.bool, device=z.device)
    return mask.to(z.device)


def layer_of(backbone: Backbone, layer: object) -> int:
    """Return the index of a block that is counted from the end if negative.

    Raises:
        SteerError: there is no such block.
    """
    count = len(backbone.blocks)
    if not isinstance(layer, int) or isinstance(layer, bool) or not -count <= layer < count:
        raise SteerError(f"`layer` is the index of a block, {-count} to {count - 1}; received {layer!r}.")
    return layer % count


def _place(adapted: Tensor, frozen: Tensor) -> Tensor:
    """Return before which token of each row the piece stands that only `adapted` has, `(rows,)`."""
    length, more = frozen.shape[1], adapted.shape[1] - frozen.shape[1]
    before = (adapted[:, :length] - frozen).square().sum(-1).cumsum(1)
    after = (adapted[:, more:] - frozen).square().sum(-1)
    behind = after.flip(1).cumsum(1).flip(1)
    none = before.new_zeros(len(before), 1)
    return (torch.cat([none, before], 1) + torch.cat([behind, none], 1)).argmin(1)
