"""Parameter budgets: how large a method's size option must be to train as many parameters as another method."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from residual_steer import baselines
from residual_steer.errors import SteerError

from .problem import Arm, Problem

__all__ = ["adapted", "match_budget", "trainable"]


def adapted(problem: Problem, arm: Arm, seed: int) -> nn.Module:
    """Return a fresh copy of a problem's backbone with a method applied, both made from `seed`.

    Raises:
        UnsuitableError: the method makes no sense on it.
    """
    model = problem.fresh(seed)
    torch.manual_seed(seed)
    return baselines.apply(model, arm.method, train=problem.train_also, **arm.options)


def trainable(model: nn.Module) -> tuple[int, int]:
    """Return how many parameters of a model train, and how many it has."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(size for size, trains in sizes if trains), sum(size for size, _ in sizes)


def match_budget(problem: Problem, method: str, option: str, budget: int, **options: Any) -> dict[str, Any]:
    """Choose a method's size so that it trains as close to `budget` parameters as can be.

    Every extra rank, or prompt token, costs the same number of parameters, so two counts give all others. Of two sizes
    that are equally near, it is either.

    Args:
        problem: the backbone.
        method: as `baselines.apply` takes it.
        option: the name of the option that sets its size, such as `"rank"` or `"tokens"`.
        budget: wanted number of trainable parameters, those of `problem.train_also` included.
        **options: the method's other options.

    Returns:
        The method's options, that of its size among them: at least 1.

    Raises:
        SteerError: `budget` is no positive integer; the option does not change how many parameters train; or the method
            refuses the size, such as a rank above the width.
        UnsuitableError: the method makes no sense on the backbone.
    """
    if isinstance(budget, bool) or not isinstance(budget, int) or budget < 1:
        raise SteerError(f"`budget` is a positive number of parameters; received {budget!r}.")

    def count(size: int) -> int:
        arm = Arm(method, method, (1.0,), {**options, option: size})
        return trainable(adapted(problem, arm, 0))[0]

    one, two = count(1), count(2)
    if two <= one:
        raise SteerError(
            f"{method!r} trains {one:,} parameters whatever its {option!r} is; a budget cannot be matched."
        )
    size = max(1, 1 + round((budget - one) / (two - one)))
    if size > 2:
        count(size)  # what refuses such a size does so here, and not after hours of a study
    return {**options, option: size}
