"""Results as experiments would write them, of eight methods, for the tests of the report."""

import math
import random

from residual_steer.report import Axis, Column, Measured, Plot, Result, Series, Table, Verdict

LOSS = {
    "H-Res": 3.18,
    "LoRA": 3.22,
    "LoRA, merged": 3.22,
    "prompts": 3.61,
    "full fine-tuning": 3.10,
    "linear probe": 3.70,
    "frozen": 4.20,
    "AdaptFormer": 3.19,
}
SPEED = dict(zip(LOSS, (412, 371, 430, 395, 431, 429, 431, 409), strict=True))
METHODS = tuple(LOSS)


def result(**changes):
    """A small result with something of everything."""
    plot = Plot("Loss", "lines", Axis("steps"), Axis("loss", "nats", True), (Series("H-Res", (1, 2), (2.5, None)),))
    table = Table(
        "Recall",
        (Column("method", "method"), Column("accuracy", "accuracy", "%", "up", 2)),
        ({"method": "H-Res", "accuracy": Measured.of([82.1, 82.4])}, {"method": "LoRA", "accuracy": None}),
        ("A note.",),
    )
    fields = {
        "name": "recall",
        "title": "Associative recall",
        "about": "Key and value pairs.\n\nFour of them.",
        "command": "python -m residual_steer.recall --steps 5",
        "seeds": (0, 1, 2),
        "settings": {"steps": 5, "rates": {"H-Res": 0.02}},
        "machine": {"cpu": "a CPU", "gpu": None},
        "versions": {"python": "3.11"},
        "tables": (table,),
        "plots": (plot,),
        "verdicts": (Verdict(1, "holds", "3.78", "1.2 ± 0.1", "python -m residual_steer.recall", "SQuAD"),),
        "seconds": 1.5,
        "records": [{"seed": 0, "losses": [2.5, 1.0]}],
    }
    return Result(**{**fields, **changes})


def measured(rng, middle, spread, count=5):
    return Measured.of([rng.gauss(middle, spread) for _ in range(count)])


def tradeoff(seed=0):
    """Quality against speed: the paper's figure 2, with one point for every method."""
    rng = random.Random(seed)
    points = (
        Series(name, (measured(rng, SPEED[name], 6),), (measured(rng, LOSS[name], 0.03),)) for name in METHODS
    )  # fmt: skip
    return Plot(
        "Quality against speed",
        "scatter",
        Axis("decoding speed", "tokens/s"),
        Axis("validation loss", "nats per token"),
        tuple(points),
    )


def curves(seed=0):
    rng, steps = random.Random(seed), range(0, 501, 50)
    series = []
    for name in METHODS:
        values = [measured(rng, LOSS[name] + (4.2 - LOSS[name]) * math.exp(-step / 120), 0.03) for step in steps]
        series.append(Series(name, tuple(steps), tuple(values)))
    return Plot("Validation loss", "lines", Axis("steps"), Axis("loss", "nats"), tuple(series))


def bars(seed=0):
    rng, tasks = random.Random(seed), ("CIFAR-100", "SVHN", "digits 5–9")
    series = (Series(name, tasks, tuple(measured(rng, 90 - 8 * LOSS[name], 1.1) for _ in tasks)) for name in METHODS)
    return Plot("Accuracy by task", "bars", Axis("task"), Axis("accuracy", "%"), tuple(series))


def ranks():
    series = (
        Series(name, (4.0, 16.0, 64.0), (70.0 + i, 74.0 + i, 76.0), ("r = 4", "r = 16", "r = 64"))
        for i, name in enumerate(METHODS[:3])
    )
    return Plot("Rank", "scatter", Axis("parameters", log=True), Axis("accuracy", "%"), tuple(series))
