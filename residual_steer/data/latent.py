"""A family of classification tasks over one latent vector: our definition of the paper's "latent adaptation tasks"."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from residual_steer.data.checks import check_integer, check_number, generator

__all__ = ["embedding", "latent", "rule"]

_ROWS, _EMBEDDING, _RULES = 0, 1, 2  # streams of random numbers
_HIDDEN = 32
_STEEPNESS = 3.0  # with less of it, the rules are nearly linear
_CENSUS = 2**16  # latent vectors over which the threshold of a rule is the median


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
