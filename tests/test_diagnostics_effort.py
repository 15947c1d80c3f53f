"""How hard a field pushes, against sums over all tokens of what the blocks were really given."""

import math

import pytest
import torch
from torch import nn

from cases import closed_form, randomise
from fields import IMAGES, shake, vit
from residual_steer import Backbone, SteerError, steer, use
from residual_steer.diagnostics import control_effort
from sharp import case_of


def rows(z, channels):
    return z.double().movedim(channels, -1).reshape(-1, z.shape[channels])


def effective_rank(steered):
    """exp of the entropy of the normalised eigenvalues of the uncentred covariance, from singular values."""
    values = torch.linalg.svdvals(steered) ** 2
    part = (values / values.sum()).tolist()
    return math.exp(-sum(p * math.log(p) for p in part if p > 0))


def first_tensor(args, kwargs):
    return next((a for a in args if torch.is_tensor(a)), kwargs.get("hidden_states"))


def reference(case, model, site):
    """Every measure from what each point of the unsteered model is given and gives, block by block.

    A field changes what the next block is given: what enters is taken from the steered model, and what the module
    alone makes of it from a call of its own.
    """
    state = model._residual_steering
    read = case.enter if site in ("block", "after") else first_tensor
    leave = case.leave if site in ("block", "after") else lambda out: out if torch.is_tensor(out) else out[0]
    found, channels = {}, state.backbone.channels
    for (_, index), field in state.fields("default").items():
        host, calls = state.backbone.point(index, site), []
        handle = host.register_forward_pre_hook(
            lambda m, a, k, calls=calls: calls.append((a, k)), with_kwargs=True, prepend=True
        )
        case.run(model)
        handle.remove()
        args, kwargs = calls[-1]
        z = read(args, kwargs)
        with use(model, "default" if site == "input" else None):
            out = leave(host(*args, **kwargs))
        own = rows(out - z if site in ("block", "after") else out, channels)
        z = out if site == "after" else z
        steered, z = rows(closed_form(field, z), channels), rows(z, channels)
        ratio = field.scale * steered.norm(dim=1) / z.norm(dim=1)
        turned = own.norm(dim=1) > 0  # ReLU keeps some at 0
        cosine = ((steered * own).sum(1) / steered.norm(dim=1) / own.norm(dim=1))[turned]
        found[index] = [ratio.mean(), cosine.mean(), effective_rank(steered), (ratio**2).mean(), len(z)]
    total = sum(float(each[3]) for each in found.values())
    return {index: [float(a), float(b), c, float(d) / total, n] for index, (a, b, c, d, n) in found.items()}


SITES = [
    ("timm-vit", "block"), ("timm-vit", "mixer"), ("timm-vit", "mlp"), ("timm-vit", "input"), ("timm-resnet", "block"),
    ("mamba", "input"), ("mamba_ssm-1", "block"), ("timm-swin", "mixer"), ("mamba_ssm-1", "after"),
    ("gpt2", "mlp.c_fc"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "site"), SITES)
@torch.no_grad()
def test_effort_is_what_the_blocks_were_given(name, site):
    case = case_of(name)
    model = case.build()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)  # timm's residual branches begin with zeros, and so without an update
    randomise(steer(model, rank=2, site=site, scale=0.7))
    expected = reference(case, model, site)
    found = control_effort(model, [case.inputs(model)])
    assert (found.site, found.scale) == (site, 0.7)
    assert {one.layer for one in found.layers} == set(expected)
    for one in found.layers:
        values = [one.effort, one.cosine, one.rank, one.share, one.tokens]
        assert values == pytest.approx(expected[one.layer], rel=2e-4, abs=1e-6)
        assert one.effort > 0.01
        assert 1 <= one.rank <= 3


def test_an_untrained_field_makes_no_effort():
    found = control_effort(steer(vit(), rank=4), [(IMAGES, torch.zeros(2))])
    for one in found.layers:
        assert (one.effort, one.cosine, one.rank, one.share, one.bottleneck) == (0.0, None, None, None, 4)
    assert found.table().rows[0]["share"] is None
    found.plot()


class Fixed(nn.Module):
    """A block that adds a fixed vector."""

    def __init__(self, vector):
        super().__init__()
        self.vector = nn.Parameter(torch.tensor(vector))

    def forward(self, z):
        return z + self.vector


def fixed(*vectors, rank=1, **options):
    """Return blocks that add vectors, steered, and their fields."""
    model = nn.Sequential(*map(Fixed, vectors))
    steer(model, Backbone(blocks=list(model), width=len(vectors[0])), rank=rank, **options)
    return model, [*model._residual_steering.fields("default").values()]


@torch.no_grad()
def test_a_closed_form():
    """H(z) = b alone: the effort is λ‖b‖/‖z‖, in one direction, at an angle to the update that is known."""
    model, fields = fixed([2.0, 0.0], [0.0, 1.0], scale=0.5)
    for index, bias in enumerate([[3.0, 4.0], [0.0, 2.0]]):
        fields[index].up.bias.copy_(torch.tensor(bias))
    found = control_effort(model, [torch.tensor([[[10.0, 0.0]], [[0.0, 5.0]], [[0.0, 0.0]]])])
    first, second = found.layers
    assert first.effort == pytest.approx((2.5 / 10 + 2.5 / 5) / 2)  # the token at 0 has no ratio
    assert first.cosine == pytest.approx(0.6)
    assert first.rank == pytest.approx(1)
    entering = torch.tensor([[13.5, 2.0], [3.5, 7.0], [3.5, 2.0]]).norm(dim=1)
    assert second.effort == pytest.approx(float((1 / entering).mean()))
    assert second.cosine == pytest.approx(1)
    squared = [(0.25**2 + 0.5**2) / 2, float((1 / entering**2).mean())]
    assert (first.share, second.share) == pytest.approx([s / sum(squared) for s in squared])


@torch.no_grad()
def test_a_field_against_the_blocks_own_update():
    model, fields = fixed([2.0, 0.0], scale=-1.0)
    fields[0].up.bias.copy_(torch.tensor([-1.0, 0.0]))
    one = control_effort(model, [torch.ones(3, 4, 2)]).layers[0]
    assert one.effort == pytest.approx(1 / math.sqrt(2))
    assert one.cosine == pytest.approx(-1)  # of H itself, whatever the sign of λ


@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_the_effective_rank_of_directions_of_equal_weight(bias):
    """H(z) = z on the first three of five axes, and nothing on the others."""
    model, fields = fixed([0.0] * 5, rank=3, activation="identity", bias=bias)
    fields[0].down.weight.copy_(torch.eye(5)[:3])
    fields[0].up.weight.copy_(torch.eye(5)[:, :3])
    one = control_effort(model, [torch.cat([torch.eye(5), -torch.eye(5)])[:, None]]).layers[0]
    assert one.rank == pytest.approx(3)
    assert one.effort == pytest.approx(0.6)
    assert one.cosine is None  # the block adds nothing


def test_a_field_is_measured_alone_and_the_mix_comes_back():
    model = shake(steer(vit(), rank=4, name="one"))
    shake(steer(model, rank=2, layers=[1], name="two"))
    use(model, {"one": 0.5, "two": 2.0})
    mix = model._residual_steering.mix
    with pytest.raises(SteerError, match="several of them act"):
        control_effort(model, [IMAGES])
    found = control_effort(model, [IMAGES], name="two")
    assert model._residual_steering.mix == mix
    assert [one.layer for one in found.layers] == [1]
    assert found.layers[0].share == pytest.approx(1)
    use(model, "two")
    assert control_effort(model, [IMAGES]) == found
    use(model, None)
    with pytest.raises(SteerError, match="none of them acts"):
        control_effort(model, [IMAGES])


@pytest.mark.parametrize(("what", "match"), [("field", "adds to it has 2"), ("block", "of what a field steers has 2")])
def test_nan_of_the_field_or_of_the_block_is_refused(what, match):
    model, fields = fixed([2.0, 0.0])
    with torch.no_grad():
        (model[0].vector if what == "block" else fields[0].up.bias)[1] = float("nan")
    with pytest.raises(SteerError, match=match + " values of 4"):
        control_effort(model, [torch.ones(1, 2, 2)])
