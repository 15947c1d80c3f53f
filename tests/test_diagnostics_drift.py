"""Drift from the frozen trajectory, against what the blocks give, and for methods with tokens of their own."""

import copy

import pytest
import torch
from torch import nn

from cases import randomise
from fields import IMAGES, shake, vit
from residual_steer import Backbone, SteerError, steer, unsteer, use
from residual_steer.diagnostics import drift
from sharp import case_of, method


def outputs(case, model):
    """What leaves each block, by hooks of the test's own."""
    seen, handles = [], []
    for block in case.modules(model, "block"):
        handles.append(block.register_forward_hook(lambda m, a, out: seen.append(case.leave(out))))
    case.run(model)
    for handle in handles:
        handle.remove()
    return seen


def relative(adapted, frozen, channels=-1):
    """The mean of ‖adapted − frozen‖ / ‖frozen‖ at each block."""
    return [
        float(((a - f).double().norm(dim=channels) / f.double().norm(dim=channels)).mean())
        for a, f in zip(adapted, frozen, strict=True)
    ]


@pytest.mark.parametrize("name", ["gpt2", "mamba", "mamba_ssm-1", "timm-vit", "timm-resnet", "timm-swin"])
@torch.no_grad()
def test_drift_is_the_mean_relative_distance(name):
    case = case_of(name)
    model = randomise(steer(case.build(), rank=2))
    adapted = outputs(case, model)
    with use(model, None):
        expected = relative(adapted, outputs(case, model), 1 if name == "timm-resnet" else -1)
    found = drift(model, [case.inputs(model)])
    assert found.task == pytest.approx(expected, rel=1e-5)
    assert min(found.task) > 0.01
    assert (found.other, found.interference, found.final_interference) == (None, None, None)


class Scale(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))

    def forward(self, z):
        return z * self.factor


def test_a_closed_form_with_other_data():
    """H(z) = z/2·λ on two of three axes, beside the first of two blocks: 2z becomes 3z, a drift of a half."""
    model = nn.Sequential(Scale(2.0), Scale(1.0))
    backbone = Backbone(blocks=list(model), width=3)
    steer(model, backbone, rank=3, layers=[0], scale=2.0, activation="identity", bias=False)
    with torch.no_grad():
        field = model._residual_steering.fields("default")["block", 0]
        field.down.weight.copy_(torch.eye(3))
        field.up.weight.copy_(torch.diag(torch.tensor([0.5, 0.5, 0.0])))
    task = [torch.tensor([[[1.0, 2.0, 0.0]], [[0.0, 0.0, 0.0]]])]  # the token at 0 has no ratio
    other = [torch.tensor([[[0.0, 0.0, 4.0], [3.0, 0.0, 4.0]]])]
    found = drift(model, task, other)
    assert found.task == pytest.approx((0.5, 0.5))
    assert found.other == pytest.approx((0.15, 0.15))  # none, and 3 of 10 for the second
    assert found.interference == pytest.approx((0.3, 0.3))
    assert found.final_interference == pytest.approx(0.3)
    assert found.tokens == (1, 2)
    assert found.table().rows[1] == pytest.approx({"layer": 1, "task": 0.5, "other": 0.15, "ratio": 0.3})
    lines = {line.get_label(): line.get_ydata().tolist() for line in found.plot().axes[0].lines}
    assert lines == {"task": list(found.task), "other data": list(found.other)}
    assert list(drift(model, task).table().columns) == ["layer", "task"]


def test_an_untrained_field_does_not_drift():
    found = drift(steer(vit(), rank=4), [IMAGES], [IMAGES])
    assert found.task == found.other == (0.0, 0.0, 0.0)
    assert found.interference == (None, None, None)
    assert found.final_interference is None


@pytest.mark.parametrize(
    ("name", "how"),
    [("timm-vit", "vpt-shallow"), ("timm-vit", "vpt-deep"), ("gpt2", "prompt"), ("mamba", "prompt"), ("gpt2", "lora")],
)
@torch.no_grad()
def test_tokens_of_a_method_are_left_out(name, how):
    case = case_of(name)
    frozen = case.build()
    model = method(how, frozen, **({} if how == "lora" else {"length": 3}))
    found = drift(model, [case.inputs(model)], reference=frozen)
    at, adapted, before = 1 if name == "timm-vit" else 0, [], outputs(case, frozen)  # behind CLS, and before a text
    for z, like in zip(outputs(case, model), before, strict=True):
        adapted.append(z if z.shape == like.shape else torch.cat([z[:, :at], z[:, at + 3 :]], 1))
    assert found.task == pytest.approx(relative(adapted, before), rel=1e-4)
    assert min(found.task) > 1e-3


def test_bad_references_and_a_second_loader_without_data_are_refused():
    model = shake(steer(vit(), rank=4))
    with pytest.raises(SteerError, match="no batch"):
        drift(model, [IMAGES], [])
    with pytest.raises(SteerError, match="it has 3, and the reference 2"):
        drift(model, [IMAGES], reference=vit(depth=2))
    with pytest.raises(SteerError, match="one backbone"):
        drift(model, [IMAGES], reference=vit(width=16))
    plain = unsteer(copy.deepcopy(model))
    assert drift(plain, [IMAGES], reference=vit()).task == (0.0, 0.0, 0.0)
