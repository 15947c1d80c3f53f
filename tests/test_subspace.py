"""Second moments, the space of their leading directions, and maps that stay as they are in it, held against NumPy."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from residual_steer import SteerError
from residual_steer._subspace import Protected, Protection, SecondMoment, extended, inputs_of, share_inside, unwrapped


def features(seed, rows, width, rank=None, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    rank = width if rank is None else rank
    left, right = (torch.randn(*shape, generator=generator).double() for shape in ((rows, rank), (rank, width)))
    return scale * left @ right


def nothing(inputs):
    return torch.zeros(inputs, 0, dtype=torch.float64)


def moment(*parts, bias=False):
    found = SecondMoment(torch.nn.Linear(parts[0].shape[1], 1, bias=bias))
    for part in parts:
        found.add(part)
    return found


@pytest.mark.parametrize("bias", [False, True])
def test_streaming_is_the_whole_batch(bias, monkeypatch):
    monkeypatch.setattr("residual_steer._subspace._ROWS", 16)
    x = features(0, 100, 6).float()
    streamed = moment(*x.split(37), bias=bias)
    whole = x.double().numpy()
    whole = np.concatenate([whole, np.ones((100, 1))], axis=1) if bias else whole
    np.testing.assert_allclose(streamed.sum.numpy(), whole.T @ whole, rtol=1e-12)
    assert streamed.count == 100


def test_many_small_features_are_summed_in_fp64():
    x = torch.full((1, 1), 1e-3)
    found = moment(torch.full((1, 1), 1e2), *[x] * 1000)
    assert float(found.sum) - 1e4 == pytest.approx(1000 * float(x) ** 2, rel=1e-2)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 9999), st.integers(2, 9), st.integers(1, 9), st.sampled_from([0.5, 0.9, 0.999, 1.0]))
def test_the_projector_and_the_energy_it_holds(seed, width, rank, energy):
    x = features(seed, 12, width, min(rank, width))
    found = moment(x)
    basis = extended(nothing(width), found.sum, energy)
    u = basis.numpy()
    outside = np.eye(width) - u @ u.T
    np.testing.assert_allclose(outside @ outside, outside, atol=1e-12)
    np.testing.assert_allclose(outside, outside.T, atol=0)
    squares = np.linalg.svd(x.numpy(), compute_uv=False) ** 2
    held = share_inside(basis, found.sum)
    assert held == pytest.approx(squares[: u.shape[1]].sum() / squares.sum(), rel=1e-9)
    assert held >= energy - 1e-9
    if energy == 1:
        assert u.shape[1] == np.linalg.matrix_rank(x.numpy(), rtol=1e-6)
        assert np.abs(outside @ x.numpy().T).max() < 1e-5 * np.abs(x.numpy()).max()
    elif u.shape[1] > 1:  # one direction fewer would not do
        assert squares[: u.shape[1] - 1].sum() / squares.sum() < energy


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 9999), st.integers(3, 12), st.lists(st.integers(1, 3), min_size=2, max_size=4))
def test_every_task_keeps_its_share_however_large_the_others_are(seed, width, ranks):
    basis, moments = nothing(width), []
    for task, rank in enumerate(ranks):
        found = moment(features(seed + task, 20, width, rank, scale=1000.0**task)).sum
        before, basis = basis, extended(basis, found, 0.99)
        moments.append(found)
        if basis.shape[1] > before.shape[1]:  # one direction fewer would not do
            assert share_inside(basis[:, :-1], found) < 0.99
        assert torch.equal(basis[:, : before.shape[1]], before)
        assert basis.shape[1] <= width
        assert all(share_inside(basis, each) >= 0.99 - 1e-9 for each in moments)
        gram = basis.t() @ basis
        torch.testing.assert_close(gram, torch.eye(len(gram), dtype=torch.float64), rtol=0, atol=1e-10)


def test_what_is_inside_already_counts():
    x = features(1, 30, 8, rank=3)
    once = extended(nothing(8), moment(x).sum, 1.0)
    assert once.shape[1] == 3
    assert extended(once, moment(7 * x[:11]).sum, 1.0).shape[1] == 3
    assert extended(once, moment(features(2, 30, 8, rank=2)).sum, 1.0).shape[1] == 5


def test_rounding_is_no_direction_and_a_small_feature_is():
    x = features(3, 200, 10, rank=4)
    rounded = x.float().double() + 3e-8 * features(4, 200, 10)
    assert extended(nothing(10), moment(rounded).sum, 1.0).shape[1] == 4
    small = torch.cat([x, 1e-4 * features(5, 1, 10)])
    assert extended(nothing(10), moment(small).sum, 1.0).shape[1] == 5
    u, direction = basis(10, 4).split([3, 1], dim=1)
    found = extended(u, u @ u.t() + 1e-13 * direction @ direction.t(), 1.0)
    assert found.shape[1] == 4
    torch.testing.assert_close(found.t() @ found, torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-12)


def test_nothing_is_in_nothing_and_all_is_in_all():
    none, every = torch.zeros(4, 4, dtype=torch.float64), torch.eye(4, dtype=torch.float64)
    assert extended(nothing(4), none, 1.0).shape[1] == 0
    assert share_inside(nothing(4), none) == 1.0
    full = extended(nothing(4), every, 1.0)
    assert full.shape[1] == 4
    assert extended(full, every, 1.0) is full


OPTIMIZERS = {
    "sgd": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1, "nesterov": True}),
    "adam": (torch.optim.Adam, {"lr": 0.05, "weight_decay": 0.1}),
    "adamw": (torch.optim.AdamW, {"lr": 0.05, "weight_decay": 0.5}),
    "foreach": (torch.optim.AdamW, {"lr": 0.05, "weight_decay": 0.5, "foreach": True}),
    "fused": (torch.optim.AdamW, {"lr": 0.05, "weight_decay": 0.5, "fused": True}),
    "amsgrad": (torch.optim.AdamW, {"lr": 0.05, "amsgrad": True}),
    "rmsprop": (torch.optim.RMSprop, {"lr": 0.01, "weight_decay": 0.1}),
    "adagrad": (torch.optim.Adagrad, {"lr": 0.1}),
    "adafactor": (torch.optim.Adafactor, {"lr": 0.05}),
    "lbfgs": (torch.optim.LBFGS, {"lr": 0.1, "max_iter": 3}),
}


def basis(inputs, dimensions, seed=0):
    matrix = torch.randn(inputs, dimensions, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.linalg.qr(matrix).Q


def layer(bias=True, seed=1):
    torch.manual_seed(seed)
    return nn.Linear(6, 4, bias=bias)


def matrix(linear):
    parts = [linear.weight] if linear.bias is None else [linear.weight, linear.bias[:, None]]
    return torch.cat(parts, dim=1).detach().double().numpy().copy()


def step(linear, optimizer, seed):
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(20, 6, generator=generator), torch.randn(20, 4, generator=generator)

    def closure():
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(linear(x), y)
        loss.backward()
        return loss

    optimizer.step(closure)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_the_update_is_the_projected_one(kind, bias):
    free, bound = layer(bias), layer(bias)
    u = basis(inputs_of(bound), 3)
    outside = np.eye(len(u)) - (u @ u.t()).numpy()
    make, options = OPTIMIZERS[kind]
    optimizers = [make(linear.parameters(), **options) for linear in (free, bound)]
    with Protection(optimizers[1], {"p": bound}, {"p": Protected.of(bound, u)}):
        before = matrix(bound)
        step(free, optimizers[0], 0)
        step(bound, optimizers[1], 0)
    expected = before + (matrix(free) - before) @ outside
    assert np.abs(matrix(free) - before).max() > 1e-3
    np.testing.assert_allclose(matrix(bound), expected, atol=1e-6)
    assert np.abs((matrix(bound) - before) @ u.numpy()).max() < 1e-6


def test_rounding_does_not_add_up():
    linear = layer()
    u = basis(7, 5)
    before = matrix(linear)
    optimizer = torch.optim.AdamW(linear.parameters(), lr=0.05, weight_decay=0.5)
    drift = []
    with Protection(optimizer, {"p": linear}, {"p": Protected.of(linear, u)}):
        for seed in range(600):
            step(linear, optimizer, seed)
            drift.append(np.abs((matrix(linear) - before) @ u.numpy()).max())
    assert max(drift[-100:]) < 2 * max(drift[:100]) < 1e-6


def test_after_remove_it_goes_where_it_likes():
    linear = layer()
    optimizer = torch.optim.SGD(linear.parameters(), lr=0.1)
    full = Protected.of(linear, torch.eye(7, dtype=torch.float64))
    before = matrix(linear)
    with Protection(optimizer, {"p": linear}, {"p": full}) as protection:
        step(linear, optimizer, 0)
        np.testing.assert_allclose(matrix(linear), before, atol=1e-6)
        assert protection.active
    assert not protection.active
    assert not optimizer._optimizer_step_post_hooks
    step(linear, optimizer, 1)
    assert np.abs(matrix(linear) - before).max() > 1e-3


def test_nothing_held_is_the_bare_optimizer_to_the_bit():
    free, bound = layer(), layer()
    for linear in (free, bound):
        optimizer = torch.optim.AdamW(linear.parameters(), lr=0.05)
        if linear is bound:
            Protection(optimizer, {"p": linear}, {"p": Protected.of(linear)})
        for seed in range(5):
            step(linear, optimizer, seed)
    assert np.array_equal(matrix(free), matrix(bound))


def test_what_is_held_may_grow_and_the_first_response_stays():
    linear = layer()
    u = basis(7, 6)
    held = {"p": Protected.of(linear, u[:, :2])}
    first = matrix(linear)
    optimizer = torch.optim.AdamW(linear.parameters(), lr=0.05)
    Protection(optimizer, {"p": linear}, held)
    for seed in range(20):
        step(linear, optimizer, seed)
    held["p"] = held["p"].grown(linear, u[:, 2:4] @ u[:, 2:4].t(), 1.0)
    second = matrix(linear)
    for seed in range(20):
        step(linear, optimizer, seed)
    assert np.abs((matrix(linear) - first) @ u[:, :2].numpy()).max() < 1e-6
    assert np.abs((matrix(linear) - second) @ u[:, :4].numpy()).max() < 1e-6
    assert np.abs((matrix(linear) - second) @ u[:, 4:].numpy()).max() > 1e-3
    assert held["p"].strayed(linear) < 1e-6
    other = held["p"].grown(layer(seed=2), u[:, 4:] @ u[:, 4:].t(), 1.0)
    assert torch.equal(other.response[:, :4], held["p"].response), "what a map did when it was observed"
    assert Protected.of(layer(seed=2), u).strayed(linear) > 0.1


def test_a_step_that_the_scaler_skips_changes_nothing():
    linear = layer()
    optimizer = torch.optim.AdamW(linear.parameters(), lr=0.05, weight_decay=0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    Protection(optimizer, {"p": linear}, {"p": Protected.of(linear, basis(7, 3))})
    before = matrix(linear)
    for factor in (float("inf"), 1.0):
        optimizer.zero_grad()
        scaler.scale(factor * linear(torch.ones(2, 6)).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        moved = np.abs(matrix(linear) - before)
        assert moved.max() == 0 if factor > 1 else moved.max() > 1e-3
    assert np.abs((matrix(linear) - before) @ basis(7, 3).numpy()).max() < 1e-6


def test_in_bf16_rounding_is_not_taken_for_a_change():
    linear = layer().bfloat16()
    held = {"p": Protected.of(linear, basis(7, 3))}
    first = held["p"]
    for _ in range(2):  # the second begins with what the first has rounded
        optimizer = torch.optim.SGD(linear.parameters(), lr=0.1)
        with Protection(optimizer, {"p": linear}, held):
            optimizer.zero_grad()
            linear(torch.ones(2, 6, dtype=torch.bfloat16)).sum().backward()
            optimizer.step()
    assert 0 < first.strayed(linear) < 0.01
    assert held["p"] is first


def test_accelerate_wraps_and_is_unwrapped():
    from accelerate.optimizer import AcceleratedOptimizer

    optimizer = torch.optim.SGD(layer().parameters(), lr=0.1)
    wrapped = AcceleratedOptimizer.__new__(AcceleratedOptimizer)
    wrapped.optimizer = optimizer
    assert unwrapped(wrapped) is optimizer
    assert unwrapped(optimizer) is optimizer
    with pytest.raises(SteerError, match=r"torch\.optim\.Optimizer; received str"):
        unwrapped("adam")
