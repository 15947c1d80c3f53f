"""Learn one task after another: what is forgotten, and what does protection by null spaces cost?

    python -m experiments.continual

A frozen ViT learns the ten digits as five tasks of two classes, a frozen GPT-2 and a frozen Mamba, which know Python's
source, learn English prose and then the names of Unicode's characters. Each learns them with one field that nothing
protects; with one field whose updates are projected onto the null space of what entered it in earlier tasks (eq. 6);
and with a field for every task. The backbones are kept in
~/.cache/residual-steer; no network, no GPU.
"""

from __future__ import annotations

import argparse
import copy
import functools
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

import residual_steer as rs
from residual_steer.continual import NullSpace
from residual_steer.data import ByteBlocks, character_names, digits, english_prose
from residual_steer.errors import DivergedError
from residual_steer.training import evaluate, progress

from .backbones import LENGTH, get_backbone, some, with_new_head
from .harness import LOST, Experiment, Found, parser_of, run
from .ledger import Ledger
from .paired import difference
from .problem import digest
from .results import Axis, Column, Matrix, Measured, Table, Verdict

EXPERIMENT = Experiment(
    name="continual",
    title="One task after another",
    about="A ViT pre-trained on the digits 0–4 learns all digits as five tasks of two classes, each with its own two "
    "rows of the head. A GPT-2 and a Mamba pre-trained on Python's source learn English prose, then the names of "
    "Unicode's characters. Forgotten is what a task has lost since it was learned, averaged over all tasks but the "
    "last; learned is what all but the first, which every way learns alike, reached right after they were trained on.",
    seeds=5,
)
VERSION = 1  # raise it when the code below changes what a run gives
RANK, BATCH = 16, 16
ENERGIES = (0.99, 0.999)
DEFAULT = 0.999  # of NullSpace, on which the verdict is


@dataclass(frozen=True)
class Lesson:
    """One task of a course."""

    name: str  # as in tables
    train: Callable[[], DataLoader[Any]]  # gives a loader of training data
    score: Callable[[nn.Module], float]  # what a model reaches on its test data
    loss: Callable[[nn.Module, Any], Tensor] | None = None  # as in `fit`


@dataclass(frozen=True)
class Course:
    """A backbone and the tasks that it learns, in this order."""

    name: str  # of the backbone
    fresh: Callable[[int], nn.Module]  # from a seed to the model
    lessons: Sequence[Lesson]  # the tasks
    head: tuple[str, ...]  # what trains with a field
    unit: str  # of the scores
    better: str  # `"up"` or `"down"`
    rate: float  # peak learning rate, the same with and without protection
    steps: int  # of each task
    seeds: int  # how many at most; text differs little between them


@dataclass(frozen=True)
class Way:
    """How tasks are learned one after another."""

    name: str  # as in tables
    energy: float | None = None  # that a null space protects; None protects nothing
    apart: bool = False  # whether each task gets a field of its own


WAYS = [
    Way("no protection"),
    *[Way(f"null space, energy {energy:g}", energy) for energy in ENERGIES],
    Way("a field per task", apart=True),
]


def digit_course(cache: Path, quick: bool) -> Course:
    """Five tasks of two digits on the ViT."""
    backbone = get_backbone("ViT", cache, quick)

    def fresh(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return with_new_head(backbone, classes=10)

    lessons = [digit_lesson(first) for first in range(0, 10, 2)]
    return Course("ViT", fresh, lessons, ("head",), "accuracy (%)", "up", 1e-2, 4 if quick else 50, seeds=5)


def digit_lesson(first: int) -> Lesson:
    """Tell a digit from the next, by their two rows of the head."""
    pair = (first, first + 1)
    train, test = digits(pair, "train"), digits(pair, "test")

    def logits(model: nn.Module, x: Tensor) -> Tensor:
        return model(x)[:, list(pair)]

    def loss(model: nn.Module, batch: Any) -> Tensor:
        x, y = batch
        return F.cross_entropy(logits(model, x), y)

    @torch.no_grad()
    def score(model: nn.Module) -> float:
        x, y = test.tensors
        model.eval()
        return 100 * float((logits(model, x).argmax(-1) == y).double().mean())

    return Lesson(
        f"{first}, {first + 1}",
        lambda: DataLoader(train, batch_size=4 * BATCH, shuffle=True),
        score,
        loss,
    )


def text_course(name: str, cache: Path, quick: bool) -> Course:
    """Prose, then names, on a language model."""
    backbone = get_backbone(name, cache, quick)
    lessons = [text_lesson("prose", english_prose()), text_lesson("names", character_names())]
    steps = 4 if quick else 40
    return Course(
        name, lambda seed: copy.deepcopy(backbone), lessons, (), "bits per byte", "down", 1e-2, steps, seeds=3
    )


def text_lesson(name: str, text: bytes) -> Lesson:
    """Predict the next byte of a text."""
    windows, held_out = ByteBlocks(text, LENGTH, "train"), some(ByteBlocks(text, LENGTH, "valid"), 128)

    def score(model: nn.Module) -> float:
        return evaluate(model, DataLoader(held_out, batch_size=64))["loss"] / math.log(2)

    def train() -> DataLoader[Any]:
        return DataLoader(windows, batch_size=BATCH, shuffle=True)

    return Lesson(name, train, score)


def steered(course: Course, seed: int) -> nn.Module:
    """Return the model with a field that has learned the first task, as every way begins."""
    model = course.fresh(seed)
    torch.manual_seed(seed)
    rs.steer(model, rank=RANK, name="1", train=course.head)
    learn(model, course, 0, seed)
    return model


def learn(model: nn.Module, course: Course, index: int, seed: int, space: NullSpace | None = None) -> None:
    """Train on one task."""
    lesson = course.lessons[index]
    options: dict[str, Any] = {"seed": seed, "progress": False, "weight_decay": 0.0 if course.head else 0.01}
    rs.fit(model, lesson.train(), steps=course.steps, lr=course.rate, loss=lesson.loss, protect=space, **options)


def seen(course: Course, index: int, quick: bool) -> list[Any]:
    """Return batches of a task's training data, at most 2,048 windows of text, for its null space."""
    loader = course.lessons[index].train()
    return [batch for batch, _ in zip(loader, range(2 if quick else 128), strict=False)]


def walk(model: nn.Module, course: Course, way: Way, seed: int, quick: bool) -> dict[str, Any]:
    """Learn the other tasks; return every score after every task, and what was stored."""
    matrix = [scores(model, course, way, 0)]
    space = None if way.energy is None else NullSpace(model, energy=way.energy)
    for index in range(1, len(course.lessons)):
        if space is not None:
            torch.manual_seed(seed)
            space.observe(seen(course, index - 1, quick))
        if way.apart:
            torch.manual_seed(seed)
            rs.steer(model, rank=RANK, name=str(index + 1), train=course.head)
        learn(model, course, index, seed, space)
        matrix.append(scores(model, course, way, index))
    return {"matrix": matrix, "kept": kept(model), "held": held(space), "room": None if space is None else room(space)}


def kept(model: nn.Module) -> int:
    """Return how many bytes the fields take, with the heads that belong to them."""
    return sum(p.numel() * p.element_size() for field in rs.fields(model) for p in rs.parameters(model, field.name))


def held(space: NullSpace | None) -> int:
    """Return how many bytes must be kept besides, to go on learning."""
    points = () if space is None else space.state_dict()["points"].values()
    tensors = [point[name] for point in points for name in ("basis", "response")]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def scores(model: nn.Module, course: Course, way: Way, last: int) -> list[float]:
    """Return what the model reaches on every task that it has learned."""
    found = []
    for index, lesson in enumerate(course.lessons[: last + 1]):
        with rs.use(model, str(index + 1) if way.apart else "1"):
            found.append(lesson.score(model))
    return found


def room(space: NullSpace) -> float:
    """Return which share of the dimensions of what enters the fields is left to later tasks, in per cent."""
    inputs = sum(row["inputs"] for row in space.report().rows)
    return 100 * sum(space.left.values()) / inputs


def forgotten(course: Course, matrix: Sequence[Sequence[float]]) -> float:
    """Return what the tasks but the last have lost since they were learned, on average."""
    sign = 1 if course.better == "up" else -1
    lost = [sign * (row[-1] - last) for row, last in zip(matrix[:-1], matrix[-1], strict=False)]
    return sum(lost) / len(lost)


def learned(matrix: Sequence[Sequence[float]]) -> float:
    """Return what each task reached right after it was trained on, on average over all but the first."""
    return sum(row[-1] for row in matrix[1:]) / len(matrix[1:])


Runs = Mapping[str, Sequence[Mapping[str, Any]]]  # by way, a record for every seed


def runs_of(course: Course, options: argparse.Namespace, ledger: Ledger) -> Runs:
    """Return the records of every way and seed, from the ledger where they are there."""
    identity = {"backbone": digest(course.fresh(0)), "steps": course.steps, "rate": course.rate, "rank": RANK}
    identity |= {"version": VERSION, "course": [lesson.name for lesson in course.lessons], "torch": torch.__version__}
    found: dict[str, list[dict[str, Any]]] = {way.name: [] for way in WAYS}
    seeds = range(min(options.seeds, course.seeds))
    with progress(total=len(WAYS) * len(seeds), unit="run", desc=course.name) as bar:
        for seed in seeds:
            first = functools.cache(functools.partial(steered, course, seed))
            for way in WAYS:

                def make(way: Way = way, seed: int = seed, first: Callable[[], nn.Module] = first) -> dict[str, Any]:
                    started = time.perf_counter()
                    try:
                        record = walk(copy.deepcopy(first()), course, way, seed, options.quick)
                    except DivergedError:
                        record = lost(course)
                    return {**record, "seconds": time.perf_counter() - started}

                key = {**identity, "energy": way.energy, "apart": way.apart, "seed": seed}
                found[way.name].append(ledger.get_or(key, make))
                bar.update()
    return found


def lost(course: Course) -> dict[str, Any]:
    """Return the record of a run that diverged."""
    matrix = [[math.nan] * (index + 1) for index in range(len(course.lessons))]
    return {"matrix": matrix, "kept": math.nan, "held": math.nan, "room": math.nan}


def table_of(course: Course, runs: Runs) -> Table:
    """Return what every way learned and forgot."""
    digit = 1 if course.better == "up" else 3
    columns = (
        Column("way", "way"),
        Column("learned", "learned", course.unit, course.better, digit),
        Column("forgotten", "forgotten", "points" if course.better == "up" else "bits per byte", "down", digit),
        Column("final", "all tasks at the end", course.unit, course.better, digit),
        Column("room", "dimensions left", "%", digits=1),
        Column("kept", "fields and heads", "kB", digits=0),
        Column("held", "to go on learning", "kB", digits=0),
    )
    rows = []
    for name, records in runs.items():
        matrices = [record["matrix"] for record in records]
        rooms = [record["room"] for record in records if record["room"] is not None]
        rows.append(
            {
                "way": name,
                "learned": over_seeds([learned(matrix) for matrix in matrices]),
                "forgotten": over_seeds([forgotten(course, matrix) for matrix in matrices]),
                "final": over_seeds([fmean(matrix[-1]) for matrix in matrices]),
                "room": over_seeds(rooms),
                "kept": over_seeds([record["kept"] / 1000 for record in records]),
                "held": over_seeds([record["held"] / 1000 for record in records]),
            }
        )
    names = " → ".join(lesson.name for lesson in course.lessons)
    note = (
        f"Tasks: {names}; {course.steps} steps each, rank {RANK}, learning rate {course.rate:g}. Learned: right after "
        "training, all tasks but the first, which every way learns alike. To go on learning, a null space keeps more."
    )
    return Table(f"{course.name}, one task after another", columns, tuple(rows), (note,))


def over_seeds(values: Sequence[float]) -> Measured | None:
    """Return mean and spread; None where there are none, or a run diverged."""
    return Measured.of(values) if values and all(map(math.isfinite, values)) else None


def picture(course: Course, name: str, records: Sequence[Mapping[str, Any]]) -> Matrix:
    """Draw what each task is at after each, the mean over the seeds."""
    names = tuple(lesson.name for lesson in course.lessons)
    count = len(names)

    def mean(row: int, column: int) -> float | None:
        return sum(r["matrix"][row][column] for r in records) / len(records) if column <= row else None

    values = tuple(tuple(mean(row, column) for column in range(count)) for row in range(count))
    title = f"{course.name}: {name}"
    return Matrix(title, Axis("measured on"), Axis("after training on"), Axis(course.unit), names, names, values)


def verdict(found: Sequence[tuple[Course, Runs]]) -> Verdict:
    """Judge claim 8 by what is forgotten with the default protection and with none, on the same seeds."""
    said, kept_more, intact, tested = [], [], [], []
    shielded = f"null space, energy {DEFAULT:g}"
    for course, runs in found:
        gone = {name: [forgotten(course, record["matrix"]) for record in records] for name, records in runs.items()}
        bare, kept = gone["no protection"], gone[shielded]
        if not all(map(math.isfinite, [*bare, *kept])):
            said.append(f"{course.name}: {LOST}")
            tested.append(False)
            continue
        change = difference(kept, bare)
        tested.append(difference(bare, [0.0] * len(bare)).sign == 1)  # else there is nothing to protect from
        kept_more.append(change.sign == -1)
        intact.append(fmean(kept) <= 0.1 * fmean(bare))
        unit = "points" if course.better == "up" else "bits per byte"
        after = [[learned(record["matrix"]) for record in runs[name]] for name in (shielded, "no protection")]
        said.append(
            f"{course.name} forgets {fmean(kept):.3g} {unit} instead of {fmean(bare):.3g} (difference {change}) "
            f"and reaches {fmean(after[0]):.3g} instead of {fmean(after[1]):.3g} on what it learns later"
        )
    if not all(tested):
        word = "can't be tested here"
    else:
        word = "holds" if all(kept_more) and all(intact) else "partly holds" if any(kept_more) else "does not hold"
    return Verdict(
        8,
        word,
        "no numbers",
        f"With {DEFAULT:g} of the energy protected, {'; '.join(said)}. To hold, no more than a tenth of what is "
        "forgotten without may be forgotten with it.",
        "python -m experiments.continual",
    )


def study(options: argparse.Namespace, ledger: Ledger) -> Found:
    """Walk through every course in every way."""
    courses = [
        digit_course(options.cache, options.quick),
        *[text_course(name, options.cache, options.quick) for name in ("GPT-2", "Mamba")],
    ]
    found = [(course, runs_of(course, options, ledger)) for course in courses]
    return Found(
        tables=[table_of(*one) for one in found],
        plots=[
            picture(course, name, runs[name])
            for course, runs in found
            for name in ("no protection", f"null space, energy {DEFAULT:g}", "a field per task")
        ],
        verdicts=[verdict(found)],
        settings={"rank": RANK, "energies": ENERGIES, "steps": {course.name: course.steps for course, _ in found}},
        records={course.name: runs for course, runs in found},
        seconds=sum(record["seconds"] for _, runs in found for records in runs.values() for record in records),
    )


def main(arguments: list[str] | None = None) -> int:
    """Run the experiment; return the exit status."""
    return run(EXPERIMENT, parser_of(EXPERIMENT, cache=True).parse_args(arguments), study)


if __name__ == "__main__":
    sys.exit(main())
