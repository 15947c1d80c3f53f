"""Rows that are tokens: several texts in one row of a batch, each with its own field.

So texts are packed for training without padding, and so transformers' continuous batching runs many requests in one
row, other ones in every call.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ._frozen import Replaced
from ._internals import keeps_batching
from ._row_by_row import Run, runs_of
from .backbone import Handle
from .errors import SteerError

Names = Sequence[str | None]


@dataclass(frozen=True)
class Segments:
    """Which field acts on which tokens of a batch.

    Attributes:
        shape: of the batch, `(batch, length)`.
        runs: where each field acts among its tokens, in order.
    """

    shape: tuple[int, int]
    runs: tuple[Run, ...]

    @classmethod
    def of(cls, tokens: Any, names: Names) -> Segments:
        """Return where fields act, given the place of each token's text in a list of names, -1 for none; or raise."""
        kinds = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
        if not isinstance(tokens, Tensor) or tokens.dim() != 2 or tokens.dtype not in kinds or not tokens.numel():
            got = f"{tokens.dtype} of {tuple(tokens.shape)}" if isinstance(tokens, Tensor) else repr(tokens)
            raise SteerError(f"`tokens` is a tensor of integers, (batch, length); received {got:.200}.")
        places = tokens.flatten().tolist()
        if min(places) < -1 or max(places) >= len(names):
            raise SteerError(
                f"`tokens` has for each token the place of its text in the list, from 0 to {len(names) - 1}, or -1 for "
                f"none; received {min(places)} to {max(places)}."
            )
        batch, length = tokens.shape
        return cls((batch, length), runs_of([None if place < 0 else names[place] for place in places]))


def batches_of_requests(model: nn.Module, state: Any) -> list[Handle]:
    """Let `generate_batch` of transformers serve a list of names as one field for every request."""
    if not callable(getattr(model, "generate_batch", None)) or not hasattr(model, "init_continuous_batching"):
        return []
    return [Replaced(model, "generate_batch", partial(_generate_batch, model, state))]


def _generate_batch(model: Any, state: Any, *args: Any, **kwargs: Any) -> Any:
    """Generate for all requests, whose tokens meet their own field in every call."""
    own, mix = Replaced.own(model, "generate_batch", state.handles), state.mix
    mix.check_whole("`generate_batch`")
    if mix.rows is None:
        return own(*args, **kwargs)
    given = inspect.signature(own).bind(*args, **kwargs)
    inputs = given.arguments["inputs"]
    if len(inputs) != mix.rows:
        raise SteerError(
            f"the list given to `use` has {mix.rows} rows, and `generate_batch` was given {len(inputs)} requests. Give "
            "one name or None for every request."
        )
    given.arguments["continuous_batching_config"] = _plain(model, given.arguments.get("continuous_batching_config"))
    managers: list[Any] = []
    makes = model.init_continuous_batching

    def begin(*args: Any, **kwargs: Any) -> Any:
        managers.append(makes(*args, **kwargs))
        return managers[-1]

    order = {f"req_{place}": place for place in range(len(inputs))}
    making = Replaced(model, "init_continuous_batching", partial(begin))
    try:
        state.select(model, dataclasses.replace(mix, segments=partial(_requests, managers, order, mix.by_row)))
        return own(*given.args, **given.kwargs)
    finally:
        making.remove()
        state.select(model, mix)


def _plain(model: Any, config: Any) -> Any:
    """Return a configuration without what would keep or share what one field computed; raise if it was asked for."""
    from transformers import ContinuousBatchingConfig

    config = ContinuousBatchingConfig() if config is None else config
    compiled = config.varlen_compile_config or config.decode_compile_config or config.default_compile_level
    if compiled or config.use_cuda_graph or keeps_batching(model) or config.use_async_batching:
        raise SteerError(
            "requests that have a field of their own run without torch.compile, CUDA graphs, asynchronous batching and "
            "a manager that was kept from before: leave these out of `continuous_batching_config`."
        )
    # blocks of a cache that another field filled are not shared, not even for the same words
    return dataclasses.replace(config, allow_block_sharing=False, use_cuda_graph=False, use_async_batching=False)


def _requests(
    managers: Sequence[Any], order: Mapping[str, int], names: Names, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Segments:
    """Return which field acts on which tokens of a call, from the requests that were put into it."""
    words = kwargs.get("input_ids")
    if not managers or not isinstance(words, Tensor) or len(words) != 1:
        raise SteerError("a call of `generate_batch` has the tokens of its requests in one row; this one has not.")
    every: list[str | None] = []
    for request in managers[-1].batch_processor.inputs_and_outputs.requests_in_batch:
        place = order.get(request.state.request_id.partition("__child#")[0])
        if place is None:
            raise SteerError(f"the request {request.state.request_id!r} is none of those that were given.")
        every += [names[place]] * request.query_length
    if len(every) > words.shape[1]:
        raise SteerError(f"the requests of this call have {len(every)} tokens, and the call {words.shape[1]}.")
    return Segments((1, words.shape[1]), runs_of(every))


Finder = Callable[[tuple[Any, ...], Mapping[str, Any]], Segments]
