"""Associative recall on a Transformer and on an SSM: which method teaches a frozen model new associations best?

    python -m experiments.retrieval

A small GPT-2 and a small Mamba are pre-trained to recall: a row shows four keys, each with its value, then asks for the
value of each (MQAR, arXiv 2312.04927). Frozen, they are adapted to other keys and values, with as many steps and rates
for every method, and as many parameters for all but the head and the whole model. The backbones are kept in
~/.cache/residual-steer; no network, no GPU.
"""

from __future__ import annotations

import argparse
import copy
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import residual_steer as rs
from residual_steer.data import TokenRows, mqar, recall

from .backbones import cached, folder_of, scan_linearly
from .harness import Experiment, Found, judged, parser_of, run, told
from .ledger import Ledger
from .problem import Arm, Problem, digest, match_budget, rates_around
from .results import Axis, Column, Verdict
from .sweep import Entry, every_run, sweep
from .tables import bars, comparison, gap, measured, records

EXPERIMENT = Experiment(
    name="retrieval",
    title="Associative recall (MQAR), Transformer and Mamba",
    about="A GPT-2 and a Mamba of two blocks of width 64, pre-trained to recall the values of four keys among 31 keys "
    "and 31 values, are adapted to 31 other keys and values. The GPT-2 has never seen their tokens; the Mamba has seen "
    "them in repeated patterns, but never as key and value. Every method but the head and full fine-tuning trains "
    "about as many parameters as H-Res of rank 8. The metric is the share of queries that are answered.",
)
VERSION = 2  # raise it when the code below changes what a backbone is
VOCABULARY, WIDTH, LENGTH, PAIRS, BATCH = 128, 64, 32, 4, 32
SOURCE = {"keys": range(1, 32), "values": range(32, 63)}
TARGET = {"keys": range(64, 95), "values": range(95, 126)}
RANK = 8  # of H-Res, whose parameters are everybody's budget
CHANCE = 100 / 31  # per cent: a guess among the values
ROWS = {"train": 8000, "valid": 250, "test": 500}
FEW = {"train": 128, "valid": 16, "test": 16}  # with --quick
SHAPE = {"vocab_size": VOCABULARY, "initializer_range": 0.1, "use_cache": False}
TOKENS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}


def build(name: str) -> nn.Module:
    """Return an untrained GPT-2, Mamba or Mamba-2."""
    import transformers

    torch.manual_seed(0)
    if name == "GPT-2":
        dropout = dict.fromkeys(("embd_pdrop", "resid_pdrop", "attn_pdrop"), 0.0)
        shape = {"n_embd": WIDTH, "n_layer": 2, "n_head": 4, "n_positions": 2 * LENGTH + 64, **dropout}
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape, **SHAPE, **TOKENS))
    shape = {"hidden_size": WIDTH, "num_hidden_layers": 2, "state_size": 16, "expand": 1}
    if name == "Mamba-2":
        shape |= {"num_heads": 4, "head_dim": WIDTH // 4, "n_groups": 1, "chunk_size": LENGTH}
        return transformers.Mamba2ForCausalLM(transformers.Mamba2Config(**shape, **SHAPE, **TOKENS))
    return transformers.MambaForCausalLM(transformers.MambaConfig(**shape, **SHAPE, **TOKENS))


STEPS = {"GPT-2": 1500, "Mamba": 3000, "Mamba-2": 3000}  # of the pre-training
ADAPTING = {
    "GPT-2": 200,
    "Mamba": 80,
    "Mamba-2": 80,
}  # steps of every method; one of the Mamba takes three times as long
# Share of the repeated patterns in the pre-training that may hold any token. Without them no method, full fine-tuning
# included, teaches this Mamba tokens that it has never seen; with them this GPT-2 recalls 96 % before it is adapted.
MET = {"GPT-2": 0.0, "Mamba": 0.5, "Mamba-2": 0.5}
# Centres of the sweeps: what a first sweep chose, so that few of the best lie at an edge.
RATES = {"lora": 9e-3, "prompt": 3e-2, "prefix": 3e-2, "linear": 1e-2}
RATES_OF = {"GPT-2": {**RATES, "hres": 1e-2, "full": 2e-3}, "Mamba": {**RATES, "hres": 9e-2, "full": 6e-3}}


def lessons(size: int, met: float) -> TokenRows:
    """Return what a backbone is pre-trained on: a quarter recall, and patterns repeated, which speed it up.

    Args:
        size: number of rows.
        met: share of the patterns that may hold any token, those of the new associations too.
    """
    recalled = mqar(size // 4, pairs=PAIRS, length=LENGTH, power=1.0, seed=1, **SOURCE)[:]
    repeated = patterns(size - size // 4, met)
    return TokenRows(**{name: torch.cat([recalled[name], repeated[name]]) for name in recalled})


def patterns(size: int, met: float) -> dict[str, Tensor]:
    """Return rows that each repeat a pattern of 3 to 16 tokens; what cannot be known has no label."""
    random = torch.Generator().manual_seed(2)
    period = torch.randint(3, LENGTH // 2 + 1, (size, 1), generator=random)
    below = torch.where(torch.rand(size, 1, generator=random) < met, VOCABULARY - 2, 63)
    tokens = 1 + (torch.rand(size, LENGTH // 2, generator=random) * (below - 1)).long()
    position = torch.arange(LENGTH).expand(size, LENGTH)
    ids = tokens.gather(1, position % period)
    return {"input_ids": ids, "labels": ids.masked_fill(position < period, -100)}


def rows(sizes: dict[str, int], split: str, seed: int, which: dict[str, range]) -> DataLoader[Any]:
    """Return rows of recall; no two splits or seeds share any."""
    number = 100 + 10 * seed + list(sizes).index(split)
    data = mqar(sizes[split], pairs=PAIRS, length=LENGTH, power=1.0, seed=number, **which)
    return DataLoader(data, batch_size=BATCH if split == "train" else 250, shuffle=split == "train")


def get_backbone(name: str, cache: Path, quick: bool) -> tuple[nn.Module, float]:
    """Return a backbone and what share of its own associations it recalls, from the cache or pre-trained now."""
    steps = 4 if quick else STEPS[name]

    def pretrain(model: nn.Module) -> dict[str, Any]:
        scan_linearly(model)
        loader = DataLoader(lessons(BATCH * steps, MET[name]), batch_size=BATCH, shuffle=True)
        rs.fit(model, loader, steps=steps, lr=3e-3, weight_decay=0.01, warmup=0.05, seed=0)
        return {"quality": recall(model, rows(FEW if quick else ROWS, "test", 0, SOURCE))}

    folder = folder_of(cache, f"recall-{name.lower()}", [VERSION, name, steps, torch.__version__])
    backbone, record, _ = cached(folder, partial(build, name), pretrain)
    return backbone, record["quality"]


def problem_of(name: str, backbone: nn.Module, steps: int, sizes: dict[str, int]) -> Problem:
    """Return the problem of one backbone."""

    def score(model: nn.Module, split: str, seed: int) -> dict[str, float]:
        loader = rows(sizes, split, seed, TARGET)
        return {"recall": recall(model, loader)}

    return Problem(
        name=name,
        fresh=lambda seed: copy.deepcopy(backbone),
        train=lambda seed: rows(sizes, "train", seed, TARGET),
        score=score,
        metric="recall",
        better="up",
        steps=steps,
        identity={"backbone": digest(backbone), "rows": sizes, "batch": BATCH, "version": VERSION},
    )


def arms_of(problem: Problem, rates: int) -> list[Arm]:
    """Return the methods, those that can be sized with about as many parameters as H-Res."""
    model = rs.steer(problem.fresh(0), rank=RANK)
    budget = sum(p.numel() for p in rs.parameters(model))
    rank, length = match_budget(problem, "lora", "rank", budget), match_budget(problem, "prompt", "length", budget)
    tried = {method: rates_around(centre, rates) for method, centre in RATES_OF[problem.name].items()}
    arms = [
        Arm("H-Res", "hres", tried["hres"], {"rank": RANK}),
        Arm("LoRA", "lora", tried["lora"], rank),
        Arm("prompt", "prompt", tried["prompt"], length),
        Arm("head alone", "linear", tried["linear"]),
        Arm("full fine-tuning", "full", tried["full"]),
    ]
    if problem.name == "GPT-2":  # a Mamba has no keys and values to extend
        length = match_budget(problem, "prefix", "length", budget)
        arms.insert(3, Arm("prefix", "prefix", tried["prefix"], length))
    return arms


def verdict(results: dict[str, list[Entry]]) -> Verdict:
    """Judge claim 1 by differences on the same seeds."""
    said, better, mute = [], [], []
    for name, entries in results.items():
        reached = [found.mean for entry in entries if (found := measured(entry, "recall", scale=100)) is not None]
        if max(reached, default=0.0) < 3 * CHANCE:
            mute.append(name)
            said.append(f"{name}: says nothing, since no method left chance, {CHANCE:.1f} %, in so few steps")
            continue
        for rival in ("LoRA", "prompt"):
            found = gap(entries, "H-Res", rival, "recall", scale=100)
            said.append(f"{name}, H-Res minus {rival}: {told(found)}")
            better.append(found is not None and found.sign == 1)
    return Verdict(
        1,
        judged([*better, *[False for _ in mute]]) if better else "can't be tested here",
        "SQuAD validation loss 3.78 against 5.17 (LoRA) and 5.61 (VPT)",
        f"Queries recalled (MQAR) in per cent, at equal budgets: {'; '.join(said)}.",
        "python -m experiments.retrieval",
        missing="SQuAD itself with GPT-2's weights: python -m experiments.squad",
    )


def study(options: argparse.Namespace, ledger: Ledger) -> Found:
    """Pre-train or read the backbones, then compare on each."""
    results: dict[str, list[Entry]] = {}
    tables, every, quality = [], [], {}
    sizes = FEW if options.quick else ROWS
    for name in RATES_OF:
        backbone, own = get_backbone(name, options.cache, options.quick)
        before = recall(backbone, rows(sizes, "test", 0, TARGET))
        quality[name] = {"source": own, "target before": before}
        print(f"{name}: recalls {own:.1%} of its own associations, {before:.1%} of the new", flush=True)
        problem = problem_of(name, backbone, 4 if options.quick else ADAPTING[name], sizes)
        results[name] = sweep(problem, arms_of(problem, options.rates), range(options.seeds), ledger)
        column = Column("recall", "queries answered", "%", "up", 1)
        tables.append(comparison(name, problem, results[name], column, scale=100, merged=True))
        every += records(problem, results[name])
    axes = Axis("backbone"), Axis("queries answered", "%")
    return Found(
        tables=tables,
        plots=[bars("Recall of new associations", axes, results, "recall", scale=100)],
        verdicts=[verdict(results)],
        settings={"rows": sizes, "batch": BATCH, "pairs": PAIRS, "length": LENGTH, "recall of the backbones": quality},
        records=every,
        seconds=sum(one.seconds for entries in results.values() for one in every_run(entries)),
    )


def main(arguments: list[str] | None = None) -> int:
    """Run the experiment; return the exit status."""
    return run(EXPERIMENT, parser_of(EXPERIMENT, cache=True).parse_args(arguments), study)


if __name__ == "__main__":
    sys.exit(main())
