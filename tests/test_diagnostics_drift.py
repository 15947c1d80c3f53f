"""Drift from the frozen trajectory, against what the blocks give, and for methods with tokens of their own."""

import copy

import pytest
import torch
from torch import nn

from cases import CASES, randomise
from fields import IMAGES, shake, vit
from residual_steer import Backbone, SteerError, baselines, steer, unsteer, use
from residual_steer.diagnostics.compare import beside
from residual_steer.diagnostics.drift import drift
from streams import Block, InPlace, Model


def case_of(name):
    return next(case for case in CASES if case.name == name)


def outputs(case, model):
    """What leaves each block, by hooks of the test's own."""
    seen, handles = [], []
    for block in case.modules(model, "block"):
        handles.append(block.register_forward_hook(lambda m, a, out: seen.append(case.leave(out))))
    case.run(model)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("name", ["gpt2", "mamba", "mamba_ssm-1", "timm-vit", "timm-resnet", "timm-swin"])
@torch.no_grad()
def test_drift_is_the_mean_relative_distance(name):
    case = case_of(name)
    model = randomise(steer(case.build(), rank=2))
    adapted = outputs(case, model)
    with use(model, None):
        frozen = outputs(case, model)
    channels = 1 if name == "timm-resnet" else -1
    expected = [
        float(((a - f).double().norm(dim=channels) / f.double().norm(dim=channels)).mean())
        for a, f in zip(adapted, frozen, strict=True)
    ]
    found = drift(model, [case.inputs(model)])
    assert found.task == pytest.approx(expected, rel=1e-5)
    assert min(found.task) > 0.01
    assert found.other is None
    assert found.interference is None
    assert found.final_interference is None
    again = drift(model, [case.inputs(model)], reference=case.build())
    assert again.task == pytest.approx(expected, rel=1e-4)


class Shift(nn.Module):
    """A model whose one block doubles its input: adapted, it is tripled."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Scale(2.0), Scale(1.0)])

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


class Scale(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))

    def forward(self, z):
        return z * self.factor


def scaled():
    """H(z) = z/2·λ beside the first of two blocks: 2z becomes 3z, a drift of a half."""
    model = Shift()
    steer(
        model, Backbone(blocks=model.blocks, width=3), rank=3, layers=[0], scale=2.0, activation="identity", bias=False
    )
    with torch.no_grad():
        field = model._residual_steering.fields("default")[0]
        field.down.weight.copy_(torch.eye(3))
        field.up.weight.copy_(torch.diag(torch.tensor([0.5, 0.5, 0.0])))
    return model


def test_a_closed_form_with_other_data():
    model = scaled()
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
    ("name", "method"),
    [("timm-vit", "vpt-shallow"), ("timm-vit", "vpt-deep"), ("gpt2", "prompt"), ("mamba", "prompt"), ("gpt2", "lora")],
)
@torch.no_grad()
def test_tokens_of_a_method_are_left_out(name, method):
    """The drift of a prompt at the last block is that of the tokens that the backbone hands on, by its own output."""
    case = case_of(name)
    frozen = case.build()
    model = baselines.apply(case.build(), method, **({} if method == "lora" else {"length": 3}))
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.5)
    found = drift(model, [case.inputs(model)], reference=frozen)
    states = []
    for one in (model, frozen):
        seen = outputs(case, one)
        states.append(seen)
    expected = []
    for a, f in zip(*states, strict=True):
        if a.shape[1] > f.shape[1]:  # behind CLS, and before a text
            at = 1 if name == "timm-vit" else 0
            a = torch.cat([a[:, :at], a[:, at + 3 :]], 1)
        expected.append(float(((a - f).double().norm(dim=-1) / f.double().norm(dim=-1)).mean()))
    assert found.task == pytest.approx(expected, rel=1e-4)
    assert min(found.task) > 1e-3


def test_new_tokens_stand_behind_the_prefix():
    z = torch.randn(5, 6, 4)
    for prefix in (0, 1, 3):
        longer = torch.cat([z[:, :prefix], torch.randn(5, 2, 4), z[:, prefix:]], 1)
        assert torch.equal(beside(longer, z, prefix), z)
    assert torch.equal(beside(z, z, 1), z)
    for other, word in (
        (z[:, 1:], "5 tokens where the reference has 6"),
        (z[1:], "backbone"),
        (z[..., 1:], "backbone"),
    ):
        with pytest.raises(SteerError, match=word):
            beside(other, z, 1)


@torch.no_grad()
def test_a_prompt_behind_padding_on_the_left():
    case = case_of("gpt2")
    model = baselines.apply(case.build(), "prompt", length=3)
    ids = torch.randint(3, 50, (2, 7))
    mask = torch.tensor([[1] * 7, [0] * 3 + [1] * 4])
    padded = drift(
        model,
        [{"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp_min(0)}],
        reference=case.build(),
    )
    rows = [
        {"input_ids": ids[:1], "attention_mask": mask[:1]},
        {"input_ids": ids[1:, 3:], "attention_mask": mask[1:, 3:]},
    ]
    alone = drift(model, rows, reference=case.build())
    assert padded.task == pytest.approx(alone.task, rel=1e-4)
    assert padded.tokens == (11,)


def test_blocks_that_work_in_place():
    ids = torch.randint(4, (2, 3))
    inplace, plain = Model(InPlace), Model(Block)
    for block in plain.body:
        block.norm = nn.Identity()
    plain.load_state_dict({key: value for key, value in inplace.state_dict().items() if "norm" not in key})
    found = []
    for model, flag in ((inplace, True), (plain, False)):
        steer(model, Backbone(blocks=model.body, width=8, inplace=flag), rank=2)
        found.append(drift(randomise(model), [ids]).task)
    assert found[0] == pytest.approx(found[1], rel=1e-6)
    assert len(set(found[0])) == 3


class Skipped(Shift):
    def forward(self, x):
        return self.blocks[0](x)


def test_a_block_that_is_not_called_is_named():
    model = Skipped()
    steer(model, Backbone(blocks=model.blocks, width=3), rank=1)
    with pytest.raises(SteerError, match="without calling block 1"):
        drift(model, [torch.ones(1, 1, 3)])


def test_bad_input_is_refused():
    model = shake(steer(vit(), rank=4))
    with pytest.raises(SteerError, match="no batch"):
        drift(model, [IMAGES], [])
    with pytest.raises(SteerError, match="it has 3, and the reference 2"):
        drift(model, [IMAGES], reference=vit(depth=2))
    with pytest.raises(SteerError, match="one backbone"):
        drift(model, [IMAGES], reference=vit(width=16))
    plain = unsteer(copy.deepcopy(model))
    assert drift(plain, [IMAGES], reference=vit()).task == (0.0, 0.0, 0.0)
