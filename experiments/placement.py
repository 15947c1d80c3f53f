"""Where does a field steer best? Every place of a block, alone and together, beside LoRA and DoRA, at equal budgets.

    python -m experiments.placement

Recall on a GPT-2, a Mamba and a Mamba-2, prose on a GPT-2 and a Mamba, digits on a ViT: the tasks of `retrieval` and
`compare_methods`, whose small backbones are kept in ~/.cache/residual-steer; no network, no GPU. Each place is tried
with the paper's start at zero (eq. 5), and one of them with the start of Houlsby et al. 2019 (arXiv 1902.00751) and
with a learned scale for every channel (Adapter+, arXiv 2406.06820). Prose and digits are spent on the places that a
default is chosen from. Every sweep goes on until its best rate has a worse one on both sides, LoRA's too. The first
seed goes everywhere, the others to those places, the three best and the rivals. `--task` runs some of the tasks, and
`experiments.ahead` runs many at once, on many cores.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import residual_steer as rs
from residual_steer import HRes
from residual_steer.errors import UnsuitableError
from residual_steer.training.loop import RATE_OF_FEW as RATE

from . import compare_methods, retrieval
from .backbones import small_tasks
from .harness import Experiment, Found, judged, parser_of, run
from .ledger import Ledger
from .paired import difference
from .problem import Arm, Problem, adapted, match_budget, rates_around, trainable
from .results import Axis, Column, Table, Verdict
from .sweep import Entry, every_run, sweep, widened
from .tables import bars, comparison, gap, measured, records, sweeps

EXPERIMENT = Experiment(
    name="placement",
    title="Where a field steers best",
    about="Fields at every place of a block, alone and together, LoRA, DoRA and the head alone, on small frozen "
    "backbones. All but the head train about as many parameters as H-Res of the given rank beside the block (eq. 1). "
    "Every sweep goes on, up to three rates beyond its first, until its best rate has a worse one on both sides. The "
    "best place is chosen on validation data, and compared with LoRA on test data. The first seed is run everywhere, "
    "the others for the places that a default is chosen from, the three that are best on validation data, and what is "
    "no field. Prose and digits are spent on the first of these, LoRA and the head.",
)
PAPER, RIVAL = "H-Res, block", "LoRA"
Layers = Sequence[int] | None
Place = Callable[..., dict[str, Any]]  # from a size and the blocks that are adapted to the options of `steer`


def at(*sites: str, more: Sequence[int] = (), ending: bool = False, **shape: Any) -> Place:
    """Return fields at sites of every block.

    Args:
        sites: as `steer` takes them.
        more: what is added to the size, site by site, since a rank does not cost the same everywhere.
        ending: whether those of the last site stand in the last block alone, where nothing reads it afterwards.
        **shape: other options of `steer`.
    """

    def options(size: int, layers: Layers) -> dict[str, Any]:
        if len(sites) == 1:
            return {"site": sites[0], "rank": size, **limited(layers), **shape}
        ranks: dict[str, Any] = {
            site: size + extra for site, extra in zip(sites, more or [0] * len(sites), strict=True)
        }
        if not ending:
            return {"site": list(sites), "rank": ranks, **limited(layers), **shape}
        everywhere = {site: rank if layers is None else dict.fromkeys(layers, rank) for site, rank in ranks.items()}
        return {"site": list(sites), "rank": {**everywhere, sites[-1]: {-1: ranks[sites[-1]]}}, **shape}

    return options


def limited(layers: Layers) -> dict[str, Any]:
    """Return the option that names the blocks that are adapted, none where that is all."""
    return {} if layers is None else {"layers": list(layers)}


LINEAR = {"activation": "identity", "bias": False}  # what a field at a linear map has beyond LoRA, taken away
PLACES: dict[str, Place] = {
    **{site: at(site) for site in ("block", "mixer", "mlp", "input", "after")},
    "input, linear": at("input", **LINEAR),
    "input + block": at("input", "block"),
    "input + after": at("input", "after"),
    "input + after, linear": at("input", "after", **LINEAR),
    "input + last after": at("input", "after", ending=True),
    # linear maps that LoRA adapts, family by family
    "in_proj": at("mixer.in_proj"),
    "in_proj + x_proj": at("mixer.in_proj", "mixer.x_proj", more=(0, 1)),
    "in_proj + x_proj, no biases": at("mixer.in_proj", "mixer.x_proj", bias=False),
    "in_proj + x_proj, linear": at("mixer.in_proj", "mixer.x_proj", **LINEAR),
    "in_proj + last after": at("mixer.in_proj", "after", ending=True),
    "in_proj + x_proj + last after": at("mixer.in_proj", "mixer.x_proj", "after", more=(0, 1, 1), ending=True),
    "in_proj + x_proj + last after, linear": at("mixer.in_proj", "mixer.x_proj", "after", ending=True, **LINEAR),
    "c_attn": at("mixer.c_attn"),
    "c_attn, linear": at("mixer.c_attn", **LINEAR),
    "c_attn + last after": at("mixer.c_attn", "after", more=(0, 3), ending=True),
    "qkv": at("mixer.qkv"),
    "qkv + last after": at("mixer.qkv", "after", more=(0, 3), ending=True),
    "query + value": at("mixer.query", "mixer.value"),
    "q_proj + v_proj": at("mixer.q_proj", "mixer.v_proj"),
}
# what all seeds are spent on from the beginning: where a family's default is chosen from, and what is no field
CANDIDATES = ("block", "input", "after", "input + after", "in_proj + x_proj", "c_attn", "qkv")
FIRST = (*(f"H-Res, {place}" for place in CANDIDATES), "LoRA", "head alone")


@torch.no_grad()
def houlsby(model: nn.Module) -> None:
    """Let fields start near the identity and not at it: both projections of a small normal distribution."""
    for steering in fields_of(model):
        for projection in (steering.down, steering.up):
            nn.init.trunc_normal_(projection.weight, std=0.01, a=-0.02, b=0.02)


def channel_scale(model: nn.Module) -> None:
    """Let fields learn a factor for every channel that they write to, 1 at the start."""
    for steering in fields_of(model):
        parametrize.register_parametrization(steering.up, "weight", Channels(steering.up.out_features))


class Channels(nn.Module):
    """Scale the rows of a weight, `(outputs, inputs)`."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.factors = nn.Parameter(torch.ones(outputs, 1))

    def forward(self, weight: Tensor) -> Tensor:
        """Return the scaled weight."""
        return self.factors * weight


def fields_of(model: nn.Module) -> Iterable[HRes]:
    """Return the fields of a model."""
    return (module for module in model.modules() if isinstance(module, HRes))


STARTS = {"Houlsby's start": houlsby, "scale by channel": channel_scale}


@dataclass(frozen=True)
class Task:
    """A problem, and how its places are compared."""

    problem: Problem
    column: Column  # of its metric
    centres: Mapping[str, float]  # of the first sweeps: `hres`, `lora`, `linear`, `full`
    scale: float = 1.0  # of the metric in tables
    rank: int = 8  # of H-Res beside the block, whose parameters are everybody's budget
    varied: tuple[str, ...] = ("input",)  # the places that are tried with other starts
    layers: Layers = None  # the blocks that are adapted; None for all
    rivals: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: {"LoRA": {}, "DoRA": {"dora": True}})
    places: tuple[str, ...] = tuple(PLACES)  # those that are tried

    @property
    def name(self) -> str:
        """The problem's."""
        return self.problem.name


def arms_of(task: Task, rates: int, places: Iterable[str]) -> list[Arm]:
    """Return H-Res at the places that the backbone has, LoRA, DoRA and the head."""
    problem = task.problem
    backbone = rs.find_backbone(problem.fresh(0))
    first = Arm("", "hres", (1.0,), PLACES["block"](task.rank, task.layers))
    budget = trainable(adapted(problem, first, 0))[0]
    tried = {method: rates_around(centre, rates) for method, centre in task.centres.items()}
    arms = []
    for place in places:
        sized = partial(PLACES[place], layers=task.layers)
        site = sized(1)["site"]
        if not ({site} if isinstance(site, str) else {*site}) <= {*backbone.sites, *backbone.projections}:
            continue
        options = match_budget(problem, "hres", sized, budget)
        arms.append(Arm(f"H-Res, {place}", "hres", tried["hres"], options))
        if place in task.varied:
            arms += [
                replace(arms[-1], name=f"{arms[-1].name}, {name}", change=change) for name, change in STARTS.items()
            ]
    for name, own in task.rivals.items():
        try:
            options = match_budget(problem, "lora", "rank", budget, **own, **limited(task.layers))
        except UnsuitableError:
            options = {"rank": 1}  # the sweep says why there is none
        arms.append(Arm(name, "lora", tried["lora"], options))
    if "linear" in tried:
        arms.append(Arm("head alone", "linear", tried["linear"]))
    return arms


def chosen(arms: Sequence[Arm], names: Sequence[str] | None) -> list[Arm]:
    """Return the arms of the given names, with the paper's place and LoRA, which everything is compared with."""
    return [arm for arm in arms if not names or arm.name in (PAPER, RIVAL, *names)]


def best_places(problem: Problem, entries: Sequence[Entry]) -> list[str]:
    """Return the names of the fields that ran with most seeds, those first that are best on validation data."""

    def worth(entry: Entry) -> float:
        at = [problem.worth(run.valid) for run in entry.every if run.rate == entry.rate and run.valid is not None]
        return statistics.fmean(at) if at else -math.inf

    fields = [entry for entry in entries if entry.arm.method == "hres"]
    most = max(len(entry.runs) for entry in fields)
    return [entry.arm.name for entry in sorted(fields, key=worth, reverse=True) if len(entry.runs) == most]


def finalists(problem: Problem, entries: Sequence[Entry]) -> list[str]:
    """Return which arms get all seeds: where a default is chosen from, the three best, and what is no field."""
    rivals = [entry.arm.name for entry in entries if entry.arm.method != "hres"]
    return [*rivals, *FIRST, *best_places(problem, entries)[:3]]


def default_entry(task: Task, entries: Sequence[Entry], seeds: Sequence[int], ledger: Ledger) -> Entry | None:
    """Return the field where `steer` puts it by default, at `fit`'s default rate; None where the study has no such."""
    site = rs.find_backbone(task.problem.fresh(0)).site
    places = [place for place, options in PLACES.items() if options(2, None)["site"] in (site, [*site])]
    arms = {entry.arm.name: entry.arm for entry in entries}
    found = [arms[f"H-Res, {place}"] for place in places if f"H-Res, {place}" in arms]
    return sweep(task.problem, [replace(found[0], rates=(RATE,))], seeds, ledger)[0] if found else None


def beside_defaults(tasks: Sequence[Task], results: Mapping[str, Sequence[Entry]], usual: Mapping[str, Entry]) -> Table:
    """Return a table of what the defaults reach beside the best rate at the same place, and the best place."""
    rows = []
    for task in (task for task in tasks if task.name in usual):
        key, entries, default = task.problem.metric, results[task.name], usual[task.name]
        same = next(entry for entry in entries if entry.arm.name == default.arm.name)
        best = next(entry for entry in entries if entry.arm.name == best_places(task.problem, entries)[0])
        one, other = ([task.scale * value for value in entry.results(key)] for entry in (default, same))
        whole = len(one) == len(other) > 1 and all(map(math.isfinite, one + other))
        found = difference(one, other) if whole else None
        rows.append({
            "task": f"{task.name}, {task.column.label}",
            "place": default.arm.name.removeprefix("H-Res, "),
            "default": measured(default, key, scale=task.scale),
            "rate": f"{same.rate:g}",
            "swept": measured(same, key, scale=task.scale),
            "gap": str(found or "–"),
            "best": f"{best.arm.name.removeprefix('H-Res, ')}, {best.rate:g}",
            "reached": measured(best, key, scale=task.scale),
        })  # fmt: skip
    columns = (
        Column("task", "task"),
        Column("place", "default place"),
        Column("default", f"at the default rate, {RATE:g}"),
        Column("rate", "best rate there"),
        Column("swept", "at that rate"),
        Column("gap", "default minus best rate"),
        Column("best", "best place and rate of all"),
        Column("reached", "there"),
    )
    notes = ("The best place is the best of several on validation data, the default is one: a lead of luck is in it.",)
    return Table("The defaults of steer and fit beside the best of a sweep, test data", columns, tuple(rows), notes)


def beside_lora(task: Task, entries: Sequence[Entry]) -> str:
    """Say how H-Res compares with LoRA: at the paper's place, where it is best as the paper has it, and at its best."""
    places = best_places(task.problem, entries)
    curved = next(place for place in places if not place.endswith("linear"))
    said = []
    for name in dict.fromkeys((PAPER, curved, places[0])):
        found = gap(entries, name, RIVAL, task.problem.metric, scale=task.scale)
        said.append(f"{name} minus LoRA: {found or 'cannot be said'}")
    lora = next(entry for entry in entries if entry.arm.name == RIVAL)
    edge = ", LoRA's rate at the edge of its sweep" if lora.at_edge else ""
    return f"{task.name}, {'; '.join(said)}{edge}"


def recall_task(name: str, options: argparse.Namespace) -> Task:
    """Return the recall of new associations."""
    backbone, _ = retrieval.get_backbone(name, options.cache, options.quick)
    sizes = retrieval.FEW if options.quick else retrieval.ROWS
    problem = retrieval.problem_of(name, backbone, 4 if options.quick else retrieval.ADAPTING[name], sizes)
    fields = 1e-2 if name == "GPT-2" else 3e-2
    return Task(
        replace(problem, name=f"recall, {name}"),
        Column("recall", "queries answered", "%", "up", 1),
        {"hres": fields, "lora": 3e-2, "linear": 1e-2},
        scale=100,
    )


def small_task(name: str, options: argparse.Namespace) -> Task:
    """Return prose for a small language model, digits for the small ViT."""
    (task,) = small_tasks(options.cache, options.quick, [name])
    problem = compare_methods.problem_of(task)
    if options.quick:
        problem = replace(problem, steps=4)
    about = "prose" if task.kind == "text" else "digits"
    digits = 3 if task.kind == "text" else 1
    column = Column("metric", task.unit, "", "down" if task.kind == "text" else "up", digits)
    centres = {"hres": 1e-2, "lora": 1e-2, "linear": 3e-2}
    few: dict[str, Any] = {"places": CANDIDATES, "varied": (), "rivals": {"LoRA": {}}}
    return Task(replace(problem, name=f"{about}, {name}"), column, centres, **few)


TASKS: dict[str, Callable[[argparse.Namespace], Task]] = {
    **{f"recall-{name}": lambda options, name=name: recall_task(name, options) for name in retrieval.STEPS},
    **{f"small-{name}": lambda options, name=name: small_task(name, options) for name in ("GPT-2", "Mamba", "ViT")},
}


def found_on(
    tasks: Iterable[Task],
    compare: Callable[[Task], list[Entry]],
    claims: Callable[..., list[Verdict]],
    title: str,
    usual_of: Callable[[Task, Sequence[Entry]], Entry | None],
) -> Found:
    """Compare on each task, and put it into tables, a picture and verdicts."""
    results: dict[str, list[Entry]] = {}
    usual: dict[str, Entry] = {}
    tables, every, known, steps = [], [], [], {}
    for task in tasks:
        entries = results[task.name] = compare(task)
        # runs of several processes and days: `benchmarks/places.py` takes times
        tables.append(comparison(task.name, task.problem, entries, task.column, scale=task.scale, timed=False))
        tables.append(sweeps(f"{task.name}: every rate", task.problem, entries, task.column, scale=task.scale))
        every += records(task.problem, entries)
        known.append(task)
        if (default := usual_of(task, entries)) is not None:
            usual[task.name] = default
        steps[task.name] = task.problem.steps
    units = sorted({f"{task.column.label} ({task.column.unit})" for task in known})
    key = known[0].problem.metric
    one = {task.name: results[task.name] for task in known if task.problem.metric == key}
    if usual:
        tables.append(beside_defaults(known, results, usual))
    return Found(
        tables=tables,
        plots=[bars(title, (Axis("task"), Axis(units[0])), one, key, scale=known[0].scale)],
        verdicts=claims(known, results),
        settings={"steps": steps},
        records=every,
        seconds=sum(run.seconds for entries in results.values() for run in every_run(entries)),
    )


def verdicts(tasks: Sequence[Task], results: Mapping[str, list[Entry]]) -> list[Verdict]:
    """Judge claim 1 on recall: H-Res better than LoRA, at the paper's place and at the best one."""
    said, won = [], []
    for task in (task for task in tasks if task.problem.metric == "recall"):
        said.append(beside_lora(task, results[task.name]))
        found = gap(results[task.name], best_places(task.problem, results[task.name])[0], RIVAL, "recall")
        won.append(found is not None and found.sign == 1)
    if not said:
        return []
    paper = "SQuAD validation loss 3.78 against 5.17 (LoRA)"
    ours = (
        "Queries recalled (MQAR) in per cent, at equal budgets, every rate swept past its best; linear fields at "
        f"linear maps have LoRA's form. {'. '.join(said)}."
    )
    return [Verdict(1, judged(won), paper, ours, "python -m experiments.placement")]


def study(options: argparse.Namespace, ledger: Ledger) -> Found:
    """Compare the places on each task."""

    def compare(task: Task) -> list[Entry]:
        arms = chosen(arms_of(task, options.rates, task.places), options.arm)
        return widened(task.problem, arms, range(options.seeds), ledger, finalists=partial(finalists, task.problem))

    def usual(task: Task, entries: Sequence[Entry]) -> Entry | None:
        return default_entry(task, entries, range(options.seeds), ledger)

    tasks = (TASKS[name](options) for name in options.task)
    return found_on(tasks, compare, verdicts, "Places", usual)


def main(arguments: list[str] | None = None) -> int:
    """Run the experiment; return the exit status."""
    parser = parser_of(EXPERIMENT, cache=True)
    parser.add_argument("--task", choices=TASKS, nargs="+", default=tuple(TASKS), help="what is learnt")
    parser.add_argument("--arm", nargs="+", help="rows of the table to run beside the paper's place and LoRA; all")
    return run(EXPERIMENT, parser.parse_args(arguments), study)


if __name__ == "__main__":
    sys.exit(main())
