"""A fair comparison: for every method the same steps, a learning-rate sweep of the same size, the same seeds.

Each rate is tried with the first seed; the one that is best on validation data is used with all seeds, and what is
reported is measured on test data that chose nothing. A problem may give the runs that are reported other training data.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import nn

from benchmarks.environment import versions
from residual_steer import baselines
from residual_steer.errors import DivergedError, SteerError, UnsuitableError
from residual_steer.training import fit
from residual_steer.training import progress as progress_bar

from .ledger import Ledger
from .problem import Arm, Problem, adapted, trainable

__all__ = ["Entry", "Run", "every_run", "sweep", "widened"]


@dataclass(frozen=True)
class Run:
    """One training."""

    rate: float  # its peak learning rate
    seed: int  # of the model's new parts, the method's weights and the data's order
    # scores on validation data; None if the run diverged, its loss, gradient or parameters having become NaN or
    # infinite, or if it trained on them too
    valid: dict[str, float] | None
    test: dict[str, float] | None  # scores on test data; None if it diverged, or only chose a learning rate for others
    # the same after LoRA was folded into the weights; None likewise, and for other methods
    merged: dict[str, float] | None
    trainable: int  # number of parameters that trained
    total: int  # number of all parameters, the method's included
    seconds_per_step: float | None  # median wall-clock seconds of a step; None if it diverged
    seconds: float  # wall-clock time of the whole, scoring included


@dataclass(frozen=True)
class Entry:
    """One method on one problem."""

    arm: Arm  # the method
    # the learning rate that was best on validation data, the first of equals; None if all diverged, or the method was
    # refused
    rate: float | None
    trials: tuple[Run, ...]  # one run for every rate, with the first seed
    # one run for every seed, with that rate, in the order of the seeds; the first is among the trials if the training
    # data are the same
    runs: tuple[Run, ...]
    refused: str = ""  # why the method makes no sense on this backbone; empty if it does

    @property
    def every(self) -> tuple[Run, ...]:
        """All runs, those that chose the learning rate first, none twice."""
        return (*self.trials, *(run for run in self.runs if run not in self.trials))

    @property
    def at_edge(self) -> bool:
        """Return whether the best of three or more rates was the lowest or highest, so that a better may lie beyond."""
        return (
            self.rate is not None
            and len(self.arm.rates) > 2
            and self.rate in (min(self.arm.rates), max(self.arm.rates))
        )

    def results(self, metric: str, *, merged: bool = False) -> list[float]:
        """Return a number for every seed, measured on test data: NaN for one that diverged, so that pairs stay pairs.

        None are returned for a method that was refused, or diverged at every rate; nor, of `merged`, but for LoRA.

        Raises:
            SteerError: there is no such score.
        """
        if merged and self.arm.method != "lora":
            return []
        found = [run.merged if merged else run.test for run in self.runs]
        for scores in found:
            if scores is not None and metric not in scores:
                raise SteerError(f"a score is one of {', '.join(scores)}; received {metric!r}.")
        return [math.nan if scores is None else scores[metric] for scores in found]


def sweep(
    problem: Problem, arms: Sequence[Arm], seeds: Sequence[int], ledger: Ledger | None = None, *, progress: bool = True
) -> list[Entry]:
    """Compare methods on a problem.

    Args:
        problem: what they are compared on.
        arms: the methods, with different names. One that makes no sense on the backbone trains nothing, and its entry
            says why.
        seeds: at least one; three or more give a spread.
        ledger: where finished runs are kept and found.
        progress: whether to show a bar.

    Returns:
        An entry for every arm, in their order.

    Raises:
        SteerError: no arm, two of the same name; seeds that are no integers from 0, or not different; or what `apply`
            and `fit` raise, but for a divergence, which is a result.
    """
    names = [arm.name for arm in arms]
    if not names or len(set(names)) < len(names):
        raise SteerError(f"arms are one or more of different names; received {names}.")
    if not all(type(seed) is int and 0 <= seed < 2**32 for seed in seeds) or not 0 < len(seeds) == len(set(seeds)):
        raise SteerError(f"seeds are one or more different integers from 0 to 2**32 - 1; received {list(seeds)}.")
    ledger = Ledger() if ledger is None else ledger
    total = sum(_count(problem, arm, seeds) for arm in arms)
    with progress_bar(total=total, unit="run", desc=problem.name, disable=not progress) as bar:
        return [_compare(problem, arm, seeds, ledger, bar) for arm in arms]


def widened(
    problem: Problem,
    arms: Sequence[Arm],
    seeds: Sequence[int],
    ledger: Ledger,
    *,
    finalists: Callable[[Sequence[Entry]], Iterable[str]],
    times: int = 3,
) -> list[Entry]:
    """Compare methods as `sweep` does; a sweep whose best rate lies at an edge gets one more on that side.

    So the best of every method has a worse one on both sides, and each gets what it needs by the same rule. Where all
    seeds together do worse than the first one promised, the next best rate is tried with all of them too.

    Args:
        problem: what they are compared on.
        arms: the methods.
        seeds: as in `sweep`.
        ledger: where finished runs are kept and found.
        finalists: from what the first seed gave to the names of the arms that get the other seeds.
        times: how many rates a sweep is given at most.

    Raises:
        SteerError: what `sweep` raises.
    """
    found = sweep(problem, arms, seeds[:1], ledger)
    for _ in range(times):
        if not any(entry.at_edge for entry in found):
            break
        found = sweep(problem, [_beyond(entry) if entry.at_edge else entry.arm for entry in found], seeds[:1], ledger)
    last = set(finalists(found))
    return [_settled(problem, one, seeds, ledger) if one.arm.name in last else one for one in found]


def _settled(problem: Problem, entry: Entry, seeds: Sequence[int], ledger: Ledger) -> Entry:
    """Return an entry with all seeds, at the rate whose mean over them is best: a seed may like what others cannot."""
    best, most = entry, -math.inf
    for trial in sorted(entry.trials, key=lambda trial: problem.worth(trial.valid), reverse=True):
        promised = problem.worth(trial.valid)
        if promised == -math.inf or most >= promised:
            break
        (found,) = sweep(problem, [replace(entry.arm, rates=(trial.rate,))], seeds, ledger, progress=False)
        measured = [problem.worth(run.valid) for run in found.runs] if problem.retrain is None else [promised]
        mean = sum(measured) / len(measured)
        if best is entry or mean > most:
            best, most = Entry(entry.arm, trial.rate, entry.trials, found.runs), mean
    return best


def _beyond(entry: Entry) -> Arm:
    """Return an arm with one more rate beyond the edge at which its best lies."""
    rates = sorted(entry.arm.rates)
    low = entry.rate == rates[0]
    new = float(f"{rates[0] / 3 if low else rates[-1] * 3:.3g}")
    return replace(entry.arm, rates=(new, *rates) if low else (*rates, new))


def every_run(entries: Iterable[Entry]) -> list[Run]:
    """Return all runs of a study."""
    return [run for entry in entries for run in entry.every]


def _compare(problem: Problem, arm: Arm, seeds: Sequence[int], ledger: Ledger, bar: Any) -> Entry:
    bar.set_postfix_str(arm.name)

    def run(part: _Part, rate: float, seed: int) -> Run:
        key = _key(problem, arm, part, rate, seed)
        found = Run(**ledger.get_or(key, lambda: asdict(_train(problem, arm, part, rate, seed))))
        bar.update()
        return found

    first, last = _parts(problem)
    try:
        trials = tuple(run(first, rate, seeds[0]) for rate in arm.rates)
    except UnsuitableError as error:
        bar.update(_count(problem, arm, seeds))
        return Entry(arm, None, (), (), str(error))
    best = max(trials, key=lambda trial: problem.worth(trial.valid))
    if problem.worth(best.valid) == -math.inf:
        bar.update(_count(problem, arm, seeds) - len(trials))
        return Entry(arm, None, trials, ())
    done = (best,) if first is last else ()
    return Entry(arm, best.rate, trials, (*done, *(run(last, best.rate, seed) for seed in seeds[len(done) :])))


@dataclass(frozen=True)
class _Part:
    """What the runs of one part of a sweep train on and are measured on."""

    name: str  # in the ledger; empty where all runs are alike
    train: Callable[[int], Iterable[Any]]  # from a seed to a loader
    measured: tuple[str, ...]  # the splits


def _parts(problem: Problem) -> tuple[_Part, _Part]:
    """Return the part that chooses a learning rate and the part that is reported; the same where `retrain` is None."""
    if problem.retrain is None:
        one = _Part("", problem.train, ("valid", "test"))
        return one, one
    return _Part("choosing", problem.train, ("valid",)), _Part("reported", problem.retrain, ("test",))


def _count(problem: Problem, arm: Arm, seeds: Sequence[int]) -> int:
    """Return how many runs an arm takes."""
    return len(arm.rates) + len(seeds) - (problem.retrain is None)


def _train(problem: Problem, arm: Arm, part: _Part, rate: float, seed: int) -> Run:
    started = time.perf_counter()
    model = adapted(problem, arm, seed)
    trains, total = trainable(model)
    step = _fit(problem, part, model, rate, seed)
    scores: dict[str, dict[str, float]] = {}
    merged = None
    if step is not None:
        scores = {split: _scores(problem, model, split, seed) for split in part.measured}
        if arm.method == "lora" and "test" in scores:
            merged = _scores(problem, baselines.merge(model), "test", seed)
    seconds = time.perf_counter() - started
    return Run(rate, seed, scores.get("valid"), scores.get("test"), merged, trains, total, step, seconds)


def _fit(problem: Problem, part: _Part, model: nn.Module, rate: float, seed: int) -> float | None:
    """Train a model; return the seconds of a step, or None if it diverged."""
    options = {"progress": False, "log_every": 1, **problem.fit, "seed": seed}
    try:
        history = fit(model, part.train(seed), steps=problem.steps, lr=rate, loss=problem.loss, **options)
    except DivergedError:
        return None
    trained = (p for p in model.parameters() if p.requires_grad)  # of what the last step did to them, no loss has told
    return history.seconds_per_step if all(bool(p.isfinite().all()) for p in trained) else None


def _scores(problem: Problem, model: nn.Module, split: str, seed: int) -> dict[str, float]:
    scores = {name: float(value) for name, value in problem.score(model, split, seed).items()}
    problem.worth(scores)  # a score that lacks the metric is no result to keep
    return scores


def _key(problem: Problem, arm: Arm, part: _Part, rate: float, seed: int) -> dict[str, Any]:
    """Return all that a run depends on."""
    return {
        **({"part": part.name} if part.name else {}),
        "problem": problem.name,
        "identity": dict(problem.identity),
        "steps": problem.steps,
        "fit": dict(problem.fit),
        "train_also": problem.train_also,
        "method": arm.method,
        "options": dict(arm.options),
        **({} if arm.change is None else {"change": arm.change.__name__}),
        "rate": rate,
        "seed": seed,
        "versions": {name: found for name, found in versions(["residual-steer"]).items() if name != "python"},
    }
