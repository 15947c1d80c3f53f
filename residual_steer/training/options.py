"""The settings of a run that most users leave alone."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn
from torch.optim import Optimizer

from residual_steer._checks import check_choice, check_flag, check_integer, check_number, check_options
from residual_steer.errors import SteerError


@runtime_checkable
class Protector(Protocol):
    """What keeps an optimizer from some directions, such as `residual_steer.continual.NullSpace`."""

    def protect(self, optimizer: Optimizer) -> Any:
        """Correct every step of an optimizer, until `remove()` of what this returns."""

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and plain values, for a checkpoint."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` returned."""


# From the model, the data, a function from a batch to its loss, the options and the processes to a cache, such as
# `residual_steer.prefix_cache.PrefixCache`. The package that knows the models puts it here: this one does not.
cache_makers: list[Callable[[nn.Module, Any, Callable[[Any], Tensor], FitOptions, Any], Any]] = []

_NO_FOLDER = ("", "yes", "no", "on", "off")  # which YAML 1.1 takes for True and False
_MAY_BE_NONE = {"clip", "precision", "eval_every", "checkpoint_every", "seed"}
_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "weight_decay": partial(check_number, at_least=0),
    "warmup": partial(check_number, at_least=0),
    "schedule": partial(check_choice, choices=("cosine", "constant")),
    "accumulate": partial(check_integer, at_least=1),
    "clip": partial(check_number, above=0, meaning="or None never to clip"),
    "precision": partial(check_choice, choices=("no", "bf16", "fp16"), meaning="or None"),
    "eval_every": partial(check_integer, at_least=1, meaning="or None"),
    "checkpoint_every": partial(check_integer, at_least=1, meaning="or None"),
    "log_every": partial(check_integer, at_least=1),
    "seed": partial(check_integer, at_least=0, at_most=2**32 - 1, meaning="or None"),
    "resume": check_flag,
    "cache_limit": partial(check_number, at_least=0),
}


@dataclass(frozen=True)
class FitOptions:
    """What `fit` takes beside model, data, steps and learning rate.

    Attributes:
        weight_decay: decoupled weight decay of AdamW (Loshchilov and Hutter, arXiv 1711.05101).
        warmup: steps over which the learning rate rises linearly from 0; a fraction of all steps if below 1.
        schedule: `"cosine"` falls to 0 at the last step, `"constant"` stays.
        accumulate: batches for one step, which is the step of one batch with all their rows.
        clip: largest norm of the gradient; None never clips.
        precision: `"no"`, `"bf16"` or `"fp16"` autocast, of the loss too; None takes what accelerate was told. A step
            whose gradient overflows in fp16 is repeated at a smaller scale.
        eval_every: steps between evaluations on `valid`; None evaluates at the end only.
        checkpoint_every: steps between checkpoints in `save_to`; None writes ten in a run.
        log_every: steps between records.
        seed: of the data order, dropout and all else that is random; None leaves the generators alone.
        resume: go on from the newest checkpoint in `save_to`, if there is one.
        cache_prefix: compute the blocks below the first one that trains once, in the first epoch, and keep what leaves
            them, and what the next block computes where only a field beside it trains, row by row: in memory if True,
            or in a folder that later runs with the same frozen weights, data and precision read too. The losses stay
            the same to rounding; what would change them is refused.
        cache_limit: largest size of that for every process, in GiB; they lend each other rows.
        protect: a `continual.NullSpace`, or another `Protector`: it corrects the optimizer's steps for as long as the
            run goes on, is saved with its checkpoints, and comes back from them.
        trackers: accelerate's trackers, by name: "tensorboard", "trackio", "wandb", "mlflow", …. Their project is
            `residual-steer`, and a run is called as the folder `save_to`; TensorBoard's files lie in its `logs`.
        progress: show a progress bar, or in a log a line every few seconds.

    Raises:
        SteerError: a value outside its range.
    """

    weight_decay: float = 0.01
    warmup: float = 0.05
    schedule: str = "cosine"
    accumulate: int = 1
    clip: float | None = 1.0
    precision: str | None = None
    eval_every: int | None = None
    checkpoint_every: int | None = None
    log_every: int = 10
    seed: int | None = 0
    resume: bool = False
    cache_prefix: bool | str | os.PathLike[str] = False
    cache_limit: float = 4.0
    protect: Protector | None = None
    trackers: Sequence[str] = ()
    progress: bool = True

    def __post_init__(self) -> None:
        for name, check in _CHECKS.items():
            value = getattr(self, name)
            if value is not None or name not in _MAY_BE_NONE:
                object.__setattr__(self, name, check(name, value))
        if not isinstance(self.cache_prefix, (bool, str, os.PathLike)) or self.cache_prefix in _NO_FOLDER:
            raise SteerError(f"`cache_prefix` is True, False or a folder; received {self.cache_prefix!r}.")
        if self.protect is not None and (isinstance(self.protect, type) or not isinstance(self.protect, Protector)):
            raise SteerError(f"`protect` is a residual_steer.continual.NullSpace or None; received {self.protect!r}.")
        if isinstance(self.trackers, str) or not all(isinstance(name, str) for name in self.trackers):
            raise SteerError(f"`trackers` is a list of names; received {self.trackers!r}.")

    @classmethod
    def of(cls, options: dict[str, Any]) -> FitOptions:
        """Make options from keywords; raise if there is no such option."""
        check_options("fit", options, (field.name for field in dataclasses.fields(cls)))
        return cls(**options)

    def factor(self, step: int, steps: int) -> float:
        """Return what the learning rate is multiplied by at `step`, counted from 0, of `steps`."""
        warmup = round(self.warmup * steps) if self.warmup < 1 else int(self.warmup)
        if step < warmup:
            return (step + 1) / (warmup + 1)
        if self.schedule == "constant":
            return 1.0
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
