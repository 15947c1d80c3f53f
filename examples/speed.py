"""How fast adapted language models read and write: prefill and cached decoding, all models in the same rounds."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from residual_steer._caches import cache_of, cache_parameter
from residual_steer.study.rounds import Rounds, Variant, play

PHASES = ("prefill", "decode")


def time_phases(
    models: Mapping[str, nn.Module], ids: Tensor, *, rounds: int, tokens: int = 8
) -> dict[str, dict[str, list[float]]]:
    """Time all models in interleaved rounds.

    Args:
        models: causal language models of one kind, by name, in evaluation mode.
        ids: the text they read, `(batch, length)`.
        rounds: how often each is measured.
        tokens: how many more are then decoded, one after the other, from a copy of the same cache.

    Returns:
        Seconds of every round: of reading the text and giving the logits of the next token (`prefill`), and of one
        decoded token of each row (`decode`), by phase and name.
    """
    with torch.no_grad():
        caches = {name: read(model, ids) for name, model in models.items()}
        nexts = ids[:, -1:]

        def decode(model: nn.Module, cache: Any) -> None:
            for _ in range(tokens):
                cache = write(model, nexts, cache)

        prefill = [Variant(name, lambda _, m=model: read(m, ids)) for name, model in models.items()]
        steps = [
            Variant(name, lambda cache, m=model: decode(m, cache), lambda n=name: copy.deepcopy(caches[n]))
            for name, model in models.items()
        ]
        read_rounds, written_rounds = play(prefill, rounds), play(steps, rounds)
    return {
        "prefill": {name: list(times) for name, times in read_rounds.seconds.items()},
        "decode": {name: [t / tokens for t in times] for name, times in written_rounds.seconds.items()},
    }


def read(model: nn.Module, ids: Tensor) -> Any:
    """Read a text; return the cache that this leaves."""
    return cache_of(model(input_ids=ids, use_cache=True, logits_to_keep=1))


def write(model: nn.Module, token: Tensor, cache: Any) -> Any:
    """Go on by one token of every row; return the cache."""
    return cache_of(model(input_ids=token, use_cache=True, **{cache_parameter(model): cache}))


def relative(times: Mapping[str, list[float]], name: str, reference: str) -> tuple[float, float, float]:
    """Return how many times as fast as `reference` a model is: median and quartiles of the rounds' ratios."""
    found = Rounds(times).ratio(reference, name)
    return found.median, found.low, found.high


def per_second(times: list[float], tokens: int) -> float:
    """Return tokens per second, the median over rounds."""
    return tokens / statistics.median(times)
