"""The tutorial for registering a backbone: its S4D against the recurrence, and the whole of it end to end."""

import contextlib

import pytest
import torch

import residual_steer as rs
from beside import EXAMPLES, scripts

pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def example():
    """The script as a module; the family it registers is gone after the test, as any."""
    with scripts(EXAMPLES) as script:
        yield script("register_backbone")


@pytest.fixture
def registered(example):
    """Registered anew for a test, since a test's registry is its own."""
    with contextlib.suppress(rs.SteerError):
        rs.register_backbone("s4d", matches=["register_backbone.S4DClassifier"])(example.s4d)
    return example


def recurrence(layer, u):
    """Return what a layer computes, step by step: x_k = Ā·x_{k-1} + B̄·u_k, y_k = 2·Re(C·x_k) + D·u_k."""
    a = torch.complex(-layer.log_decay.exp(), layer.frequency)
    step = layer.log_step.exp()
    a_bar = torch.exp(a * step)
    b_bar = (a_bar - 1) / a
    c = torch.view_as_complex(layer.C)
    x = torch.zeros(len(u), *a.shape, dtype=torch.complex128)
    outputs = []
    for u_k in u.unbind(1):
        x = a_bar * x + b_bar * u_k.unsqueeze(-1)
        outputs.append(2 * (c * x).sum(-1).real + layer.D * u_k)
    return torch.stack(outputs, 1)


def test_the_convolution_is_the_recurrence(example):
    layer = example.S4D(3, states=5).double()
    with torch.no_grad():
        layer.log_step.uniform_(-3, -1)
        layer.log_decay.uniform_(-2, 1)
    u = torch.randn(2, 64, 3, dtype=torch.float64)
    expected = recurrence(layer, u)
    assert expected.abs().max() > 1
    torch.testing.assert_close(layer(u), expected, rtol=1e-10, atol=1e-10)


def test_the_kernel_discretises_the_differential_equation(example):
    """A hold of the input is exact for a constant one: in the end y = -2·Re(C/A) + D, whatever the step."""
    layer = example.S4D(2, states=4).double()
    with torch.no_grad():
        layer.log_step.fill_(-1.0)
    y = layer(torch.ones(1, 400, 2, dtype=torch.float64))[0, -1]
    a = torch.complex(-layer.log_decay.exp(), layer.frequency)
    expected = -2 * (torch.view_as_complex(layer.C) / a).sum(-1).real + layer.D
    torch.testing.assert_close(y, expected, rtol=1e-8, atol=1e-8)


def test_nothing_looks_ahead(example):
    layer = example.S4D(3)
    u = torch.randn(2, 16, 3)
    later = u.clone()
    later[:, 10:] += 1
    moved = (layer(later) - layer(u)).abs().amax((0, 2))
    assert moved[:10].max() < 1e-5 < moved[10:].min()


@pytest.mark.parametrize("site", ["block", "mixer", "input"])
def test_it_is_steered_at_every_site(registered, site):
    model = registered.S4DClassifier(width=8, depth=2).requires_grad_(False)
    images = torch.randn(2, 1, 8, 8)
    expected = model(images)
    rs.steer(model, rank=2, site=site)
    with torch.no_grad():
        assert torch.equal(model(images), expected)
        rs.parameters(model)[2].normal_()
        assert not torch.equal(model(images), expected)
    model(images).square().sum().backward()
    assert all(p.grad is not None for p in rs.parameters(model))


def test_it_runs_from_end_to_end(registered, capsys):
    registered.main(["--steps", "3"])
    out = capsys.readouterr().out
    assert "blocks: 3 × Block" in out
    assert "sites:  block, mixer, input, after  (mixer: .s4d)" in out
    counts = [int(line.split()[-4].replace(",", "")) for line in out.splitlines() if "parameters trained" in line]
    model = registered.S4DClassifier()
    head = sum(p.numel() for p in model.head.parameters())
    assert counts == [head, head + 3 * (2 * 32 * 8 + 32 + 8), sum(p.numel() for p in model.parameters())]
