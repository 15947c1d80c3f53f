"""Problems whose reported runs train on other data than those that choose the learning rate."""

import dataclasses
import sys

import pytest
import torch
from torch import nn

import residual_steer as rs
from experiments.ledger import Ledger
from experiments.problem import Arm, Problem
from experiments.results import Column
from experiments.sweep import every_run, sweep
from experiments.tables import comparison, records
from residual_steer.training import progress


class Stack(nn.Module):
    """A block and a head."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(4, 4))])
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.blocks[0](x))


@pytest.fixture
def made():
    """A problem, with what its loaders and its measure were called with."""
    rs.register_backbone("stack-of-one", matches=[f"{Stack.__module__}.Stack"])(
        lambda model: rs.Backbone(blocks=model.blocks, width=4)
    )
    calls = []

    def loader(name):
        def load(seed):
            calls.append((name, seed))
            x = torch.randn(8, 4, generator=torch.Generator().manual_seed(len(name)))
            return [(x, (x[:, 0] > 0).long())]

        return load

    def score(model, split, seed):
        calls.append((split, seed))
        return {"weight": model.head.weight.abs().sum().item()}

    def fresh(seed):
        torch.manual_seed(seed)
        return Stack()

    problem = Problem("two parts", fresh, loader("some"), score, "weight", "up", 3, {}, ("head",))
    return dataclasses.replace(problem, retrain=loader("all of it")), calls


ARM = Arm("head", "linear", (1e-3, 1e-1))


def test_what_chooses_and_what_is_reported_are_apart(made):
    problem, calls = made
    ledger = Ledger()
    (entry,) = sweep(problem, [ARM], [3, 5], ledger, progress=False)
    assert calls == [
        *[("some", 3), ("valid", 3)] * 2,
        *[("all of it", 3), ("test", 3), ("all of it", 5), ("test", 5)],
    ]
    assert entry.rate == 1e-1  # the head grows most with it
    assert [(run.rate, run.seed) for run in entry.trials] == [(1e-3, 3), (1e-1, 3)]
    assert [(run.rate, run.seed) for run in entry.runs] == [(1e-1, 3), (1e-1, 5)]
    assert all(run.valid and run.test is None for run in entry.trials)
    assert all(run.test and run.valid is None for run in entry.runs)
    assert len(entry.results("weight")) == 2
    assert len(every_run([entry])) == len(records(problem, [entry])) == len(ledger) == 4
    del calls[:]
    assert sweep(problem, [ARM], [3, 5], ledger, progress=False) == [entry]
    assert calls == []


def test_the_data_make_the_difference(made):
    problem, _ = made
    (entry,) = sweep(problem, [ARM], [3], progress=False)
    one, other = entry.trials[1].valid["weight"], entry.runs[0].test["weight"]
    assert one != other
    (same,) = sweep(dataclasses.replace(problem, retrain=problem.train), [ARM], [3], progress=False)
    assert same.runs[0].test["weight"] == pytest.approx(one)


def test_runs_of_both_kinds_of_problem_share_a_ledger(made):
    problem, _ = made
    ledger = Ledger()
    (apart,) = sweep(problem, [ARM], [3], ledger, progress=False)
    (plain,) = sweep(dataclasses.replace(problem, retrain=None), [ARM], [3], ledger, progress=False)
    assert len(ledger) == 5
    assert plain.runs == (plain.trials[1],)
    assert plain.runs[0].valid is not None
    assert plain.runs[0].test is not None
    assert apart.trials[1].test is None


def test_lora_is_merged_where_it_is_reported(made):
    problem, calls = made
    pytest.importorskip("peft")
    (entry,) = sweep(problem, [Arm("LoRA", "lora", (1e-2,), {"rank": 1})], [3], progress=False)
    assert entry.trials[0].merged is None
    assert entry.runs[0].merged == pytest.approx(entry.runs[0].test)
    assert [split for split, _ in calls] == ["some", "valid", "all of it", "test", "test"]


def test_nothing_is_reported_where_all_diverged(made):
    problem, calls = made
    infinite = dataclasses.replace(problem, loss=lambda model, batch: model.head.weight.sum() * float("inf"))
    (entry,) = sweep(infinite, [ARM], [3], progress=False)
    assert (entry.rate, entry.runs, len(entry.trials)) == (None, (), 2)
    assert [name for name, _ in calls] == ["some", "some"]


def test_the_table_says_so(made):
    problem, _ = made
    column = Column("weight", "weight")
    for retrain, said in ((problem.retrain, True), (None, False)):
        other = dataclasses.replace(problem, retrain=retrain)
        table = comparison("title", other, sweep(other, [ARM], [3, 5], progress=False), column)
        assert ("where training takes the validation data too" in table.notes[0]) == said
        assert table.rows[0]["weight"].count == 2


def test_the_bar_counts_every_run(made, monkeypatch):
    problem, _ = made
    bars = []
    module = sys.modules["experiments.sweep"]

    def bar(**options):
        bars.append(progress(**{**options, "disable": False}))
        return bars[-1]

    monkeypatch.setattr(module, "progress_bar", bar)
    infinite = dataclasses.replace(problem, loss=lambda model, batch: model.head.weight.sum() * float("inf"))
    for other in (problem, infinite, dataclasses.replace(problem, retrain=None)):
        sweep(other, [ARM], [3, 5])
    assert [(bar.n, bar.total) for bar in bars] == [(4, 4), (4, 4), (3, 3)]
