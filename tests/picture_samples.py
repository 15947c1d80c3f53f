"""Pictures as diagnostics would make them, for the tests of the report."""

import math
import random

from residual_steer.report import Arrows, Axis, Flow, Matrix, Surface, Trajectory

STREAM = (Axis("first principal direction"), Axis("second principal direction"))


def matrix(high=4, wide=4, seed=0, scale=1.0, shift=0.0, z=None, **changes):
    """Accuracy after each of some tasks; those that are yet to come have no number unless asked for."""
    rng = random.Random(seed)
    values = [[shift + scale * rng.random() for _ in range(wide)] for _ in range(high)]
    fields = {
        "title": "Forgetting",
        "x": Axis("evaluated on"),
        "y": Axis("after training on"),
        "z": z or Axis("accuracy", "%"),
        "columns": tuple(f"task {index + 1}" for index in range(wide)),
        "rows": tuple(f"task {index + 1}" for index in range(high)),
        "values": values,
    }
    return Matrix(**{**fields, **changes})


def forgetting():
    """The lower triangle of five tasks."""
    tasks = ("CIFAR-100", "SVHN", "digits", "Flowers-102", "Pets")
    values = [[90 - 7 * (i - j) + j if j <= i else None for j in range(5)] for i in range(5)]
    return matrix(columns=tasks, rows=tasks, values=values)


def surface(scale=1.0, shift=0.0, log=False, side=31, paths=None, **changes):
    """A loss with two valleys, and the ways of two models over it."""
    across = [-2 + 4 * i / (side - 1) for i in range(side)]
    up = [-1.5 + 3 * i / (side - 1) for i in range(side)]
    values = [
        [shift + scale * (3 + 0.4 * (x**2 - 1) ** 2 + y**2 - 0.5 * x + 0.3 * math.sin(3 * x * y)) for x in across]
        for y in up
    ]
    steps = [i / 11 for i in range(12)]
    walks = (
        Trajectory("frozen", [-1.7 + 1.0 * t for t in steps], [1.2 - 1.1 * t + 0.4 * math.sin(5 * t) for t in steps]),
        Trajectory("H-Res", [-1.7 + 2.8 * t for t in steps], [1.2 - 1.3 * t**2 for t in steps]),
    )
    fields = {
        "title": "Loss over a plane of the residual stream",
        "x": STREAM[0],
        "y": STREAM[1],
        "z": Axis("loss", "nats", log),
        "across": across,
        "up": up,
        "values": values,
        "paths": walks if paths is None else paths,
    }
    return Surface(**{**fields, **changes})


def flow(name, seed=0, count=40, length=0.3, groups=(), size=1.0, turn=1.0):
    rng = random.Random(seed)
    x = [size * rng.gauss(0, 1) for _ in range(count)]
    y = [size * rng.gauss(0, 0.6) for _ in range(count)]
    dx = [length * (-a - turn * b) for a, b in zip(x, y, strict=True)]
    dy = [length * (turn * a - b) for a, b in zip(x, y, strict=True)]
    return Flow(name, x, y, dx, dy, tuple(groups[i % len(groups)] for i in range(count)) if groups else ())


def arrows(*panels, **changes):
    fields = {"title": "Displacement of the stream", "x": STREAM[0], "y": STREAM[1]}
    panels = panels or (flow("H-Res", turn=0.2), flow("LoRA", seed=1, turn=2.0))
    return Arrows(**{**fields, **changes}, panels=panels)
