"""Look inside adapted models: attention, collapse, the field of displacements, memory, and how far the stream moves.

    python -m experiments.inspect_steering

A small frozen ViT, GPT-2 and Mamba are adapted by H-Res, LoRA, prompts and fully, as in compare_transformer_mamba.py,
and then measured with `residual_steer.diagnostics`, each against the model that it was. Tables and pictures follow,
figure 1 of the paper among them, made of real states, and verdicts on what the paper says of them. The backbones are
kept in ~/.cache/residual-steer; no network, no GPU.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import replace

from .backbones import Task, small_tasks, some
from .harness import LOST, Experiment, Found, parser_of, positive, run
from .inspection import arms_of, pictures_of, watched
from .ledger import Ledger
from .paired import Difference, difference
from .results import Column, Table, Verdict
from .sweep import Entry, every_run, sweep
from .tables import gap, measured, records

EXPERIMENT = Experiment(
    name="inspect-steering",
    title="What adaptation does to the stream",
    about="A ViT is adapted from the digits 0–4 to the digits 5–9, a GPT-2 and a Mamba from Python's source to English "
    "prose. Every adapted model is compared with the frozen one that it was made of, on held-out data; neural collapse "
    "is measured on the training data, as Papyan et al. do. Elsewhere is held-out data of the kind that the backbone "
    "was pre-trained on. Learning rates were chosen by compare_transformer_mamba.py --baselines; LoRA has "
    "the rank of H-Res, and twice its parameters.",
)
FIELD = "field of displacements of the class token"
COMMAND = "python -m experiments.inspect_steering"


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


def on_entropy(results: Results) -> Verdict:
    """Judge claim 5: prompts raise the entropy of attention; H-Res leaves it as it is, to the bit."""
    raised = {
        f"{backbone}, {name}": over(results[backbone], name, "entropy")
        for backbone, name in (("ViT", "VPT-shallow"), ("ViT", "VPT-deep"), ("GPT-2", "prompt"))
    }
    bounds = [measured(entry_of(results[one], two), "bound") for one, two in (("ViT", "VPT-deep"), ("GPT-2", "prompt"))]
    said = [f"{name} {change or LOST}" for name, change in raised.items()]
    said += [f"{name} {over(results[name], 'H-Res', 'entropy') or LOST} under H-Res" for name in ("ViT", "GPT-2")]
    steered = [entry_of(results[name], "H-Res") for name in ("ViT", "GPT-2")]
    leading = {name: entry.results("untouched") for name, entry in zip(("ViT", "GPT-2"), steered, strict=True)}
    layers = {name: layers_in(results[name]) for name in leading}
    tested = [*raised.values(), *[over(results[name], "H-Res", "entropy") for name in leading]]
    lemma_1 = all(one is not None and one.sign == 1 for one in raised.values())
    lemma_2 = all(found and min(found) == layers[name] for name, found in leading.items())
    equal = "; ".join(f"{name} {counted(found)} of {layers[name]}" for name, found in leading.items())
    return Verdict(
        5,
        word_of(tested, lemma_1 and lemma_2, lemma_1 or lemma_2),
        "lemma 1: prompts raise the entropy; lemma 2: H-Res leaves it untouched; no numbers",
        f"Change of entropy in nats, mean of all layers: {'; '.join(said)}. With the tokens of a prompt the highest "
        f"entropy there can be rises by {' and '.join(LOST if one is None else f'{one.mean:.2f}' for one in bounds)} "
        "(ViT, GPT-2). Lemma 2 can be exact up to the first steered layer alone, and is so there by construction: "
        f"nothing has changed yet what enters it. Leading layers with equal maps, bit for bit: {equal}, all steered.",
        COMMAND,
    )


def on_collapse(results: Results) -> Verdict:
    """Judge claim 6: H-Res brings neural collapse."""
    entries = results["ViT"]
    names = {"nc1": "NC1", "nc2 norms": "NC2 (norms)", "nc2 angles": "NC2 (angles)", "nc3": "NC3", "nc4": "NC4"}
    changes = {name: gap(entries, "H-Res", "head alone", score) for score, name in names.items()}
    better = [change is not None and change.sign == -1 for change in changes.values()]
    rivals = ("LoRA", "VPT-shallow", "VPT-deep", "full fine-tuning")
    others = {name: gap(entries, name, "head alone", "nc1") for name in rivals}
    levels = {name: measured(entry_of(entries, name), "nc1") for name in ("H-Res", *rivals, "head alone")}
    also = [name for name, change in others.items() if change is not None and change.sign == -1]
    said = "; ".join(f"{name} {change or LOST}" for name, change in changes.items())
    reached = ", ".join(f"{name} {LOST if one is None else f'{one.mean:.2f}'}" for name, one in levels.items())
    return Verdict(
        6,
        word_of(list(changes.values()), all(better), any(better)),
        "no numbers",
        f"ViT, training data, H-Res minus a head alone, 0 being collapse: {said}. NC1 reached: {reached}; it is "
        f"lowered by {' and '.join(also) if also else 'no other method'} too.",
        COMMAND,
    )


def on_fields(results: Results) -> Verdict:
    """Judge claim 10: LoRA's field is chaotic, that of H-Res convergent."""
    entries = results["ViT"]
    order = {name: over(entries, name, "order") for name in ("H-Res", "LoRA")}
    narrowed = {name: over(entries, name, "contraction", 1.0) for name in ("H-Res", "LoRA")}
    smoother, narrower = (gap(entries, "H-Res", "LoRA", name) for name in ("order", "contraction"))
    chaotic = order["LoRA"] is not None and order["LoRA"].sign != 1
    convergent = narrowed["H-Res"] is not None and narrowed["H-Res"].sign == -1
    ahead = [one is not None and one.sign == sign for one, sign in ((smoother, 1), (narrower, -1))]
    levels = "; ".join(
        f"{name}: coherence above chance {order[name] or LOST}, contraction minus 1 {narrowed[name] or LOST}"
        for name in order
    )
    return Verdict(
        10,
        word_of(
            [*order.values(), *narrowed.values(), smoother, narrower],
            chaotic and convergent and all(ahead),
            chaotic or (convergent and any(ahead)),
        ),
        "a picture (figure 1)",
        f"Displacements of the ViT's class token behind the last block. {levels}. H-Res minus LoRA: coherence above "
        f"chance {smoother or LOST}, contraction {narrower or LOST}. Chaotic would be a coherence not above chance, "
        "convergent a contraction below 1.",
        COMMAND,
    )


def word_of(tested: Sequence[Difference | None], holds: bool, partly: bool) -> str:
    """Return a verdict, which cannot be given where a run diverged or one seed leaves every interval infinite."""
    if not all(one is not None and math.isfinite(one.margin) for one in tested):
        return "can't be tested here"
    return "holds" if holds else "partly holds" if partly else "does not hold"


def entry_of(entries: Sequence[Entry], name: str) -> Entry:
    """Return what a method reached."""
    return next(entry for entry in entries if entry.arm.name == name)


def over(entries: Sequence[Entry], name: str, score: str, level: float = 0.0) -> Difference | None:
    """Return how far a method's score is above a level; None where it diverged."""
    entry = entry_of(entries, name)
    if measured(entry, score) is None:
        return None
    values = entry.results(score)
    return difference(values, [level] * len(values))


def counted(values: Sequence[float]) -> str:
    """Write how many leading layers were untouched, of one seed or another."""
    return " or ".join(f"{value:g}" for value in sorted(set(filter(math.isfinite, values)))) or LOST


def layers_in(entries: Sequence[Entry]) -> int:
    """Return how many layers have attention."""
    return sum(name.startswith("entropy ") for name in names_in(entries))


def study(options: argparse.Namespace, ledger: Ledger) -> Found:
    """Adapt every backbone with every method, measure, draw."""
    results: Results = {}
    tables, plots, every = [], [], []
    for whole in small_tasks(options.cache, options.quick, ("ViT", "GPT-2", "Mamba")):
        task = replace(whole, steps=4, valid=some(whole.valid, 64)) if options.quick else whole
        problem = watched(task)
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


def main(arguments: list[str] | None = None) -> int:
    """Run the experiment; return the exit status."""
    parser = parser_of(EXPERIMENT, cache=True)
    parser.set_defaults(rates=1)
    parser.add_argument("--rank", type=positive, default=16, help="of H-Res and LoRA")
    return run(EXPERIMENT, parser.parse_args(arguments), study)


if __name__ == "__main__":
    sys.exit(main())
