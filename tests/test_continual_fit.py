"""`fit(..., protect=space)`: the run is protected and nothing else, and one that was cut off ends as if it had not."""

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import residual_steer as rs
from fields import shake
from pooled import images, pooled_vit
from residual_steer.continual import NullSpace
from residual_steer.training import FitOptions, evaluate
from runs import fit, same, weights

OLD = images(1, 1)


def learned(energy=1.0):
    """A model that has learned a task, and its null space."""
    model = shake(rs.steer(pooled_vit(), rank=15))
    space = NullSpace(model, energy)
    space.observe([OLD])
    return model, space


def task(rows=16):
    y = torch.arange(rows) % 3
    return DataLoader(TensorDataset(images(rows, 3) + y.view(-1, 1, 1, 1), y), 8, shuffle=True)


def out(model, x=OLD):
    model.eval()
    with torch.no_grad():
        return model(x)


@pytest.mark.parametrize("options", [{}, {"accumulate": 2, "clip": 0.1}, {"precision": "bf16"}, {"sgd": True}])
def test_a_run_keeps_the_old_task(options):
    model, space = learned()
    before = out(model)
    optimizer = None
    if options.pop("sgd", False):
        optimizer = torch.optim.SGD(rs.parameters(model), lr=0.2, momentum=0.9, weight_decay=1e-3)
    loss = evaluate(model, task())["loss"]
    fit(model, task(), steps=60, lr=1e-2, protect=space, optimizer=optimizer, **options)
    assert (out(model) - before).abs().max() < 1e-5
    assert evaluate(model, task())["loss"] < 0.95 * loss
    if optimizer is not None:
        assert not optimizer._optimizer_step_post_hooks
        assert not optimizer._optimizer_step_pre_hooks
    fit(model, task(), steps=20, lr=5e-3)
    assert (out(model) - before).abs().max() > 1e-2


def test_an_optimizer_that_was_protected_before_is_too():
    model, space = learned()
    before = out(model)
    optimizer = torch.optim.AdamW(rs.parameters(model), lr=5e-3)
    with space.protect(optimizer):
        fit(model, task(), steps=10, optimizer=optimizer)
    assert (out(model) - before).abs().max() < 1e-5


def test_the_protection_ends_with_the_run_even_if_it_fails():
    model, space = learned()
    optimizer = torch.optim.AdamW(rs.parameters(model), lr=5e-3)

    def failing(model, batch):
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fit(model, task(), optimizer=optimizer, protect=space, loss=failing)
    assert not optimizer._optimizer_step_post_hooks
    fit(model, task(), optimizer=optimizer, protect=space)


def test_a_run_of_two_tasks_in_one_loop():
    model = shake(rs.steer(pooled_vit(), rank=15))
    space = NullSpace(model, 1.0)
    tasks = [DataLoader(TensorDataset(x[None], torch.tensor([n])), 1) for n, x in enumerate(images(2, 1))]
    kept = []
    for loader in tasks:
        fit(model, loader, steps=15, lr=5e-3, protect=space)
        space.observe(loader)
        kept.append(out(model, images(2, 1))[len(kept)])
    assert space.tasks == 2
    assert torch.allclose(torch.stack(kept), out(model, images(2, 1)), atol=1e-5)


def test_killed_and_resumed_it_ends_with_the_same_bits(tmp_path):
    class Stop(Exception):
        pass

    def stopping(model, batch):
        nonlocal count
        count += 1
        if count == stop:
            raise Stop
        return torch.nn.functional.cross_entropy(model(batch[0]), batch[1])

    options = {"steps": 12, "lr": 5e-3, "checkpoint_every": 1, "loss": stopping}
    count, stop = 0, None
    whole, space = learned()
    before = out(whole)
    fit(whole, task(), save_to=tmp_path / "whole", protect=space, **options)
    count, stop = 0, 7
    broken, other = learned()
    with pytest.raises(Stop):
        fit(broken, task(), save_to=tmp_path / "broken", protect=other, **options)
    count, stop = 0, None
    resumed = rs.steer(pooled_vit(), rank=15)  # in another process: neither the field's weights nor the space are there
    fresh = NullSpace(resumed, 1.0)
    fit(resumed, task(), save_to=tmp_path / "broken", protect=fresh, resume=True, **options)
    assert same(weights(whole), weights(resumed))
    assert fresh.left == space.left
    assert (out(resumed) - before).abs().max() < 1e-5


def test_resume_refuses_another_protection(tmp_path):
    model, space = learned()
    fit(model, task(), save_to=tmp_path / "with", protect=space)
    fit(learned()[0], task(), save_to=tmp_path / "without")
    with pytest.raises(rs.SteerError, match="changed are protect 'NullSpace' → None"):
        fit(learned()[0], task(), save_to=tmp_path / "with", resume=True)
    model, space = learned()
    with pytest.raises(rs.SteerError, match="changed are protect None → 'NullSpace'"):
        fit(model, task(), save_to=tmp_path / "without", resume=True, protect=space)
    model, space = learned(energy=0.5)
    before, left = weights(model), space.left
    with pytest.raises(rs.SteerError, match=r"energy 1\.0, here 0\.5"):
        fit(model, task(), save_to=tmp_path / "with", resume=True, protect=space)
    assert same(weights(model), before)
    assert space.left == left


def test_what_does_not_protect_is_refused():
    for wrong in (True, "space", NullSpace, torch.nn.Linear(2, 2)):
        with pytest.raises(rs.SteerError, match="`protect` is a residual_steer"):
            FitOptions(protect=wrong)
    _, space = learned()
    other = torch.nn.Linear(64, 5)
    before = weights(other)
    loader = DataLoader(TensorDataset(torch.randn(4, 64), torch.arange(4)), 2)
    with pytest.raises(rs.SteerError, match="has no parameter of field 'default'"):
        fit(other, loader, protect=space)
    assert same(weights(other), before)
