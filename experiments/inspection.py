"""What `inspect_steering.py` measures of an adapted model, as numbers by name, and the pictures of one."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import residual_steer as rs
from residual_steer.baselines import apply
from residual_steer.data import ByteBlocks, digits, python_source
from residual_steer.diagnostics import (
    ControlEffort,
    Displacement,
    Landscape,
    attention_entropy,
    control_effort,
    displacement,
    drift,
    landscape,
    memory_length,
    neural_collapse,
    stream_energy,
)

from .backbones import LENGTH, SOURCE, Task, some
from .compare_methods import PROMPT, Shorter, half, problem_of
from .ledger import Ledger
from .problem import Arm, Problem, rates_around
from .results import Arrows, Axis, Flow, Picture, Plot, Series, Surface, Trajectory, decode, encode

# Peak learning rates, chosen on validation data by the sweep of compare_methods.py.
TUNED = {
    "ViT": {"hres": 3e-2, "lora": 1e-2, "vpt-shallow": 9e-2, "vpt-deep": 9e-2, "linear": 9e-2, "full": 2e-3},
    "GPT-2": {"hres": 1e-2, "lora": 1e-2, "prompt": 9e-2, "full": 2e-3},
    "Mamba": {"hres": 3e-2, "lora": 1e-2, "full": 2e-3},
}
VERSION = 1  # raise it when the code below changes what is measured
KINDS = {kind.__name__: kind for kind in (Arrows, Plot, Surface)}
Numbers = dict[str, float]
Measure = Callable[[nn.Module, nn.Module], Numbers]  # of a model and its frozen reference


def arms_of(task: Task, rank: int, rates: int) -> list[Arm]:
    """Return the methods whose models are looked at."""
    methods: list[tuple[str, str, dict[str, Any]]] = [
        ("H-Res", "hres", {"rank": rank}),
        ("LoRA", "lora", {"rank": rank}),
    ]
    if task.kind == "images":
        methods += [
            ("VPT-shallow", "vpt-shallow", {"length": PROMPT}),
            ("VPT-deep", "vpt-deep", {"length": PROMPT}),
            ("head alone", "linear", {}),
        ]
    elif task.backbone == "GPT-2":
        methods.append(("prompt", "prompt", {"length": PROMPT}))
    methods.append(("full fine-tuning", "full", {}))
    tuned = TUNED[task.backbone]
    return [Arm(name, method, rates_around(tuned[method], rates), options) for name, method, options in methods]


def watched(task: Task) -> Problem:
    """Return a task as a problem whose test scores hold what the diagnostics measure."""
    plain = problem_of(task)
    measure = {"ViT": of_images, "GPT-2": of_attention, "Mamba": of_memory}[task.backbone](task)

    def score(model: nn.Module, split: str, seed: int) -> Numbers:
        found = plain.score(model, split, seed)
        return found if split == "valid" else {**found, **measure(model, frozen(plain, seed))}

    return dataclasses.replace(
        plain, score=score, name=f"{plain.name}, looked at", identity={**plain.identity, "inspected": VERSION}
    )


def frozen(problem: Problem, seed: int) -> nn.Module:
    """Return the model that a run began with."""
    return problem.fresh(seed).requires_grad_(False).eval()


def held_out(task: Task) -> Dataset[Any]:
    """Return the data that results are measured on, windows of text as short as in training."""
    return half(task.valid if task.kind == "images" else Shorter(task.valid), 1)


def loader_of(data: Dataset[Any]) -> DataLoader[Any]:
    """Return batches in the order of the data."""
    return DataLoader(data, batch_size=64)


def unrelated(task: Task) -> Dataset[Any]:
    """Return data that the backbone was pre-trained on."""
    if task.kind == "images":
        return digits(range(5), "valid")
    return Shorter(some(ByteBlocks(python_source(SOURCE), LENGTH, "valid"), 64))


def moved(task: Task) -> Measure:
    """Measure how far the stream moves."""
    loaders = loader_of(held_out(task)), loader_of(unrelated(task))

    def measure(model: nn.Module, reference: nn.Module) -> Numbers:
        found = drift(model, *loaders, reference=reference)
        last = {"drift": found.task[-1], "drift elsewhere": found.other[-1] if found.other else math.nan}
        return {**last, "interference": math.nan if found.final_interference is None else found.final_interference}

    return measure


def by_layer(name: str, values: Iterable[float]) -> Numbers:
    """Name the values of layers."""
    return {f"{name} {layer}": float(value) for layer, value in enumerate(values)}


def of_attention(task: Task) -> Measure:
    """Measure what happens to the attention of a Transformer."""
    loader, movement = loader_of(held_out(task)), moved(task)

    def measure(model: nn.Module, reference: nn.Module) -> Numbers:
        found = attention_entropy(model, loader, reference=reference)
        energy = stream_energy(model, loader, reference=reference)
        return {
            **by_layer("entropy", found.change),
            "entropy": float(found.change.mean()),
            "untouched": float(found.untouched),
            "bound": float((found.adapted_bound - found.frozen_bound).mean()),
            "energy": float(energy.change.mean()),
            **movement(model, reference),
        }

    return measure


def of_images(task: Task) -> Measure:
    """Measure attention, collapse on the training data, and the field of displacements."""
    attention = of_attention(task)
    train, test = loader_of(task.train), loader_of(held_out(task))

    def measure(model: nn.Module, reference: nn.Module) -> Numbers:
        found = neural_collapse(model, train)
        field = displacement({"": model}, test, reference=reference, token="first").fields[0].stream
        names = ("coherence", "chance", "contraction", "divergence")
        return {
            **attention(model, reference),
            "nc1": found.nc1,
            "nc2 norms": found.nc2_norms,
            "nc2 angles": found.nc2_angles,
            "nc3": math.nan if found.nc3 is None else found.nc3,
            "nc4": 100 * found.nc4,
            **{name: math.nan if (value := getattr(field, name)) is None else value for name in names},
            "order": math.nan if field.coherence is None or field.chance is None else field.coherence - field.chance,
        }

    return measure


def of_memory(task: Task) -> Measure:
    """Measure how far back an SSM remembers."""
    loader, movement = loader_of(held_out(task)), moved(task)

    def measure(model: nn.Module, reference: nn.Module) -> Numbers:
        found = memory_length(model, loader, reference=reference)
        return {
            **by_layer("memory", found.change),
            "untouched": float(found.untouched),
            **movement(model, reference),
        }

    return measure


def pictures_of(task: Task, problem: Problem, rank: int, ledger: Ledger) -> list[Picture]:
    """Return the pictures of H-Res, on the ViT beside LoRA, with the first seed; from the ledger if they are there."""
    key = {**problem.identity, "pictures": VERSION, "steps": problem.steps, "rank": rank, "torch": torch.__version__}

    def make() -> dict[str, Any]:
        steered = trained(task, problem, "hres", rank=rank)
        drawn = drawn_of_images(task, problem, steered, rank) if task.kind == "images" else []
        if task.backbone != "Mamba":
            drawn.append(entropies(task, problem, steered))
        drawn.append(efforts(control_effort(steered, loader_of(held_out(task)))))
        named = [dataclasses.replace(one, title=f"{task.backbone}: {one.title}") for one in drawn]
        return {"drawn": [[type(one).__name__, encode(one)] for one in named]}

    kept = ledger.get_or(key, make)["drawn"]
    return [decode(KINDS[kind], content, "the ledger") for kind, content in kept]


def drawn_of_images(task: Task, problem: Problem, steered: nn.Module, rank: int) -> list[Picture]:
    """Draw figure 1 from real states, and collapse over training."""
    reference, test = frozen(problem, 0), loader_of(held_out(task))
    rivals = {"LoRA": trained(task, problem, "lora", rank=rank), "H-Res": steered}
    return [
        hills(landscape(steered, list(test), layer=-2, reference=reference, together=True)),
        arrows(displacement(rivals, test, reference=reference, token="first")),
        collapsing(task, problem, rank),
    ]


def directions(explained: Sequence[float]) -> tuple[Axis, Axis]:
    """Return the axes of a plane of principal directions, with the shares of the variance that they explain."""
    first, second = (f"{100 * share:.0f} %" for share in explained)
    return Axis(f"first principal direction, {first} of the variance"), Axis(f"second, {second}")


def hills(found: Landscape) -> Surface:
    """Draw a loss as contours, with the ways of the mean states through the layers over them."""
    ways = (("frozen", found.frozen), ("adapted", found.adapted))
    return Surface(
        f"Loss over the stream behind block {found.plane.layer}",
        *directions(found.plane.explained),
        Axis("loss"),
        found.across,
        found.up,
        found.losses,
        tuple(Trajectory(name, way.x, way.y) for name, way in ways),
        (
            "Loss of the adapted model with all states shifted alike, so that their mean is there. Paths: the mean "
            f"state behind each block up to {found.plane.layer}.",
        ),
    )


def arrows(found: Displacement) -> Arrows:
    """Draw the displacements under each method, from frozen states to adapted ones."""
    names = ("coherence", "chance", "contraction", "divergence")
    notes = [f"{len(found.x)} of {found.states:,} states behind block {found.plane.layer}, of the first token."]
    for one in found.fields:
        values = {name: getattr(one.stream, name) for name in names}
        told = ", ".join(f"{name} {'–' if value is None else f'{value:.2f}'}" for name, value in values.items())
        notes.append(f"{one.name}: {told}, all in the stream.")
    panels = tuple(Flow(one.name, found.x, found.y, one.dx, one.dy, found.groups) for one in found.fields)
    title = f"Displacement of the stream behind block {found.plane.layer}"
    return Arrows(title, *directions(found.plane.explained), panels, tuple(notes))


def efforts(found: ControlEffort) -> Plot:
    """Draw the effort of a field against the block."""
    line = Series(found.name, tuple(one.layer for one in found.layers), tuple(one.effort for one in found.layers))
    return Plot("Control effort", "lines", Axis("block"), Axis("mean ‖λH(z)‖ / ‖z‖"), (line,))


def entropies(task: Task, problem: Problem, steered: nn.Module) -> Plot:
    """Draw the entropy of attention of the frozen model, under H-Res and behind a prompt."""
    method = "vpt-deep" if task.kind == "images" else "prompt"
    rivals = {"H-Res": steered, method: trained(task, problem, method, length=PROMPT)}
    loader, reference = loader_of(held_out(task)), frozen(problem, 0)
    found = {name: attention_entropy(model, loader, reference=reference) for name, model in rivals.items()}
    own = found["H-Res"]
    layers = tuple(range(len(own.blocks)))
    lines = {"frozen": own.frozen, **{name: one.adapted for name, one in found.items()}}
    series = tuple(Series(name, layers, tuple(values.mean(1).tolist())) for name, values in lines.items())
    note = f"H-Res: the maps of the first {own.untouched} of {len(layers)} layers are equal, bit for bit."
    axes = Axis("layer"), Axis("attention entropy", "nats")
    return Plot("Attention entropy by layer", "lines", *axes, series, (note,))


def trained(task: Task, problem: Problem, method: str, **options: int) -> nn.Module:
    """Return a model that a method has adapted."""
    model = apply(problem.fresh(0), method, **options, train=problem.train_also)
    rs.fit(model, problem.train(0), steps=problem.steps, lr=TUNED[task.backbone][method], seed=0, progress=False)
    return model.eval()


def collapsing(task: Task, problem: Problem, rank: int) -> Plot:
    """Follow neural collapse on the training data while H-Res trains, at one learning rate throughout."""
    model = apply(problem.fresh(0), "hres", rank=rank, train=problem.train_also)
    data, pieces = loader_of(task.train), 5
    found = {0: neural_collapse(copy.deepcopy(model), data)}
    steps = max(1, problem.steps // pieces)
    for piece in range(1, pieces + 1):
        options: dict[str, Any] = {"seed": piece, "schedule": "constant", "warmup": 0, "progress": False}
        rs.fit(model, problem.train(0), steps=steps, lr=TUNED["ViT"]["hres"] / 2, **options)
        found[piece * steps] = neural_collapse(model, data)
    names = {"nc1": "NC1", "nc2_angles": "NC2", "nc3": "NC3", "nc4": "NC4"}
    values = {label: tuple(getattr(one, name) for one in found.values()) for name, label in names.items()}
    lines = tuple(Series(label, tuple(found), own) for label, own in values.items())
    notes = (
        "NC2 is the distance of the class means' cosines from those of a simplex.",
        f"H-Res, training data, one learning rate throughout; the optimizer begins anew every {steps} steps.",
    )
    axes = Axis("step"), Axis("distance from collapse", log=True)
    return Plot("Collapse over training", "lines", *axes, lines, notes)
