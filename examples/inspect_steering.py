"""Look inside adapted models: attention, collapse, the field of displacements, memory, and how far the stream moves.

    python examples/inspect_steering.py

A small frozen ViT, GPT-2 and Mamba are adapted by H-Res, LoRA, prompts and fully, as in compare_transformer_mamba.py,
and then measured with `residual_steer.diagnostics`, each against the model that it was. Tables and pictures follow,
figure 1 of the paper among them, made of real states, and verdicts on what the paper says of them. The backbones are
kept in ~/.cache/residual-steer; no network, no GPU.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from backbone_cache import default_cache
from experiment import LOST, Experiment, Found, parser_of, positive, run
from hub_tasks import quiet_libraries
from inspection import arms_of, pictures_of, watched
from residual_steer.report import Column, Table, Verdict
from residual_steer.study import (
    Difference,
    Entry,
    Ledger,
    difference,
    every_run,
    gap,
    measured,
    records,
    sweep,
)
from tasks import Task, small_tasks

EXPERIMENT = Experiment(
    name="inspect-steering",
    title="What adaptation does to the stream",
    about="A ViT is adapted from the digits 0–4 to the digits 5–9, a GPT-2 and a Mamba from Python's source to English "
    "prose. Every adapted model is compared with the frozen one that it was made of, on held-out data; neural collapse "
    "is measured on the training data, as Papyan et al. do. Elsewhere is data that the backbone was pre-trained on.",
)
FIELD = "field of displacements of the class token"
COMMAND = "python examples/inspect_steering.py"


def columns_of(task: Task, entries: Sequence[Entry]) -> dict[str, tuple[Column, ...]]:
    """Return the columns of a backbone's tables, by title."""
    metric = Column("metric", task.unit, "", "down" if task.kind == "text" else "up", 3 if task.kind == "text" else 1)
    layers = sum(name.startswith(("entropy ", "memory ")) for name in names_in(entries))
    movement = (
        Column("drift", "moved, task", digits=3),
        Column("drift elsewhere", "moved, elsewhere", digits=3),
        Column("interference", "elsewhere ÷ task", digits=2),
    )
    if task.backbone == "Mamba":
        length = tuple(Column(f"memory {layer}", f"layer {layer}", "× frozen", digits=3) for layer in range(layers))
        untouched = Column("untouched", "layers untouched", digits=1)
        return {"memory length": (metric, *length, untouched), "movement of the stream": (metric, *movement)}
    entropy = tuple(Column(f"entropy {layer}", f"layer {layer}", "nats", digits=3) for layer in range(layers))
    bound = (Column("bound", "ln(keys)", "nats", digits=3), Column("untouched", "layers untouched", digits=1))
    tables = {"change of attention entropy": (metric, *entropy, *bound)}
    energy = Column("energy", "change of energy", digits=2)
    if task.kind == "images":
        tables["neural collapse"] = (
            metric,
            *[Column(f"nc{name}", f"NC{name}", "", "down", 3) for name in ("1", "2 norms", "2 angles", "3")],
            Column("nc4", "NC4", "%", "down", 2),
        )
        names = ("coherence", "chance", "contraction", "divergence")
        tables["field of displacements of the class token"] = (
            metric,
            *[Column(name, name, digits=3) for name in names],
        )
    return {**tables, "movement of the stream": (metric, *movement, energy)}


def names_in(entries: Sequence[Entry]) -> list[str]:
    """Return the names of what was measured."""
    return [name for entry in entries[:1] for one in entry.runs[:1] for name in one.test or ()]


def tables_of(task: Task, entries: Sequence[Entry]) -> list[Table]:
    """Return a backbone's tables."""
    found = []
    for title, columns in columns_of(task, entries).items():
        rows = tuple(
            {"method": entry.arm.name, **{column.key: measured(entry, column.key) for column in columns}}
            for entry in entries
        )
        found.append(Table(f"{task.backbone}: {title}", (Column("method", "method"), *columns), rows, notes_of(title)))
    return found


def notes_of(title: str) -> tuple[str, ...]:
    """Say what a table's columns are."""
    return {
        "change of attention entropy": (
            "Adapted − frozen, over heads and rows: of the class token's attention in the ViT, of every token's in the "
            "language model; over all keys, those of a prompt too. ln(keys) is how much a prompt raises the highest "
            "entropy there can be. Untouched: leading layers whose maps are equal, bit for bit.",
        ),
        "memory length": (
            "Adapted ÷ frozen, the median over channels: after how many tokens the slowest state of a channel has "
            "decayed to 1/e. Untouched: leading layers that decay exactly as before.",
        ),
        "neural collapse": (
            "On the training data; 0 is full collapse. The head alone leaves the features as they were, so that its "
            "row shows NC1 and NC2 before training.",
        ),
        FIELD: (
            "Behind the last block, in all its dimensions. Coherence: mean cosine of a displacement with those of its "
            "8 nearest neighbours; chance: with any. Contraction: distance from the mean of the class after ÷ before. "
            "Divergence of the best linear fit, per direction.",
        ),
        "movement of the stream": ("‖adapted − frozen‖ / ‖frozen‖ behind the last block, the mean over tokens.",),
    }[title]


Results = dict[str, list[Entry]]


def over_zero(entries: Sequence[Entry], name: str, score: str) -> Difference | None:
    """Return a score of a method as a difference from zero; None where it diverged."""
    entry = entry_of(entries, name)
    if measured(entry, score) is None:
        return None
    values = entry.results(score)
    return difference(values, [0.0] * len(values))


def on_entropy(results: Results) -> Verdict:
    """Judge claim 5: prompts raise the entropy of attention, H-Res leaves it as it is."""
    raised = {
        f"{backbone}, {name}": over_zero(results[backbone], name, "entropy")
        for backbone, name in (("ViT", "VPT-shallow"), ("ViT", "VPT-deep"), ("GPT-2", "prompt"))
    }
    steered = {f"{backbone}, H-Res": over_zero(results[backbone], "H-Res", "entropy") for backbone in ("ViT", "GPT-2")}
    wider = [
        measured(entry_of(results[name], method), "bound")
        for name, method in (("ViT", "VPT-deep"), ("GPT-2", "prompt"))
    ]
    entries = [entry_of(results[backbone], "H-Res") for backbone in ("ViT", "GPT-2")]
    leading = sorted({value for entry in entries for value in entry.results("untouched")})
    whole = [sum(name.startswith("entropy ") for name in names_in([entry])) for entry in entries]
    lemma_1 = all(one is not None and one.sign == 1 for one in raised.values())
    lemma_2 = all(min(entry.results("untouched")) == count for entry, count in zip(entries, whole, strict=True))
    said = [f"{name} {change or LOST}" for name, change in {**raised, **steered}.items()]
    bound = " and ".join(LOST if one is None else f"{one.mean:.2f}" for one in wider)
    return Verdict(
        5,
        "holds" if lemma_1 and lemma_2 else "partly holds" if lemma_1 or min(leading) >= 1 else "does not hold",
        "lemma 1: prompts raise the entropy; lemma 2: H-Res leaves it untouched; no numbers",
        f"Change of entropy in nats, mean of all layers: {'; '.join(said)}. The highest entropy there can be rises by "
        f"{bound} with the tokens of the prompts (ViT, GPT-2). Lemma 2 as printed can hold only up to the first "
        f"steered layer, whose input nothing has changed yet: with all {' and '.join(map(str, whole))} layers steered, "
        f"{' or '.join(f'{value:g}' for value in leading)} has maps that are equal bit for bit, and later ones change.",
        COMMAND,
    )


def entry_of(entries: Sequence[Entry], name: str) -> Entry:
    """Return what a method reached."""
    return next(entry for entry in entries if entry.arm.name == name)


def on_collapse(results: Results) -> Verdict:
    """Judge claim 6: H-Res brings neural collapse."""
    said, better = [], []
    for score, name in (("nc1", "NC1"), ("nc2 angles", "NC2 (angles)"), ("nc3", "NC3"), ("nc4", "NC4")):
        change = gap(results["ViT"], "H-Res", "head alone", score)
        better.append(change is not None and change.sign == -1)
        said.append(f"{name} {change or LOST}")
    rivals = [f"{name}: {gap(results['ViT'], 'H-Res', name, 'nc1') or LOST}" for name in ("LoRA", "full fine-tuning")]
    word = "holds" if all(better) else "partly holds" if any(better) else "does not hold"
    return Verdict(
        6,
        word,
        "no numbers",
        f"ViT, training data, H-Res minus a head alone: {'; '.join(said)}. It is no property of H-Res alone; NC1 of "
        f"H-Res minus that of {'; '.join(rivals)}.",
        COMMAND,
    )


def on_fields(results: Results) -> Verdict:
    """Judge claim 10: LoRA's field is chaotic, that of H-Res convergent."""
    entries = results["ViT"]
    smooth, narrow = (gap(entries, "H-Res", "LoRA", name) for name in ("order", "contraction"))
    below = {name: over_one(entries, name) for name in ("H-Res", "LoRA")}
    convergent = below["H-Res"] is not None and below["H-Res"].sign == -1
    better = (smooth is not None and smooth.sign == 1) + (narrow is not None and narrow.sign == -1)
    word = "holds" if better == 2 and convergent else "partly holds" if better or convergent else "does not hold"
    levels = [f"{name} {measured_text(entries, name)}" for name in ("H-Res", "LoRA")]
    return Verdict(
        10,
        word,
        "a picture (figure 1)",
        f"Displacements of the ViT's class token behind the last block: {'; '.join(levels)}. H-Res minus LoRA: "
        f"coherence above chance {smooth or LOST}, contraction {narrow or LOST}. Chaotic would be a coherence at "
        "chance, convergent a contraction below 1.",
        COMMAND,
    )


def over_one(entries: Sequence[Entry], name: str) -> Difference | None:
    """Return how far a method's contraction is from 1."""
    entry = entry_of(entries, name)
    if measured(entry, "contraction") is None:
        return None
    values = entry.results("contraction")
    return difference(values, [1.0] * len(values))


def measured_text(entries: Sequence[Entry], name: str) -> str:
    """Write a method's coherence, chance and contraction."""
    entry = entry_of(entries, name)
    found = {score: measured(entry, score) for score in ("coherence", "chance", "contraction")}
    return ", ".join(f"{score} {LOST if one is None else f'{one.mean:.3f}'}" for score, one in found.items())


def study(options: argparse.Namespace, ledger: Ledger) -> Found:
    """Adapt every backbone with every method, measure, draw."""
    quiet_libraries()
    results: Results = {}
    tables, plots, every = [], [], []
    for task in small_tasks(options.cache, options.quick, ("ViT", "GPT-2", "Mamba")):
        problem = watched(shorter(task, options.quick))
        entries = sweep(problem, arms_of(task, options.rank, options.rates), range(options.seeds), ledger)
        results[task.backbone] = entries
        tables += tables_of(task, entries)
        plots += pictures_of(task, problem, options.rank, ledger)
        every += records(problem, entries)
    return Found(
        tables=tables,
        plots=plots,
        verdicts=[on_entropy(results), on_collapse(results), on_fields(results)],
        settings={"rank": options.rank, "learning rates of every method": options.rates},
        records=every,
        seconds=sum(one.seconds for entries in results.values() for one in every_run(entries)),
    )


def shorter(task: Task, quick: bool) -> Task:
    """Return the task with few steps, for tests."""
    return replace(task, steps=4) if quick else task


def main(arguments: list[str] | None = None) -> int:
    """Run the experiment; return the exit status."""
    parser = parser_of(EXPERIMENT)
    parser.set_defaults(rates=1)
    parser.add_argument("--rank", type=positive, default=16, help="of H-Res and LoRA")
    parser.add_argument("--cache", type=Path, default=default_cache(), help="folder of the pre-trained backbones")
    return run(EXPERIMENT, parser.parse_args(arguments), study)


if __name__ == "__main__":
    sys.exit(main())
