"""SQuAD v1.1 on frozen language models: H-Res, LoRA, prompts and prefixes at equal parameter budgets.

    python -m experiments.squad --model gpt2 --model state-spaces/mamba-130m-hf --data rajpurkar/squad

Each model is given a text and a question and learns to go on with the answer. Every method but full fine-tuning trains
about as many parameters as H-Res of rank 32, for as many steps, with as many learning rates; the rate is chosen on
paragraphs held out of the train split. Measured on the validation split: the loss on answers, which is the paper's
metric, and exact match and F1 of what greedy decoding answers.

It downloads each model's weights and SQuAD (about 90,000 questions) from the Hugging Face Hub; what has been downloaded
once is read from the cache, and `--model` and `--data` take local folders too. It is meant for a GPU; a Mamba is slow
there too without the kernels of `mamba_ssm` and `causal_conv1d`. Each method takes a run for every learning rate, and
one for every further seed; finished runs are kept beside the result, so that the same command goes on where it was
stopped. `--quick` only shows that everything works.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

import residual_steer as rs
from benchmarks.environment import command_line
from residual_steer.data import squad_scores
from residual_steer.errors import UnsuitableError
from residual_steer.training import evaluate

from .harness import Experiment, Found, judged, parser_of, positive, run
from .hub import fingerprint, language_model, last_names
from .ledger import Ledger
from .paired import Difference, difference
from .problem import Arm, Problem, digest, match_budget, rates_around
from .results import Axis, Column, Table, Verdict
from .squad_task import answers, questions_of
from .sweep import Entry, every_run, sweep
from .tables import bars, comparison, gap, measured, records

EXPERIMENT = Experiment(
    name="squad",
    title="SQuAD on frozen language models",
    about="Pre-trained causal language models are adapted to answer SQuAD v1.1's questions. Every method but full "
    "fine-tuning trains about as many parameters as H-Res of the given rank. Learning rates are chosen by the loss on "
    "paragraphs held out of the train split; results are measured on the validation split: the loss on the tokens of "
    "answers, and exact match and F1 of greedy decoding.",
)
VERSION = 1  # raise it when the code below changes what a run gives
RATES = {"hres": 1e-3, "lora": 1e-3, "prompt": 3e-2, "prefix": 1e-2, "full": 5e-5}  # in the middle of the sweep
QUICK = {"steps": 4, "batch": 4, "limit": 8, "valid": 8, "generate": 4}
SCORES = (Column("exact_match", "exact match", "%", "up", 1), Column("f1", "F1", "%", "up", 1))


@dataclass(frozen=True)
class Subject:
    """A model and its questions."""

    problem: Problem  # for `sweep`
    recurrent: bool  # whether it is a state-space model
    positions: int | None  # how many tokens it can take; None if any number
    frozen: Mapping[str, float]  # scores of the model as it came


def subject_of(name: str, path: str, options: argparse.Namespace, ledger: Ledger) -> Subject:
    """Return a model with its questions."""
    model, tokenizer = language_model(path)
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and options.length >= positions:
        raise rs.SteerError(
            f"--length is below the {positions} positions of {name!r}, of which a prompt takes some; "
            f"received {options.length}."
        )
    data = questions_of(options, tokenizer)
    asked = min(options.generate, len(data["test"]))
    spread = [i * len(data["test"]) // asked for i in range(asked)]

    def loader(split: str) -> DataLoader[Any]:
        training = split == "train"
        return DataLoader(data[split], options.batch, shuffle=training, drop_last=training, num_workers=options.workers)

    def score(model: nn.Module, split: str, seed: int) -> dict[str, float]:
        model.eval()
        found = {"loss": evaluate(model, loader(split))["loss"]}
        if split == "test":
            said = answers(model, tokenizer, [data[split].prompts[i] for i in spread], options.batch)
            found |= squad_scores(said, [data[split].references[i] for i in spread])
        return found

    problem = Problem(
        name=name,
        fresh=lambda seed: copy.deepcopy(model),
        train=lambda seed: loader("train"),
        score=score,
        metric="loss",
        better="down",
        steps=options.steps,
        identity={
            "backbone": digest(model),
            "questions": {k: fingerprint([v.columns["input_ids"], v.columns["labels"]]) for k, v in data.items()},
            "batch": options.batch,
            "generate": asked,
            "version": VERSION,
        },
        fit={"precision": options.precision},
    )
    key = {"problem": name, "frozen": True, "identity": dict(problem.identity)}
    device = "cuda" if torch.cuda.is_available() else "cpu"  # `fit` moves all others there
    frozen = ledger.get_or(key, lambda: score(problem.fresh(0).to(device), "test", 0))
    return Subject(problem, rs.find_backbone(model).name == "mamba", positions, frozen)


def arms_of(subject: Subject, options: argparse.Namespace) -> tuple[list[Arm], list[str]]:
    """Return the methods, sized to train as many parameters as H-Res, and notes on those that cannot be."""
    problem, notes = subject.problem, []
    room = options.longest if subject.positions is None else subject.positions - options.length
    budget = sum(p.numel() for p in rs.parameters(rs.steer(problem.fresh(0), rank=options.rank)))

    def arm(name: str, method: str, size: dict[str, Any]) -> Arm:
        return Arm(name, method, rates_around(RATES[method], options.rates), size)

    arms = [
        arm("H-Res", "hres", {"rank": options.rank}),
        arm("LoRA", "lora", match_budget(problem, "lora", "rank", budget)),
    ]
    for method in ("prompt", "prefix"):
        try:
            wanted = match_budget(problem, method, "length", budget)["length"]
        except UnsuitableError as error:  # a state-space model has no keys and values to extend
            notes.append(f"{method}: {error}")
            continue
        length = min(wanted, options.longest, room)
        if length < wanted:
            notes.append(f"{method}: {length} tokens, where the parameters of H-Res would be {wanted}.")
        arms.append(arm(method, method, {"length": length}))
    if options.full:
        arms.append(arm("full fine-tuning", "full", {}))
    return arms, notes


def table_of(subject: Subject, entries: list[Entry], notes: list[str]) -> Table:
    """Return losses with exact match and F1, the model as it came in the first row."""
    column = Column("loss", "loss on answers", better="down", digits=3)
    table = comparison(subject.problem.name, subject.problem, entries, column, merged=True)
    more: dict[str, dict[str, Any]] = {}
    for entry in entries:
        for merged in (False, True):
            name = f"{entry.arm.name}, merged" if merged else entry.arm.name
            more[name] = {c.key: measured(entry, c.key, scale=100, merged=merged) for c in SCORES}
    before: dict[str, Any] = {"method": "frozen, as it came", "loss": subject.frozen["loss"]}
    before |= {c.key: 100 * subject.frozen[c.key] for c in SCORES}
    *first, time = table.columns
    rows = (before, *({**row, **more[str(row["method"])]} for row in table.rows))
    return replace(table, columns=(*first, *SCORES, time), rows=rows, notes=(*table.notes, *notes))


def gap_of(entries: Mapping[str, Entry], one: str, other: str) -> Difference | None:
    """Return by how much the loss of one method is above another's; None unless both have it for every seed."""
    return gap(list(entries.values()), one, other, "loss") if {one, other} <= entries.keys() else None


def verdicts(subjects: list[Subject], results: list[dict[str, Entry]], longest: int) -> list[Verdict]:
    """Judge claims 1 and 9, from two seeds on; prompts are of at most `longest` tokens."""
    said, better = [], []
    for subject, entries in zip(subjects, results, strict=True):
        for rival in ("LoRA", "prompt"):
            found = gap_of(entries, "H-Res", rival)
            better.append(found is not None and found.sign == -1)
            said.append(f"{subject.problem.name}, H-Res minus {rival}: {found or 'a run diverged'}")
    paper = "SQuAD validation loss 3.78 against 5.17 (LoRA) and 5.61 (VPT)"
    ours = (
        f"Loss on SQuAD's answers; equal budgets, but for prompts, which have at most {longest} tokens: "
        f"{'; '.join(said)}."
    )
    first = Verdict(1, judged(better), paper, ours, command_line())
    return [first, *on_ssm(subjects, results)]


def on_ssm(subjects: list[Subject], results: list[dict[str, Entry]]) -> list[Verdict]:
    """Judge claim 9 by whether H-Res lowers the loss of state-space models, in the loop that serves all."""
    said, lower = [], []
    for subject, entries in zip(subjects, results, strict=True):
        losses = entries["H-Res"].results("loss")
        if subject.recurrent:
            whole = losses and all(map(math.isfinite, losses))
            found = difference(losses, [subject.frozen["loss"]] * len(losses)) if whole else None
            lower.append(found is not None and found.sign == -1)
            said.append(f"{subject.problem.name}, H-Res minus the frozen model: {found or 'a run diverged'}")
    if not said:
        return []
    ours = f"Loss on SQuAD's answers, by the same code as on Transformers: {'; '.join(said)}."
    return [Verdict(9, "holds" if all(lower) else "does not hold", "none", ours, command_line())]


def study(options: argparse.Namespace, ledger: Ledger) -> Found:
    """Compare the methods on each model."""
    if options.quick:
        vars(options).update(QUICK)
    subjects, results, tables, every = [], [], [], []
    for name, path in last_names(options.model or ["gpt2"]).items():
        subject = subject_of(name, path, options, ledger)
        arms, notes = arms_of(subject, options)
        entries = sweep(subject.problem, arms, range(options.seeds), ledger)
        tables.append(table_of(subject, entries, notes))
        every += records(subject.problem, entries)
        subjects.append(subject)
        results.append({entry.arm.name: entry for entry in entries})
    sizes = {k: getattr(options, k) for k in ("data", "rank", "length", *QUICK, "longest", "rates", "precision")}
    by_name = {one.problem.name: list(entries.values()) for one, entries in zip(subjects, results, strict=True)}
    axes = Axis("model"), Axis("loss on answers")
    return Found(
        tables=tables,
        plots=[bars("Loss on SQuAD's answers", axes, by_name, "loss")],
        verdicts=verdicts(subjects, results, options.longest) if options.seeds > 1 else [],
        settings={**sizes, "frozen": {s.problem.name: dict(s.frozen) for s in subjects}},
        records=every,
        seconds=sum(one.seconds for entries in results for one in every_run(entries.values())),
    )


def main(arguments: list[str] | None = None) -> int:
    """Run the experiment; return the exit status."""
    parser = parser_of(EXPERIMENT, hub=True)
    parser.add_argument("--model", action="append", help="name on the Hub or local folder; may be repeated")
    parser.add_argument("--data", default="rajpurkar/squad", help="name on the Hub, or a local copy of SQuAD v1.1")
    parser.add_argument("--rank", type=positive, default=32, help="of H-Res, whose parameters are everybody's budget")
    parser.add_argument("--steps", type=positive, default=1000, help="optimizer steps of every run")
    parser.add_argument("--batch", type=positive, default=16, help="questions of a step")
    parser.add_argument("--length", type=positive, default=384, help="tokens of text, question and answer")
    parser.add_argument("--valid", type=positive, default=500, help="questions held out of the train split")
    parser.add_argument("--limit", type=positive, default=2000, help="questions of the validation split, for the loss")
    parser.add_argument("--generate", type=positive, default=256, help="of these, questions that are answered")
    parser.add_argument("--longest", type=positive, default=100, help="tokens of a prompt or prefix at most")
    parser.add_argument("--full", action="store_true", help="full fine-tuning too, which takes the most memory")
    return run(EXPERIMENT, parser.parse_args(arguments), study)


if __name__ == "__main__":
    sys.exit(main())
