"""What a study compares methods on, the methods it compares, and how large a method is to train as much as another."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from residual_steer import SteerError, baselines
from residual_steer.training import FitOptions
from residual_steer.training.losses import Loss

__all__ = ["Arm", "Problem", "adapted", "digest", "match_budget", "rates_around", "trainable"]

Score = Callable[[nn.Module, str, int], dict[str, float]]


@dataclass(frozen=True)
class Problem:
    """A frozen backbone and what it is to be adapted to.

    Raises:
        SteerError: `better` is another word, `steps` is below 1, or `fit` holds what it may not.
    """

    name: str  # as in tables
    # from a seed to a new copy of the backbone, its untrained parts, such as a new head, made from that seed
    fresh: Callable[[int], nn.Module]
    train: Callable[[int], Iterable[Any]]  # from a seed to a loader of training data, as `fit` takes it
    # from a model, a split, `"valid"` or `"test"`, and a seed to numbers by name. The learning rate is chosen on the
    # first split and the result is taken from the second
    score: Score
    metric: str  # which of these numbers counts
    better: str  # `"up"` if more of it is better, `"down"` if less
    steps: int  # optimizer steps, the same for every method
    # plain values that tell this problem from every other: sizes, seeds, a digest of the backbone's weights. With
    # equal ones a finished run is read back instead of made again, whatever code `fresh`, `train`, `score` and `loss`
    # have become: count up a version in it when they change
    identity: Mapping[str, Any]
    train_also: tuple[str, ...] = ()  # names of base modules that every method trains, such as a new classifier
    loss: Loss | None = None  # as in `fit`
    # other options of `fit`, plain values; not `seed` and `resume`, which are the study's
    fit: Mapping[str, Any] = field(default_factory=dict)
    # from a seed to the loader that the runs of the chosen learning rate train on, where that is another than
    # `train`: in VTAB-1k the validation images are trained on too, once they have chosen. Then what chooses is
    # measured on validation data alone, and what is reported on test data alone
    retrain: Callable[[int], Iterable[Any]] | None = None

    def __post_init__(self) -> None:
        if self.better not in ("up", "down"):
            raise SteerError(f"`better` is 'up' or 'down'; received {self.better!r}.")
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 1:
            raise SteerError(f"`steps` is a positive integer; received {self.steps!r}.")
        FitOptions.of(dict(self.fit))
        if self.fit.keys() & {"seed", "resume"}:
            raise SteerError(
                "`seed` and `resume` are no options of a problem: a study gives every run its seed, and keeps finished "
                f"runs in its ledger; received {', '.join(self.fit)}."
            )

    def worth(self, scores: Mapping[str, float] | None) -> float:
        """Return a number that is larger the better the scores are; -inf for a run that diverged or has none."""
        if scores is None:
            return -math.inf
        if self.metric not in scores:
            raise SteerError(f"`score` returns {self.metric!r} among its numbers; received {', '.join(scores)}.")
        value = scores[self.metric]
        if not math.isfinite(value):
            return -math.inf
        return value if self.better == "up" else -value


@dataclass(frozen=True)
class Arm:
    """One method of a study, with the learning rates that are tried.

    Raises:
        SteerError: no rate, two equal ones, or one that is not positive.
    """

    name: str  # as in tables
    method: str  # as `baselines.apply` takes it
    # peak learning rates; a fair study gives every arm as many. Of equally good ones the first is chosen
    rates: tuple[float, ...]
    options: Mapping[str, Any] = field(default_factory=dict)  # of the method
    change: Callable[[nn.Module], None] | None = None  # what else is done to the adapted model, known by its name

    def __post_init__(self) -> None:
        rates = tuple(self.rates)
        if not rates or len(set(rates)) < len(rates) or not all(map(_is_positive, rates)):
            raise SteerError(f"`rates` are one or more different positive numbers; received {self.rates!r}.")
        object.__setattr__(self, "rates", tuple(map(float, rates)))  # so that 1 and 1.0 are the same run


def _is_positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf


def rates_around(centre: float, count: int = 3, factor: float = 3.0) -> tuple[float, ...]:
    """Return `count` learning rates of three digits, each `factor` times the one before, around `centre`.

    >>> rates_around(1e-2)
    (0.00333, 0.01, 0.03)

    Raises:
        SteerError: `centre` is not positive, `count` is no integer from 1, or `factor` is not above 1.
    """
    if not (_is_positive(centre) and _is_positive(factor) and factor > 1 and type(count) is int and count > 0):
        raise SteerError(
            "learning rates are positive, at least one, and grow by a factor above 1; received "
            f"centre={centre!r}, count={count!r}, factor={factor!r}."
        )
    return tuple(float(f"{centre * factor ** (i - (count - 1) / 2):.3g}") for i in range(count))


def adapted(problem: Problem, arm: Arm, seed: int) -> nn.Module:
    """Return a fresh copy of a problem's backbone with a method applied, both made from `seed`."""
    model = problem.fresh(seed)
    torch.manual_seed(seed)
    model = baselines.apply(model, arm.method, train=problem.train_also, **arm.options)
    if arm.change is not None:
        arm.change(model)
    return model


def trainable(model: nn.Module) -> tuple[int, int]:
    """Return how many parameters of a model train, and how many it has."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(size for size, trains in sizes if trains), sum(size for size, _ in sizes)


def match_budget(
    problem: Problem, method: str, option: str | Callable[[int], dict[str, Any]], budget: int, **options: Any
) -> dict[str, Any]:
    """Choose a method's size so that it trains as close to `budget` parameters as can be.

    Every extra rank, or prompt token, costs the same number of parameters, so two counts give all others. Of two sizes
    that are equally near, it is either.

    Args:
        problem: the backbone.
        method: as `baselines.apply` takes it.
        option: the name of the option that sets its size, such as `"rank"` or `"tokens"`; or a function from a size to
            the options that set it.
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

    def sized(size: int) -> dict[str, Any]:
        return {**options, **(option(size) if callable(option) else {option: size})}

    def count(size: int) -> int:
        arm = Arm(method, method, (1.0,), sized(size))
        return trainable(adapted(problem, arm, 0))[0]

    one, two = count(1), count(2)
    if two <= one:
        raise SteerError(
            f"{method!r} trains {one:,} parameters whatever its {option!r} is; a budget cannot be matched."
        )
    size = max(1, 1 + round((budget - one) / (two - one)))
    if size > 2:
        count(size)  # what refuses such a size does so here, and not after hours of a study
    return sized(size)


def digest(model: nn.Module) -> str:
    """Return a digest, 16 hexadecimal digits, of every tensor in a model's state dict with its name, type and shape."""
    found = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if isinstance(tensor, Tensor):  # and no extra state of a module, which may be anything
            plain = tensor.detach().cpu().contiguous()
            found.update(f"{name} {plain.dtype} {tuple(plain.shape)};".encode())
            found.update(plain.view(-1).view(torch.uint8).numpy().data if plain.numel() else b"")
    return found.hexdigest()[:16]
