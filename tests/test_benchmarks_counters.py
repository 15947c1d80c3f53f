"""Counting what a step costs, held against counts by hand; test_cost.py counts whole backbones."""

import pytest
import torch
from torch import nn

from benchmarks.counters import count, flops, operations


def test_counting_a_step_that_can_be_counted_by_hand():
    model, x = nn.Linear(4, 5, bias=False), torch.randn(3, 4)
    counts, again = (count(model, lambda: torch.relu(model(x)).pow(2).sum(), x) for _ in range(2))
    assert counts == again
    assert counts.flops == 2 * (2 * 3 * 4 * 5)  # the product, and the weight's gradient
    assert counts.saved == 3 * 5 * 4  # what relu returns, which pow keeps too
    assert counts.trainable == 20
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_frozen_layer_keeps_nothing_and_needs_no_gradient():
    frozen, head, x = nn.Linear(4, 5), nn.Linear(5, 2), torch.randn(3, 4)
    model = nn.Sequential(frozen.requires_grad_(False), head)
    counts = count(model, lambda: model(x).sum(), x)
    assert counts.saved == 3 * 5 * 4  # what enters the head
    assert counts.flops == 2 * 3 * 4 * 5 + 2 * (2 * 3 * 5 * 2)
    assert counts.trainable == 5 * 2 + 2


def test_batch_parameters_and_buffers_are_not_what_autograd_keeps():
    model, x = nn.BatchNorm1d(4).eval(), torch.randn(3, 4)
    counts = count(model, lambda: (model(x) * x).sum(), x)
    assert counts.saved == 0
    larger = count(model, lambda: (model(x) * (x + 1)).sum(), x)
    assert larger.saved == 3 * 4 * 4  # x + 1 is neither


@torch.no_grad()
@pytest.mark.parametrize(
    ("run", "expected"),
    [
        (lambda x: x + 1, 1),
        (lambda x: x @ x, 1),
        (lambda x: x.add_(1).mul_(2), 2),
        (lambda x: x.t().unsqueeze(0).expand(3, -1, -1).transpose(1, 2).select(0, 1).view(2, 8), 0),
        (lambda x: x.reshape(2, 8)[0].squeeze().detach(), 0),
        (lambda x: x.chunk(2)[0], 0),
        (lambda x: x.split([1, 3])[0], 0),
        (lambda x: x.unbind()[0], 0),
        (lambda x: x.diagonal().unfold(0, 2, 1).movedim(0, 1), 0),
        (lambda x: torch.empty_like(x), 0),
        (lambda x: x.new_empty(3), 0),
        (lambda x: x.t().reshape(16), 1),  # which must copy
        (lambda x: x.t().contiguous(), 1),
        (lambda x: torch.zeros_like(x), 1),
    ],
)
def test_operations_are_what_computes(run, expected):
    x = torch.randn(4, 4)
    assert operations(lambda: run(x)) == expected


def test_operations_of_a_backward_pass_count_too():
    w = torch.randn(4, requires_grad=True)
    forward = operations(lambda: (w * w.detach()).sum())
    assert forward == 2
    assert operations(lambda: (w * w.detach()).sum().backward()) > forward


@torch.no_grad()
def test_flops_of_products_in_place_and_in_batches():
    x, y = torch.randn(3, 4), torch.randn(4, 5)
    product = 2 * 3 * 4 * 5
    assert flops(lambda: x @ y) == product
    assert flops(lambda: torch.randn(3, 5).addmm_(x, y)) == product
    assert flops(lambda: torch.addmm(torch.randn(5), x, y)) == product
    assert flops(lambda: torch.randn(7, 3, 4) @ torch.randn(7, 4, 5)) == 7 * product
    assert flops(lambda: x + 1) == 0


def test_the_peak_of_what_is_alive_at_one_time():
    def chain(x):
        first = x + 1  # 48 bytes
        second = first * 2  # and as many
        del first
        return (second - 1).sum()  # again; `second` dies before the 4 bytes of the sum are there

    x = torch.randn(3, 4, requires_grad=True)
    counts = count(nn.Identity(), lambda: chain(x), x)
    assert counts.peak == 2 * 48 + 4  # the gradient is expanded from the value's, and doubled
    assert counts.saved == 0


def test_a_view_of_a_weight_is_no_new_memory():
    weight, x = torch.randn(5, 4), torch.randn(3, 4, requires_grad=True)
    counts = count(nn.Identity(), lambda: (x @ weight.t()).sum(), x)
    assert counts.peak == 3 * 5 * 4 + 4  # the product and its sum; later the gradient, 48, beside two scalars


def test_the_peak_holds_what_is_saved_and_the_gradients():
    model, x = nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU(), nn.Linear(4, 4, bias=False)), torch.randn(3, 4)
    counts = count(model, lambda: model(x).sum(), x)
    assert counts.saved == 3 * 4 * 4  # what relu returns
    assert counts.peak >= counts.saved + 2 * 4 * 4 * 4  # and both weights' gradients stay until the end
