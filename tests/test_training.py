"""fit and evaluate: what a run does, what it refuses, and what it leaves as it was."""

import ast
import math
import random
from pathlib import Path

import pytest
import safetensors.torch
import torch
from accelerate import Accelerator
from accelerate.state import is_initialized
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import residual_steer as rs
from cases import TABLE
from residual_steer.errors import DivergedError
from residual_steer.training import FitOptions, evaluate, next_token_loss
from residual_steer.training.losses import measure
from runs import classifier, fit, pairs, same, weights


def test_few_parameters_train_at_a_larger_rate_unless_one_is_given():
    few = classifier()
    few[0].requires_grad_(False)
    few[3].weight.requires_grad_(False)  # 3 of 67 parameters train
    for model, rate, peak in ((classifier(), None, 1e-3), (few, None, 2e-2), (few, 3e-3, 3e-3)):
        history = fit(model, pairs(), lr=rate, schedule="constant", warmup=0, log_every=1)
        assert {row["lr"] for row in history.train} == {peak}


def test_it_learns_and_reports():
    model, data = classifier(), pairs()
    before = evaluate(model, data)
    history = fit(model, data, data, steps=60, lr=3e-2, log_every=20, eval_every=30)
    after = evaluate(model, data)
    assert after["loss"] < before["loss"] / 2
    assert after["accuracy"] > before["accuracy"] + 0.2
    assert [record["step"] for record in history.train] == [20, 40, 60]
    assert [record["step"] for record in history.valid] == [30, 60]
    assert history.valid[-1]["loss"] == pytest.approx(after["loss"])
    assert history.seconds_per_step > 0
    assert history.train[0].keys() == {"step", "loss", "lr", "grad_norm", "samples_per_s", "seconds_per_step"}
    assert "accuracy" in str(history)


def test_only_what_requires_a_gradient_moves():
    model = classifier()
    model[0].requires_grad_(False)
    before = weights(model)
    fit(model, pairs())
    after = weights(model)
    assert all(torch.equal(before[key], after[key]) == key.startswith("0.") for key in before)


def test_same_seed_same_weights_and_other_seed_others():
    runs = []
    for seed in (0, 0, 1):
        model = classifier()
        torch.rand(random.randrange(50))  # whatever happened before does not matter
        fit(model, pairs(), seed=seed)
        runs.append(weights(model))
    assert same(runs[0], runs[1])
    assert not same(runs[0], runs[2])


def test_evaluation_does_not_change_the_run():
    one, other = classifier(), classifier()
    fit(one, pairs())
    fit(other, pairs(), pairs(), eval_every=1)
    assert same(weights(one), weights(other))


def test_accumulated_batches_are_one_large_batch():
    one, other = classifier().eval(), classifier().eval()
    one[2].p = other[2].p = 0.0
    for model, batch, accumulate in ((one, 8, 1), (other, 4, 2)):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        fit(model, pairs(batch=batch, shuffle=False), optimizer=optimizer, accumulate=accumulate, clip=None)
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_clipping_bounds_the_step():
    model = classifier()
    before, plain = weights(model), torch.optim.SGD(model.parameters(), lr=1.0)
    fit(model, pairs(), steps=1, clip=1e-3, warmup=0, schedule="constant", optimizer=plain)
    moved = math.sqrt(sum(float((weights(model)[key] - before[key]).square().sum()) for key in before))
    assert moved == pytest.approx(1e-3, rel=1e-2)


def test_the_learning_rate_follows_warmup_and_cosine():
    model = classifier()
    history = fit(model, pairs(), steps=20, lr=0.1, warmup=4, log_every=1)
    expected = [0.1 * (step + 1) / 5 for step in range(4)]
    expected += [0.05 * (1 + math.cos(math.pi * step / 16)) for step in range(16)]
    assert [record["lr"] for record in history.train] == pytest.approx(expected)


@given(st.integers(1, 500), st.floats(0, 0.9), st.sampled_from(["cosine", "constant"]))
def test_the_schedule_rises_then_never_rises(steps, warmup, schedule):
    factors = [FitOptions(warmup=warmup, schedule=schedule).factor(step, steps) for step in range(steps)]
    top = factors.index(max(factors))
    assert factors[: top + 1] == sorted(factors[: top + 1])
    assert factors[top:] == sorted(factors[top:], reverse=True)
    assert all(0 <= factor <= 1 for factor in factors)


def test_modes_and_forward_are_given_back():
    model = classifier()
    model[0].eval()
    model[2].train()
    modes = [module.training for module in model.modules()]
    fit(model, pairs(), pairs(), precision="bf16")
    assert [module.training for module in model.modules()] == modes
    assert not {"forward", "_original_forward"} & set(model.__dict__)


def test_evaluate_is_the_mean_over_rows_not_over_batches():
    model, data = classifier(), pairs(rows=21, batch=8)
    x, y = data.dataset.tensors
    with torch.no_grad():
        logits = model.eval()(x)
    model.train()
    found = evaluate(model, data)
    assert found["loss"] == pytest.approx(float(nn.functional.cross_entropy(logits, y)), rel=1e-6)
    assert found["accuracy"] == pytest.approx(float((logits.argmax(-1) == y).float().mean()))
    assert model.training


def test_evaluate_weighs_labels_that_count():
    class Constant(nn.Module):
        def forward(self, input_ids, labels):
            return {"loss": input_ids.float().mean()}

    labels = [torch.full((1, 4), 1), torch.tensor([[1, -100, -100, -100]])]
    batches = [{"input_ids": torch.full((1, 4), value), "labels": y} for value, y in zip((1, 6), labels, strict=True)]
    assert evaluate(Constant(), batches)["loss"] == pytest.approx((4 * 1 + 1 * 6) / 5)


def test_next_token_loss_is_transformers_own():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_layer=1, n_embd=8, n_head=2, n_positions=8, vocab_size=11, bos_token_id=0, eos_token_id=0
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    ids = torch.randint(0, 11, (3, 8))
    labels = torch.where(torch.rand(3, 8) < 0.3, -100, ids)
    batch = {"input_ids": ids, "labels": labels}
    torch.testing.assert_close(next_token_loss(model, batch), model(**batch).loss)


def test_a_bad_loss_stops_the_run_and_keeps_the_last_good_state(tmp_path):
    model = classifier()
    kept = []

    def loss(model, batch):
        kept.append(weights(model))
        value = nn.functional.cross_entropy(model(batch[0]), batch[1])
        return value * float("nan") if len(kept) == 4 else value

    with pytest.raises(DivergedError, match=r"loss became nan at step 4 of 6.*after step 3.*checkpoint-2"):
        fit(model, pairs(), loss=loss, save_to=tmp_path, checkpoint_every=2)
    assert same(weights(model), kept[3])
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    stored = safetensors.torch.load_file(tmp_path / "checkpoint-2" / "shared.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in stored.values())


def test_a_gradient_that_is_not_finite_stops_the_run_too():
    model = classifier()
    before = weights(model)

    def loss(model, batch):
        return model(batch[0]).sub(model(batch[0]).detach()).abs().sum().sqrt()  # 0 with an infinite slope

    model.eval()
    model[2].p = 0.0
    with pytest.raises(rs.SteerError, match="gradient's norm became"):
        fit(model, pairs(), loss=loss)
    assert same(weights(model), before)


REFUSED = [
    ({"steps": 0}, "`steps` .* 1; received 0"),
    ({"lr": -1.0}, "`lr` .* above 0; received -1.0"),
    ({"lr": True}, "`lr` .*; received True"),
    ({"epochs": 3}, "no option 'epochs'; it has weight_decay"),
    ({"schedule": "linear"}, "`schedule` .*cosine, constant; received 'linear'"),
    ({"precision": "fp8"}, "`precision` .*bf16, fp16, or None; received 'fp8'"),
    ({"accumulate": 0}, "`accumulate` .* 1; received 0"),
    ({"log_every": 2.5}, "`log_every` .* 1; received 2.5"),
    ({"eval_every": 0}, "`eval_every` .* 1, or None; received 0"),
    ({"checkpoint_every": True}, "`checkpoint_every` .* 1, or None; received True"),
    ({"weight_decay": -1}, "`weight_decay` .* 0; received -1"),
    ({"warmup": float("nan")}, "`warmup` .* 0; received nan"),
    ({"clip": 0}, "`clip` .* above 0, or None .*; received 0"),
    ({"seed": -1}, "`seed` .* from 0 to 4294967295, or None; received -1"),
    ({"seed": "a"}, "`seed` .*; received 'a'"),
    ({"cache_limit": -1}, "`cache_limit` .* 0; received -1"),
    ({"resume": "runs"}, "`resume` is True or False; received 'runs'"),
    ({"trackers": "tensorboard"}, "`trackers` is a list of names; received 'tensorboard'"),
    ({"trackers": ["tensorboard"]}, "need `save_to`"),
    ({"resume": True}, "need `save_to`"),
    ({"loss": 3}, "`loss` is a function .* received 3"),
    ({"save_to": 5}, "a folder is a path; received 5"),
    ({"valid": 5}, "`valid` is a DataLoader.* received int"),
    ({"valid": []}, "`valid` gave no batch"),
    ({"valid": iter([1])}, "`valid` is a DataLoader.*every epoch"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_what_cannot_be_is_refused_before_anything_runs(options, message):
    model = classifier()
    before = weights(model)
    with pytest.raises(rs.SteerError, match=message):
        fit(model, pairs(), **options)
    assert same(weights(model), before)


def test_bad_data():
    class Nothing(IterableDataset):
        def __iter__(self):
            return iter(())

    with pytest.raises(rs.SteerError, match="gave no batch"):
        fit(classifier(), DataLoader(Nothing()))
    with pytest.raises(rs.SteerError, match="nothing to evaluate"):
        evaluate(classifier(), [])
    with pytest.raises(rs.SteerError, match=r"a dict or a pair.*is a Tensor"):
        measure(classifier(), torch.zeros(2, 4))
    with pytest.raises(rs.SteerError, match="scalar tensor; received \\(2, 3\\)"):
        measure(classifier(), torch.zeros(2, 4), lambda model, batch: model(batch))
    with pytest.raises(rs.SteerError, match="Add 'labels'"):
        measure(nn.Identity(), {"input": torch.zeros(2, 4)})
    frozen = classifier().requires_grad_(False)
    with pytest.raises(rs.SteerError, match="nothing to train"):
        fit(frozen, pairs())


def test_a_run_leaves_accelerate_as_it_was(monkeypatch):
    plain = fit(classifier(), pairs(), log_every=1)
    half = fit(classifier(), pairs(), precision="bf16", log_every=1)
    assert not is_initialized()  # accelerate's shared state
    assert half.train[0]["loss"] != plain.train[0]["loss"]
    assert half.train[0]["loss"] == pytest.approx(plain.train[0]["loss"], rel=2e-2)
    mine = Accelerator(mixed_precision="bf16", gradient_accumulation_steps=4)  # another than the first run's
    try:
        for precision, expected in (("no", plain), ("bf16", half), (None, half)):
            model = classifier()
            found = fit(model, pairs(), precision=precision, log_every=1)
            assert [r["grad_norm"] for r in found.train] == [r["grad_norm"] for r in expected.train]
            assert not {"forward", "_original_forward"} & set(vars(model))
        assert (mine.mixed_precision, mine.gradient_accumulation_steps) == ("bf16", 4)
    finally:
        vars(mine.state).clear()
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    again = fit(classifier(), pairs(), log_every=1)
    assert [r["grad_norm"] for r in plain.train] == [r["grad_norm"] for r in again.train]
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert fit(classifier(), pairs(), log_every=1).train[0]["loss"] == half.train[0]["loss"]
    assert not is_initialized()


def test_training_knows_nothing_of_steering():
    """Whatever it imports of this library is its own, or about arguments, errors, files, shards and progress."""
    folder = Path(rs.training.__file__).parent
    found = set()
    for path in folder.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level != 1:
                assert node.level == 0 or not node.module, path  # nothing by two dots
                found.add(node.module)
            elif isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
    own = {
        name for name in found if name.startswith("residual_steer") and not name.startswith("residual_steer.training")
    }
    assert own <= {
        f"residual_steer.{name}" for name in ("_batches", "_checks", "_files", "_shards", "_undisturbed", "errors")
    }


def test_an_optimizer_of_the_users_own():
    model = classifier()
    optimizer = torch.optim.SGD([{"params": model[3].parameters(), "lr": 0.1}], lr=1.0, momentum=0.9)
    before = weights(model)
    history = fit(model, pairs(), steps=20, optimizer=optimizer, log_every=1, schedule="constant", clip=None)
    assert optimizer.param_groups[0]["lr"] == 0.1  # given back: a second run starts from it
    assert torch.equal(model[0].weight, before["0.weight"])
    assert history.train[-1]["grad_norm"] < 3 * history.train[0]["grad_norm"]
    assert model[0].weight.grad is None  # nothing is left behind, also in what it lacks
    with pytest.raises(rs.SteerError, match="holds no parameter of this model"):
        fit(classifier(), pairs(), optimizer=optimizer)


def test_a_learning_rate_in_a_tensor(tmp_path):
    model = classifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=torch.tensor(0.01), capturable=False, foreach=False)
    fit(model, pairs(), optimizer=optimizer, save_to=tmp_path)
    assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(0.01)


def test_frozen_running_statistics_stay_and_those_of_a_bad_step_go_back():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    model[1].requires_grad_(False)
    before = weights(model)
    fit(model, pairs())
    after = weights(model)
    assert torch.equal(after["1.running_mean"], before["1.running_mean"])
    assert not torch.equal(after["3.running_mean"], before["3.running_mean"])
    broken = [(torch.full((4, 4), float("nan")), torch.zeros(4, dtype=torch.long))]
    with pytest.raises(rs.SteerError, match="loss became nan at step 1"):
        fit(model, broken)
    assert same(weights(model), after)


def test_an_accelerator_that_refuses_is_a_clear_error(monkeypatch, tmp_path):
    with pytest.raises(rs.SteerError, match="accelerate refused the options"):
        fit(classifier(), pairs(), trackers=["nobody"], save_to=tmp_path)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    with pytest.raises(rs.SteerError, match=r"accelerate (was told 'fp8'|refused)"):
        fit(classifier(), pairs())
    assert not is_initialized()


def test_the_users_loader_is_given_back():
    data = pairs()
    sampler = data.batch_sampler.sampler
    fit(classifier(), data)
    assert data.batch_sampler.sampler is sampler


def test_the_randomness_of_data_and_model_are_apart():
    class Augmented(TensorDataset):
        def __getitem__(self, index):
            x, y = super().__getitem__(index)
            return x + torch.randn(4) * 0.0, y  # draws, and changes nothing

    def drawing(model, batch):
        drawn.append((batch[0].clone(), torch.rand(1)))
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    runs = []
    for kind in (TensorDataset, Augmented):
        drawn = []
        fit(classifier(), DataLoader(kind(*pairs().dataset.tensors), 8, shuffle=True), loss=drawing)
        runs.append(drawn)
    for (x, noise), (again, same_noise) in zip(*runs, strict=True):
        assert torch.equal(x, again)
        assert torch.equal(noise, same_noise)


@pytest.mark.parametrize("name", ["timm-vit", "gpt2", "mamba", "mamba2", "falcon-mamba", "mamba_ssm-1", "mamba_ssm-2"])
def test_one_loop_trains_every_architecture(name):
    case = TABLE[name]
    model = rs.steer(case.build(), rank=4)
    batch, loss = case.inputs(model), None
    if name == "timm-vit":
        batch = (batch["x"], torch.arange(len(batch["x"])))
    elif name.startswith("mamba_ssm"):
        loss = next_token_loss
    else:
        batch["labels"] = batch["input_ids"]
    before = evaluate(model, [batch], loss)["loss"]
    history = fit(model, [batch], [batch], steps=20, lr=2e-2, loss=loss)
    assert history.valid[-1]["loss"] < before - 0.05
