"""The selective scan against the recurrence written out, its gradients, and what it keeps."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import library

import residual_steer as rs
from benchmarks.counters import count
from residual_steer import scan
from residual_steer.scan import selective_scan

NAMES = ("u", "delta", "A", "B", "C")


def walked(u, delta, A, B, C):
    """h_t = exp(Δ_t·A) ⊙ h_{t-1} + (Δ_t·u_t) ⊗ B_t and y_t = C_t · h_t, one number of one row at a time."""
    rows = []
    for row in range(u.shape[0]):
        h, steps = torch.zeros_like(A), []
        for t in range(u.shape[1]):
            h = torch.exp(delta[row, t, :, None] * A) * h + torch.outer(delta[row, t] * u[row, t], B[row, t])
            steps.append(h @ C[row, t])
        rows.append(torch.stack(steps))
    return torch.stack(rows)


def inputs(rows, length, channels, states, dtype=torch.float64, seed=0):
    make = torch.Generator().manual_seed(seed)
    shapes = [(rows, length, channels)] * 2 + [(channels, states)] + [(rows, length, states)] * 2
    u, delta, A, B, C = (torch.randn(shape, generator=make, dtype=torch.float64) for shape in shapes)
    return [x.to(dtype).requires_grad_() for x in (u, delta.abs(), -A.abs(), B, C)]


def gradients(function, given):
    y = function(*given)
    towards = torch.randn(y.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(y.dtype)
    return [y, *torch.autograd.grad(y, given, towards)]


# Buffers of a few numbers cut every length into chunks, and every batch into groups of rows.
@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 4),
    length=st.integers(1, 40),
    channels=st.integers(1, 5),
    states=st.integers(1, 4),
    chunk=st.sampled_from([1, 3, 16]),
    buffer=st.sampled_from([1, 60, 500, scan.BUFFER]),
)
def test_it_is_the_recurrence_and_so_are_its_gradients(rows, length, channels, states, chunk, buffer):
    given = inputs(rows, length, channels, states)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scan, "CHUNK", chunk)
        patch.setattr(scan, "BUFFER", buffer)
        found = gradients(selective_scan, given)
    for name, actual, expected in zip(("y", *NAMES), found, gradients(walked, given), strict=True):
        torch.testing.assert_close(
            actual, expected, rtol=1e-9, atol=1e-9, msg=lambda told, name=name: f"{name}: {told}"
        )


def test_gradients_agree_with_finite_differences():
    assert torch.autograd.gradcheck(selective_scan, inputs(2, 19, 3, 2))


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # of torch's own check
def test_torch_finds_nothing_wrong_with_the_operation(monkeypatch):
    monkeypatch.setattr(scan, "BUFFER", 60)
    library.opcheck(torch.ops.residual_steer.selective_scan.default, tuple(inputs(2, 37, 3, 2)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_computes_in_fp32_and_answers_in_the_dtype_of_u(dtype):
    given = inputs(2, 33, 4, 3, dtype)
    found = gradients(selective_scan, given)
    assert [x.dtype for x in found] == [dtype] * 6
    exact = walked(*(x.double() for x in given))
    precision = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    torch.testing.assert_close(found[0].double(), exact, rtol=precision, atol=precision)


def test_under_autocast_it_is_the_same():
    given = inputs(2, 33, 4, 3, torch.float32)
    exact = selective_scan(*given)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(selective_scan(*given), exact)


def test_a_second_derivative_is_refused_and_not_wrong():
    given = inputs(1, 5, 3, 2)
    (first,) = torch.autograd.grad(selective_scan(*given).sum(), given[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="autograd"):
        first.sum().backward()


@pytest.mark.parametrize(("rows", "length"), [(0, 5), (2, 0)])
def test_nothing_comes_of_nothing(rows, length):
    y = selective_scan(*inputs(rows, length, 3, 2))
    assert y.shape == (rows, length, 3)
    y.sum().backward()


def test_the_gradient_of_a_frozen_A_is_not_computed(monkeypatch):
    given = inputs(1, 20, 3, 2)
    given[2].requires_grad_(False)
    called, einsum = [], torch.einsum
    monkeypatch.setattr(torch, "einsum", lambda *args: called.append(1) or einsum(*args))
    selective_scan(*given).sum().backward()
    assert given[2].grad is None
    assert not called


def test_what_is_kept_grows_with_the_length_and_not_with_all_states():
    channels, states, saved = 64, 16, []
    for length in (1024, 2048):
        given = inputs(1, length, channels, states, torch.float32)
        found = count(torch.nn.Identity(), lambda given=given: selective_scan(*given).sum(), torch.empty(0))
        saved.append(found.saved)
    everything = 4 * 1024 * channels * states
    assert saved[1] < 2.1 * saved[0]
    assert saved[0] < everything / 2


def test_it_goes_through_torch_compile_in_one_graph():
    given = inputs(2, 21, 3, 2)
    compiled = torch.compile(selective_scan, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(gradients(compiled, given), gradients(selective_scan, given), strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("wrong", range(5), ids=NAMES)
def test_shapes_that_do_not_fit_are_named(wrong):
    given = inputs(2, 5, 3, 4)
    given[wrong] = given[wrong][..., :-1]
    with pytest.raises(rs.SteerError, match=r"A \(channels, states\).*received .*\(2, 5, [34]\)"):
        selective_scan(*given)
