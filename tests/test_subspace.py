"""Second moments and the space of their leading directions, held against NumPy on features that are all there."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from residual_steer.subspace import SecondMoment, Subspace


def features(seed, rows, width, rank=None, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    rank = width if rank is None else rank
    left, right = (torch.randn(*shape, generator=generator).double() for shape in ((rows, rank), (rank, width)))
    return scale * left @ right


def moment(*parts, bias=False):
    found = SecondMoment(parts[0].shape[1] + bias, bias, torch.device("cpu"))
    for part in parts:
        found.add(part)
    return found


@pytest.mark.parametrize("bias", [False, True])
def test_streaming_is_the_whole_batch(bias, monkeypatch):
    monkeypatch.setattr("residual_steer.subspace._ROWS", 16)
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
    space = Subspace.nothing(width).extend(found.sum, energy)
    u = space.basis.numpy()
    outside = np.eye(width) - u @ u.T
    np.testing.assert_allclose(outside @ outside, outside, atol=1e-12)
    np.testing.assert_allclose(outside, outside.T, atol=0)
    squares = np.linalg.svd(x.numpy(), compute_uv=False) ** 2
    held = space.share(found.sum)
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
    space, moments = Subspace.nothing(width), []
    for task, rank in enumerate(ranks):
        found = moment(features(seed + task, 20, width, rank, scale=1000.0**task)).sum
        before, space = space, space.extend(found, 0.99)
        moments.append(found)
        if space.basis.shape[1] > before.basis.shape[1]:  # one direction fewer would not do
            assert Subspace(space.basis[:, :-1]).share(found) < 0.99
        assert torch.equal(space.basis[:, : before.basis.shape[1]], before.basis)
        assert space.left >= 0
        assert all(space.share(each) >= 0.99 - 1e-9 for each in moments)
        gram = space.basis.t() @ space.basis
        torch.testing.assert_close(gram, torch.eye(len(gram), dtype=torch.float64), rtol=0, atol=1e-10)


def test_what_is_held_already_counts():
    x = features(1, 30, 8, rank=3)
    once = Subspace.nothing(8).extend(moment(x).sum, 1.0)
    assert once.left == 5
    assert once.extend(moment(7 * x[:11]).sum, 1.0) is not once
    assert once.extend(moment(7 * x[:11]).sum, 1.0).left == 5
    assert once.extend(moment(features(2, 30, 8, rank=2)).sum, 1.0).left == 3


def test_rounding_is_no_direction_and_a_small_feature_is():
    x = features(3, 200, 10, rank=4)
    rounded = x.float().double() + 3e-8 * features(4, 200, 10)
    assert Subspace.nothing(10).extend(moment(rounded).sum, 1.0).left == 6
    small = torch.cat([x, 1e-4 * features(5, 1, 10)])
    assert Subspace.nothing(10).extend(moment(small).sum, 1.0).left == 5


def test_nothing_is_in_nothing_and_all_is_in_all():
    space = Subspace.nothing(4)
    assert space.extend(torch.zeros(4, 4, dtype=torch.float64), 1.0).left == 4
    assert space.share(torch.zeros(4, 4, dtype=torch.float64)) == 1.0
    full = space.extend(torch.eye(4, dtype=torch.float64), 1.0)
    assert full.left == 0
    assert full.extend(torch.eye(4, dtype=torch.float64), 1.0) is full
