"""The comparison is fair, chooses on validation data alone, and never does again what is finished."""

import copy
import math
import sys
from dataclasses import replace

import pytest
import torch
from torch.utils.data import DataLoader

import residual_steer as rs
from experiments.ledger import Ledger
from experiments.problem import Arm, adapted
from experiments.sweep import every_run, sweep
from residual_steer.training.losses import measure
from studies import (
    DIVERGES,
    HRES,
    LINEAR,
    LORA,
    PROMPT,
    STEPS,
    Images,
    counted_steps,
    distance,
    fragile,
    fresh,
    measured_on_images,
    problem_of,
    scores_of,
)

pytest.importorskip("timm")
pytest.importorskip("peft")

ARMS, SEEDS = [HRES, LORA, PROMPT, LINEAR], (3, 0)
RUNS = (3 + 1) + (2 + 1) + (1 + 1)


def compare(problem, arms, seeds=(0,), ledger=None):
    return sweep(problem, arms, seeds, ledger, progress=False)


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A whole study, its ledger and how many steps it took."""
    path = tmp_path_factory.mktemp("study") / "ledger.jsonl"
    with counted_steps() as steps:
        entries = compare(problem_of(), ARMS, SEEDS, Ledger(path))
    return entries, path, len(steps)


def test_every_rate_is_tried_with_the_first_seed_and_the_best_used_with_all(first):
    entries, _, steps = first
    assert [entry.arm for entry in entries] == ARMS
    assert steps == RUNS * STEPS
    for entry in (entries[0], entries[1], entries[3]):
        assert [(run.rate, run.seed) for run in entry.trials] == [(rate, SEEDS[0]) for rate in entry.arm.rates]
        assert [(run.rate, run.seed) for run in entry.runs] == [(entry.rate, seed) for seed in SEEDS]
        assert entry.runs[0] in entry.trials
        assert entry.rate == min(entry.trials, key=lambda run: run.valid["loss"]).rate
        assert len(entry.every) == len(entry.arm.rates) + len(SEEDS) - 1
        assert entry.results("loss") == [run.test["loss"] for run in entry.runs]
        assert all(run.seconds > run.seconds_per_step > 0 for run in entry.every)
        assert entry.refused == ""
    assert len(every_run(entries)) == RUNS


def test_scores_are_those_of_the_same_training_by_hand(first):
    run = first[0][0].runs[1]
    model = fresh(run.seed)
    torch.manual_seed(run.seed)
    rs.steer(model, rank=2, train="head")
    data = DataLoader(Images(seed=run.seed), batch_size=4, shuffle=True)
    rs.fit(model, data, steps=STEPS, lr=run.rate, seed=run.seed, progress=False)
    assert measured_on_images(model, "valid", run.seed) == run.valid
    assert measured_on_images(model, "test", run.seed) == run.test
    sizes = [parameter.numel() for parameter in model.parameters()]
    assert (run.trainable, run.total) == (sum(p.numel() for p in rs.parameters(model)), sum(sizes))


def test_a_method_that_makes_no_sense_is_listed_with_its_reason_and_trains_nothing(first):
    refused = first[0][2]
    assert "'vpt-shallow'" in refused.refused
    assert (refused.rate, refused.trials, refused.runs, refused.every) == (None, (), (), ())
    assert refused.results("loss") == []
    assert not refused.at_edge


def test_what_is_asked_wrongly_is_no_refusal():
    for arm in (Arm("a", "lora", (1e-2,), {"rnak": 2}), Arm("a", "hres", (1e-2,), {"rank": 99}), Arm("a", "x", (1,))):
        with pytest.raises(rs.SteerError, match=r"received 99|no option 'rnak'|received 'x'"):
            compare(problem_of(), [arm])


def test_lora_is_measured_again_merged(first):
    entries = first[0]
    for run in entries[1].every:
        assert run.merged["loss"] == pytest.approx(run.test["loss"], rel=1e-5)
        assert run.merged is not run.test
    assert entries[1].results("loss", merged=True) == [run.merged["loss"] for run in entries[1].runs]
    assert all(run.merged is None for entry in (entries[0], entries[3]) for run in entry.every)
    assert entries[0].results("loss", merged=True) == []


def test_merged_scores_are_those_of_a_merged_model():
    def score(model, split, seed):
        return {"loss": 0.5, "peft": float(any("lora" in name for name, _ in model.named_parameters()))}

    (entry,) = compare(problem_of(score=score), [LORA])
    assert [run.test["peft"] for run in entry.every] == [1.0, 1.0]
    assert [run.merged["peft"] for run in entry.every] == [0.0, 0.0]


def test_a_second_call_trains_nothing_and_says_the_same(first):
    entries, path, _ = first
    before = path.read_bytes()
    with counted_steps() as steps:
        assert compare(problem_of(), ARMS, SEEDS, Ledger(path)) == entries
    assert steps == []
    assert path.read_bytes() == before


def test_what_shows_in_tables_alone_trains_nothing(first):
    with counted_steps() as steps:
        compare(problem_of(metric="accuracy", better="up"), [replace(LINEAR, name="another")], SEEDS, Ledger(first[1]))
    assert steps == []


def test_a_study_that_was_cut_off_goes_on_where_it_was(first, tmp_path):
    finished = []

    def score(model, split, seed):
        finished.append(split)
        if len(finished) == 2 * 2 + 1:
            raise KeyboardInterrupt
        return measured_on_images(model, split, seed)

    path = tmp_path / "ledger.jsonl"
    with pytest.raises(KeyboardInterrupt):
        compare(problem_of(score=score), ARMS, SEEDS, Ledger(path))
    assert len(Ledger(path)) == 2
    with counted_steps() as steps:
        entries = compare(problem_of(), ARMS, SEEDS, Ledger(path))
    assert len(steps) == (RUNS - 2) * STEPS
    assert scores_of(entries) == scores_of(first[0])


@pytest.mark.parametrize(
    ("problem", "arm", "seeds", "steps"),
    [
        ({"identity": {"rows": 17}}, {}, SEEDS, 2 * STEPS),
        ({"name": "others"}, {}, SEEDS, 2 * STEPS),
        ({"steps": STEPS + 1}, {}, SEEDS, 2 * (STEPS + 1)),
        ({"fit": {"weight_decay": 0.5}}, {}, SEEDS, 2 * STEPS),
        ({"train_also": ()}, {}, SEEDS, 2 * STEPS),
        ({}, {"method": "hres", "options": {"rank": 1}}, SEEDS, 2 * STEPS),
        ({}, {"method": "bitfit"}, SEEDS, 2 * STEPS),
        ({}, {"rates": (2e-2,)}, SEEDS, 2 * STEPS),
        ({}, {}, (*SEEDS, 7), STEPS),
        ({}, {}, SEEDS[:1], 0),
    ],
)
def test_whatever_changes_a_run_makes_it_anew(first, tmp_path, problem, arm, seeds, steps):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.path.write_bytes(first[1].read_bytes())
    with counted_steps() as taken:
        compare(problem_of(**problem), [replace(LINEAR, **arm)], seeds, Ledger(ledger.path))
    assert len(taken) == steps


def test_the_same_seeds_give_the_same_scores_whatever_ran_before(first):
    torch.manual_seed(12345)
    again = compare(problem_of(), ARMS[::-1], SEEDS)
    assert scores_of(again[::-1]) == scores_of(first[0])
    one, other = first[0][3].runs
    assert one.test != other.test


def test_the_seed_reaches_new_parts_weights_and_the_order_of_the_data():
    built, loaders = [], []

    def train(seed):
        loaders.append((seed, Images(seed=0)))
        return DataLoader(loaders[-1][1], batch_size=4, shuffle=True)

    def fresh_one(seed):
        built.append(seed)
        return fresh(0)

    problem = problem_of(fresh=fresh_one, train=train)
    entries = compare(problem, [HRES, LINEAR], (5, 6))
    assert built == [run.seed for run in every_run(entries)]
    orders = {}
    for seed, data in loaders:
        orders.setdefault(seed, set()).add(tuple(data.asked[: 4 * STEPS]))
    assert {seed: len(found) for seed, found in orders.items()} == {5: 1, 6: 1}  # the same for every method
    assert orders[5] != orders[6]

    weights = [adapted(problem, LORA, seed).state_dict() for seed in (5, 6, 5)]
    name = next(name for name in weights[0] if "lora_A" in name)
    assert torch.equal(weights[0][name], weights[2][name])
    assert not torch.equal(weights[0][name], weights[1][name])


@pytest.mark.parametrize(("better", "rate"), [("up", 1e-1), ("down", 1e-3)])
def test_validation_scores_choose_and_test_scores_do_not(better, rate):
    arm = replace(LINEAR, rates=(1e-2, 1e-1, 1e-3))
    (entry,) = compare(problem_of(score=distance, metric="far", better=better), [arm])
    by_test = sorted(entry.trials, key=lambda run: run.test["far"])
    assert entry.rate == rate
    assert entry.rate == (by_test[0] if better == "up" else by_test[-1]).rate  # the worst there
    assert entry.runs[0].test["far"] == -entry.runs[0].valid["far"]


def test_of_equally_good_rates_the_first_is_chosen():
    arm = replace(LINEAR, rates=(1e-2, 1e-1, 1e-3))
    for better in ("up", "down"):
        (entry,) = compare(problem_of(score=lambda *_: {"s": 1}, metric="s", better=better), [arm])
        assert entry.rate == 1e-2
        assert not entry.at_edge


def test_the_edge_of_three_rates_or_more():
    def edge(rates, better):
        arm = replace(LINEAR, rates=rates)
        (entry,) = compare(problem_of(score=distance, metric="far", better=better, steps=1), [arm])
        return entry.at_edge

    assert edge((1e-2, 1e-1, 1e-3), "up")
    assert edge((1e-2, 1e-1, 1e-3), "down")
    assert not edge((1e-2, 1e-1), "up")
    assert not edge((1e-2,), "up")


@pytest.mark.parametrize("better", ["up", "down"])
@pytest.mark.parametrize("arm", [LINEAR, LORA], ids=lambda arm: arm.method)
@pytest.mark.parametrize("steps", [1, 2])  # after a single step no loss says that the weights are lost
def test_a_rate_that_diverges_is_not_chosen(better, arm, steps):
    arm = replace(arm, rates=(DIVERGES, 1e-3))
    problem = problem_of(metric="accuracy", better=better, steps=steps, **fragile())
    (entry,) = compare(problem, [arm])
    lost, kept = entry.trials
    assert (lost.valid, lost.test, lost.merged, lost.seconds_per_step) == (None, None, None, None)
    assert lost.trainable == kept.trainable
    assert entry.rate == kept.rate == 1e-3
    assert entry.results("accuracy") == [kept.test["accuracy"]]


def test_a_method_that_diverges_everywhere_is_reported_and_the_others_go_on(tmp_path):
    arms = [replace(LINEAR, name="lost", rates=(DIVERGES, DIVERGES / 10)), LINEAR]
    with counted_steps() as steps:
        lost, kept = compare(problem_of(**fragile()), arms, SEEDS, Ledger(tmp_path / "ledger.jsonl"))
    assert len(steps) == 2 * 1 + 2 * STEPS  # each lost one found out at its second loss
    assert (lost.rate, lost.runs, len(lost.trials), lost.refused) == (None, (), 2, "")
    assert lost.results("loss") == []
    assert kept.rate == 1e-2
    with counted_steps() as steps:
        compare(problem_of(**fragile()), arms, SEEDS, Ledger(tmp_path / "ledger.jsonl"))
    assert steps == []


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("better", ["up", "down"])
def test_a_score_that_is_no_number_is_not_chosen(value, better, tmp_path):
    def score(model, split, seed):
        far = distance(model, "valid", seed)["far"] > 0.2
        return {"s": value if far else 1.0}

    arm = replace(LINEAR, rates=(1.0, 1e-4))
    ledger = Ledger(tmp_path / "ledger.jsonl")
    (entry,) = compare(problem_of(score=score, metric="s", better=better, steps=1), [arm], (0,), ledger)
    assert entry.rate == 1e-4
    assert repr(entry.trials[0].valid["s"]) == repr(value)
    (again,) = compare(problem_of(score=score, metric="s", better=better, steps=1), [arm], (0,), Ledger(ledger.path))
    assert repr(again) == repr(entry)


def test_a_seed_that_diverges_keeps_its_place():
    def train(seed):
        return DataLoader(Images(seed=seed, spoilt=seed == 1), batch_size=4)

    (entry,) = compare(problem_of(train=train), [LORA], (0, 1, 2))
    for merged in (False, True):
        found = entry.results("loss", merged=merged)
        assert [math.isnan(value) for value in found] == [False, True, False]
    assert entry.runs[1].test is None


def test_loss_and_options_of_fit_are_used():
    taken = []

    def loss(model, batch):
        taken.append(len(batch[0]))
        return measure(model, batch, None).loss

    compare(problem_of(loss=loss, fit={"accumulate": 2}), [LINEAR])
    assert taken == [4] * 2 * STEPS


def test_scores_become_plain_numbers_and_the_metric_is_asked_for():
    def score(model, split, seed):
        return {"a": torch.tensor(0.5), "b": 2}

    (entry,) = compare(problem_of(score=score, metric="a"), [LINEAR])
    assert entry.runs[0].test == {"a": 0.5, "b": 2.0}
    assert type(entry.runs[0].test["a"]) is float
    with pytest.raises(rs.SteerError, match="a score is one of a, b; received 'c'"):
        entry.results("c")
    ledger = Ledger()
    with pytest.raises(rs.SteerError, match="`score` returns 'loss' among its numbers; received a, b"):
        compare(problem_of(score=score), [LINEAR], (0,), ledger)
    assert len(ledger) == 0


@pytest.mark.parametrize(
    ("arms", "seeds", "words"),
    [
        ([], (0,), r"arms are one or more of different names; received \[\]"),
        ([LINEAR, replace(LORA, name=LINEAR.name)], (0,), "received .'head alone', 'head alone'"),
        ([LINEAR], (), "seeds are one or more different integers from 0"),
        ([LINEAR], (1, 1), r"received \[1, 1\]"),
        ([LINEAR], (0, True), r"received \[0, True\]"),
        ([LINEAR], (-1,), r"received \[-1\]"),
        ([LINEAR], (0.0,), r"received \[0\.0\]"),
        ([replace(LINEAR, options={"a": object()})], (0,), "a result and its key are plain"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_is_trained(arms, seeds, words):
    with counted_steps() as steps, pytest.raises(rs.SteerError, match=words):
        compare(problem_of(), arms, seeds)
    assert steps == []


def test_the_backbone_of_a_problem_is_never_trained_twice():
    """A copy that `fresh` hands out is changed; a model that it hands out again would carry a method already."""
    model = fresh(0)
    before = copy.deepcopy(model.state_dict())
    compare(problem_of(fresh=lambda seed: copy.deepcopy(model)), [replace(LINEAR, method="full")])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(rs.SteerError, match="one method at a time"):
        compare(problem_of(fresh=lambda seed: model), [HRES])


def test_a_bar_is_shown_on_a_terminal_if_it_is_wanted(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    sweep(problem_of(), [LINEAR, PROMPT], (0,))
    assert "images" in capsys.readouterr().err
    sweep(problem_of(), [LINEAR], (0,), progress=False)
    assert capsys.readouterr().err == ""
