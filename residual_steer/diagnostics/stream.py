"""States of the residual stream: what leaves the blocks of a model, and which tokens of two models belong together."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from residual_steer.backbone import Backbone
from residual_steer.errors import SteerError
from residual_steer.passes import Batch, Streams, require_finite

from .moments import exact
from .queries import places

__all__ = ["beside", "layer_of", "states_of"]


def states_of(model: nn.Module, backbone: Backbone, batch: Batch, indices: Sequence[int]) -> dict[int, Tensor]:
    """Run a model and return what leaves its blocks, by index: `(rows, tokens, width)` in fp64.

    Pixels of a ConvNet are tokens.

    Args:
        model: in the mode and with the fields that are wanted.
        backbone: where its stream is.
        batch: what it is called with.
        indices: of the blocks.

    Raises:
        SteerError: the model runs without one of the blocks, or a state is NaN or infinite.
    """
    with Streams(backbone, indices) as streams:
        batch.run(model)
    states = {}
    for index in indices:
        if index not in streams.leaving:
            raise SteerError(f"the model ran without calling block {index}, so that there is no stream to look at.")
        z = exact(streams.leaving[index].movedim(backbone.channels, -1))
        require_finite(f"the stream that leaves block {index}", z)
        states[index] = z.unsqueeze(1) if z.dim() == 2 else z.flatten(1, -2)
    return states


def beside(adapted: Tensor, frozen: Tensor, prefix: int) -> Tensor:
    """Return the adapted states of those tokens that the frozen model has, `(rows, tokens, width)`.

    A method that puts tokens of its own into the stream (prompts, VPT-shallow) puts them before a text and behind the
    first tokens of an image: see `places`.

    Args:
        adapted: `(rows, tokens or more, width)`.
        frozen: of the frozen model, on the same batch.
        prefix: how many tokens stand before an image (`prefix_tokens`).

    Raises:
        SteerError: the two have other rows, another width, or the adapted model has fewer tokens.
    """
    length, longer = frozen.shape[1], adapted.shape[1]
    if adapted.shape[::2] != frozen.shape[::2] or longer < length:
        raise SteerError(
            f"both models have the same tokens, or the adapted one some more; the frozen states are "
            f"{tuple(frozen.shape)} and the adapted ones {tuple(adapted.shape)}. Compare models of one backbone."
        )
    return adapted[:, places(length, longer, prefix, adapted.device)]


def layer_of(backbone: Backbone, layer: object) -> int:
    """Return the index of a block that is counted from the end if negative.

    Raises:
        SteerError: there is no such block.
    """
    count = len(backbone.blocks)
    if not isinstance(layer, int) or isinstance(layer, bool) or not -count <= layer < count:
        raise SteerError(f"`layer` is the index of a block, {-count} to {count - 1}; received {layer!r}.")
    return layer % count
