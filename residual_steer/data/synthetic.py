"""Data made from a seed: associative recall (Arora et al. 2023, arXiv 2312.04927), and latent tasks of ours."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from residual_steer.data._rows import TokenRows, check_integer, check_number, check_tokens, generator
from residual_steer.errors import SteerError
from residual_steer.training.losses import IGNORE
from residual_steer.training.processes import to_device
from residual_steer.training.undisturbed import apart, as_before

__all__ = ["embedding", "latent", "mqar", "recall", "rule"]

_ROWS, _EMBEDDING, _RULES = 0, 1, 2  # streams of random numbers
_HIDDEN = 32
_STEEPNESS = 3.0  # with less of it, the rules are nearly linear
_CENSUS = 2**16  # latent vectors over which the threshold of a rule is the median


def mqar(
    size: int,
    *,
    pairs: int = 8,
    length: int = 64,
    keys: Iterable[int] = range(1, 4096),
    values: Iterable[int] = range(4096, 8192),
    noise: Iterable[int] = (0,),
    power: float = 0.01,
    seed: int = 0,
) -> TokenRows:
    """Return rows of multi-query associative recall (MQAR).

    A row starts with `pairs` different keys, each followed by its value: `k1 v1 k2 v2 …`. All values of a row differ,
    and a key means another value in every row, so that nothing but the row itself tells it. The rest of the row is cut
    into slots of two tokens, and every key comes back in a slot of its own, again followed by its value, as in a text:

        input_ids   5  91   8  77   0   0   8  77   0   0   5  91
        labels      ·   ·   ·   ·   ·   ·   ·  77   ·   ·   ·  91     (· is -100)

    Labels are aligned as transformers wants them, which shifts them itself: a label stands where its value stands, one
    after the query, and is predicted at the query, from what stands before the value. Zoology's own code puts the label
    at the query and something else in the value's place; what has to be predicted, and from what, is the same.

    Slots are taken key by key without replacement; slot g = 1, 2, … is drawn with probability proportional to
    g^(power - 1), Zoology's power law of the gaps between repetitions in real text: small powers bring queries
    close to the pairs, 1 spreads them evenly. Tokens that are in no pair are drawn evenly from `noise`.

    Tasks differ by their `keys` and `values`: pre-train on some, adapt to others. Another `seed` gives other rows, for
    validation; the same arguments give the same rows.

    Args:
        size: rows.
        pairs: key-value pairs of a row, each queried once.
        length: tokens of a row, at least 4 · `pairs`.
        keys: tokens that are keys, at least `pairs` of them.
        values: tokens that are values, at least `pairs` of them; none is a key.
        noise: tokens that fill a row; none is a key or a value.
        power: α of the power law of gaps, 0.01 in Zoology.
        seed: from 0 to 2^40 - 1.

    Returns:
        Dicts of `input_ids` and `labels`, both int64 `(length,)`. A model of them needs a vocabulary beyond the
        largest token: 8192 with these defaults, as in Zoology.

    Raises:
        SteerError: an argument outside these ranges, or a token in two roles.

    >>> row = mqar(1, pairs=2, length=12, keys=range(1, 10), values=range(70, 100))[0]
    >>> int((row["labels"] != -100).sum())
    2
    """
    size, pairs = check_integer("size", size, 1), check_integer("pairs", pairs, 1)
    length = check_integer("length", length, 4 * pairs)
    power = check_number("power", power)
    of = {"keys": check_tokens("keys", keys, pairs), "values": check_tokens("values", values, pairs)}
    of["noise"] = check_tokens("noise", noise, 1)
    twice = [token for token, count in Counter(torch.cat(list(of.values())).tolist()).items() if count > 1]
    if twice:
        raise SteerError(f"`keys`, `values` and `noise` have no token in common; received {twice[0]} more than once.")
    random = generator(seed)
    bound = {name: of[name][_different(len(of[name]), size, pairs, random)] for name in ("keys", "values")}
    gaps = torch.arange(1, (length - 2 * pairs) // 2 + 1, dtype=torch.float32) ** (power - 1)
    queries = 2 * pairs + 2 * torch.multinomial(gaps.expand(size, -1), pairs, generator=random)
    ids = of["noise"][torch.randint(len(of["noise"]), (size, length), generator=random)]
    ids[:, 0 : 2 * pairs : 2], ids[:, 1 : 2 * pairs : 2] = bound["keys"], bound["values"]
    ids.scatter_(1, queries, bound["keys"]).scatter_(1, queries + 1, bound["values"])
    labels = torch.full_like(ids, IGNORE).scatter_(1, queries + 1, bound["values"])
    return TokenRows(input_ids=ids, labels=labels)


def _different(count: int, size: int, picks: int, random: torch.Generator) -> Tensor:
    """Draw `picks` different numbers below `count` for every row, `(size, picks)`: each order of each set alike."""
    drawn: list[Tensor] = []
    taken: list[Tensor] = []  # the same numbers, each row's in ascending order
    for left in range(count, count - picks, -1):
        new = torch.randint(left, (size,), generator=random)  # among those that are left, counted from the smallest
        for smaller in taken:
            new += new >= smaller
        drawn.append(new)
        for i, smaller in enumerate(taken):
            taken[i], new = torch.minimum(smaller, new), torch.maximum(smaller, new)
        taken.append(new)
    return torch.stack(drawn, dim=1)


@torch.no_grad()
def recall(model: nn.Module, loader: Iterable[Mapping[str, Any]]) -> float:
    """Return the share of labels that a causal language model predicts as its first choice, from 0 to 1.

    For rows of `mqar`, that is the share of queries that are answered. The model runs in evaluation mode on its own
    device; modes and random generators are left as they were.

    Args:
        model: maps `input_ids`, `(batch, length)`, to logits, `(batch, length, vocabulary)`, or an output that has them
            as `.logits`.
        loader: batches with `input_ids` and `labels`, `(batch, length)`, which are shifted here; -100 does not count.

    Raises:
        SteerError: a batch is not of this kind, or the loader has no label that counts.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    right = total = 0
    with as_before(model), apart():
        model.eval()
        for batch in loader:
            if not isinstance(batch, Mapping) or not {"input_ids", "labels"} <= set(batch):
                raise SteerError(f"`recall` takes dict batches with input_ids and labels; received {_kind(batch)}.")
            inputs = {name: value for name, value in to_device(batch, device).items() if name != "labels"}
            labels = batch["labels"][:, 1:].to(device)
            counts = labels != IGNORE
            output = model(**inputs)
            logits = output if isinstance(output, Tensor) else output.logits
            guesses = logits[:, :-1].argmax(-1)
            right += int((guesses == labels)[counts].sum())
            total += int(counts.sum())
    if not total:
        raise SteerError("the loader gave nothing to recall: no batch, or no label that counts.")
    return right / total


def _kind(batch: object) -> str:
    return f"the keys {', '.join(map(str, batch))}" if isinstance(batch, Mapping) else f"a {type(batch).__name__}"


def latent(
    size: int,
    *,
    task: int = 0,
    tokens: int = 16,
    latents: int = 8,
    noise: float = 1.0,
    width: int = 64,
    seed: int = 0,
) -> TensorDataset:
    r"""Return rows of a latent adaptation task: two classes, sequences of continuous tokens.

    The paper's table 2 (arXiv 2606.24396) has "latent adaptation tasks" with d = 64 and two classes, and does not say
    what they are. This is a definition of ours. Per row, u ~ N(0, I) has `latents` numbers. Token n is

        x_n = A_n u + noise · ε_n,    A_n fixed, its entries N(0, 1 / latents),  ε_n ~ N(0, I),

    so that each coordinate of the signal has variance 1 on average. The label is 1 where g(u) = w · tanh(V u + b)
    exceeds its median, else 0, with 32 hidden units, V of entries N(0, 9 / latents), b of N(0, 9) and w of N(0, 1):
    `task` picks V, b and w. All tasks share every A_n, and rows of the same `seed` have the same x whatever the task:
    what is to be learnt anew is the rule alone.

    Over tasks 0 to 19 with these defaults, the best possible accuracy is 95 to 97 % (measured on 4,000 rows: given x,
    u is Gaussian with known mean and covariance); from one token alone it is 82 to 88 %. The best linear function of u
    itself, without noise, reaches 76 to 90 %.

    Args:
        size: rows.
        task: which rule labels them, from 0.
        tokens: tokens of a row.
        latents: numbers in u.
        noise: standard deviation of ε against a signal of 1.
        width: numbers in a token.
        seed: of the rows, from 0 to 2^40 - 1; take another one for validation.

    Returns:
        Pairs of x, fp32 `(tokens, width)`, and a label, int64 `()`.

    Raises:
        SteerError: an argument outside these ranges.

    >>> x, y = latent(10)[0]
    >>> x.shape, y.dtype
    (torch.Size([16, 64]), torch.int64)
    """
    size, latents = check_integer("size", size, 1), check_integer("latents", latents, 1)
    noise = check_number("noise", noise)
    matrices = embedding(tokens=tokens, width=width, latents=latents)
    random = generator(seed, _ROWS)
    u = torch.randn(size, latents, generator=random)
    y = rule(u, task)
    x = torch.einsum("ndk,bk->bnd", matrices, u)
    x += noise * torch.randn(x.shape, generator=random)
    return TensorDataset(x, y)


def embedding(*, tokens: int = 16, width: int = 64, latents: int = 8) -> Tensor:
    """Return A of `latent`, fp32 `(tokens, width, latents)`: the same for all tasks and rows.

    Raises:
        SteerError: a number below 1.
    """
    shape = [check_integer(n, v, 1) for n, v in (("tokens", tokens), ("width", width), ("latents", latents))]
    return torch.randn(shape, generator=generator(0, _EMBEDDING)) / math.sqrt(latents)


def rule(u: Tensor, task: int) -> Tensor:
    """Return the label of latent vectors under a task: the oracle that knows what `latent` hides.

    Args:
        u: `(rows, latents)`.
        task: from 0.

    Returns:
        int64 `(rows,)`: 0 or 1.

    Raises:
        SteerError: `task` is no integer from 0.
    """
    random = generator(check_integer("task", task, 0), _RULES)
    latents = u.shape[-1]
    inner = torch.randn(_HIDDEN, latents, generator=random) * (_STEEPNESS / math.sqrt(latents))
    bias = torch.randn(_HIDDEN, generator=random) * _STEEPNESS
    outer = torch.randn(_HIDDEN, generator=random)
    census = torch.randn(_CENSUS, latents, generator=random)
    threshold = (torch.tanh(census @ inner.T + bias) @ outer).median()
    return (torch.tanh(u @ inner.T + bias) @ outer > threshold).long()
