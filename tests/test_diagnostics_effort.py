"""How hard a field pushes, against sums over all tokens of what the blocks were really given."""

import math

import pytest
import torch
from torch import nn

from cases import CASES, closed_form, randomise
from fields import IMAGES, shake, vit
from residual_steer import Backbone, SteerError, steer, unsteer, use
from residual_steer.diagnostics.drift import drift
from residual_steer.diagnostics.effort import control_effort
from residual_steer.diagnostics.landscape import plane
from streams import Block, InPlace, Model

SITES = [
    ("timm-vit", "block"), ("timm-vit", "mixer"), ("timm-vit", "mlp"), ("timm-vit", "input"), ("timm-resnet", "block"),
    ("mamba", "input"), ("mamba_ssm-1", "block"), ("timm-swin", "mixer"),
]  # fmt: skip


def case_of(name):
    return next(case for case in CASES if case.name == name)


def rows(z, channels):
    return z.double().movedim(channels, -1).reshape(-1, z.shape[channels])


def effective_rank(steered):
    """exp of the entropy of the normalised eigenvalues of the uncentred covariance, from singular values."""
    values = torch.linalg.svdvals(steered) ** 2
    part = (values / values.sum()).tolist()
    return math.exp(-sum(p * math.log(p) for p in part if p > 0))


def reference(case, model, site):
    """Every measure from what each point of the unsteered model is given and gives, block by block.

    A field changes what the next block is given: what enters is taken from the steered model, and what the module
    alone makes of it from a call of its own.
    """
    state = model._residual_steering
    found, total = {}, 0.0
    for index, field in state.fields("default").items():
        host = state.backbone.point(index, site)
        seen = {}

        def enter(module, args, kwargs, seen=seen):
            seen["args"], seen["kwargs"] = args, kwargs

        handle = host.register_forward_pre_hook(enter, with_kwargs=True, prepend=True)
        case.run(model)
        handle.remove()
        read = (
            case.enter
            if site == "block"
            else lambda args, kwargs: next((a for a in args if torch.is_tensor(a)), kwargs.get("hidden_states"))
        )
        leave = case.leave if site == "block" else lambda out: out if torch.is_tensor(out) else out[0]
        z = read(seen["args"], seen["kwargs"])
        if site == "input":
            out = leave(host(*seen["args"], **seen["kwargs"]))
        else:
            with use(model, None):
                out = leave(host(*seen["args"], **seen["kwargs"]))
        channels = state.backbone.channels
        own = rows(out - z if site == "block" else out, channels)
        steered, z = rows(closed_form(field, z), channels), rows(z, channels)
        ratio = field.scale * steered.norm(dim=1) / z.norm(dim=1)
        turned = own.norm(dim=1) > 0  # ReLU keeps some at 0
        cosine = ((steered * own).sum(1) / steered.norm(dim=1) / own.norm(dim=1))[turned]
        found[index] = [
            float(ratio.mean()),
            float(cosine.mean()),
            effective_rank(steered),
            float((ratio**2).mean()),
            len(z),
        ]
        total += found[index][3]
    return {index: [a, b, c, d / total, n] for index, (a, b, c, d, n) in found.items()}


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
        effort, cosine, rank, share, tokens = expected[one.layer]
        assert one.tokens == tokens
        assert (one.effort, one.cosine, one.rank, one.share) == pytest.approx(
            (effort, cosine, rank, share), rel=2e-4, abs=1e-6
        )
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


def test_a_closed_form():
    """H(z) = b alone: the effort is λ‖b‖/‖z‖, in one direction, at an angle to the update that is known."""
    model = nn.Sequential(Fixed([2.0, 0.0]), Fixed([0.0, 1.0]))
    steer(model, Backbone(blocks=list(model), width=2), rank=1, scale=0.5)
    with torch.no_grad():
        for index, field in model._residual_steering.fields("default").items():
            field.up.bias.copy_(torch.tensor([[3.0, 4.0], [0.0, 2.0]][index]))
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
    assert found.table().rows[0]["share"] == pytest.approx(100 * first.share)


def test_a_field_against_the_blocks_own_update():
    model = nn.Sequential(Fixed([2.0, 0.0]))
    steer(model, Backbone(blocks=list(model), width=2), rank=1, scale=-1.0)
    with torch.no_grad():
        model._residual_steering.fields("default")[0].up.bias.copy_(torch.tensor([-1.0, 0.0]))
    one = control_effort(model, [torch.ones(3, 4, 2)]).layers[0]
    assert one.effort == pytest.approx(1 / math.sqrt(2))
    assert one.cosine == pytest.approx(-1)  # of H itself, whatever the sign of λ


@pytest.mark.parametrize("bias", [True, False])
def test_the_effective_rank_of_directions_of_equal_weight(bias):
    """H(z) = z on the first three of five axes, and nothing on the others."""
    model = nn.Sequential(Fixed([0.0] * 5))
    steer(model, Backbone(blocks=list(model), width=5), rank=3, activation="identity", bias=bias)
    with torch.no_grad():
        field = model._residual_steering.fields("default")[0]
        field.down.weight.copy_(torch.eye(5)[:3])
        field.up.weight.copy_(torch.eye(5)[:, :3])
        if bias:
            field.down.bias.zero_()
    z = torch.cat([torch.eye(5), -torch.eye(5)])[:, None]
    one = control_effort(model, [z]).layers[0]
    assert one.rank == pytest.approx(3)
    assert one.effort == pytest.approx(0.6)
    assert one.cosine is None  # the block adds nothing


def half_hidden():
    """As many tokens for the decoder as for the encoder, whose mask hides most of them."""
    ids, mask = torch.randint(3, 50, (1, 4)), torch.tensor([[1, 0, 0, 0]])
    return {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": ids.flip(1), "use_cache": False}


def test_the_mask_of_an_encoder_does_not_hide_tokens_of_its_decoder():
    model = randomise(steer(case_of("t5").build(), rank=2))
    batch = half_hidden()
    assert [one.tokens for one in control_effort(model, [batch]).layers] == [4, 4, 4, 4]
    assert drift(model, [batch]).tokens == (4,)
    assert plane(model, [batch]).tokens == 4


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
    assert control_effort(torch.compile(model), [IMAGES]) == found
    assert control_effort(model, [IMAGES]) == found


def test_blocks_that_work_in_place():
    ids = torch.randint(4, (2, 3))
    torch.manual_seed(5)
    inplace = Model(InPlace)
    plain = Model(Block)
    for block in plain.body:
        block.norm = nn.Identity()
    plain.load_state_dict({key: value for key, value in inplace.state_dict().items() if "norm" not in key})
    found = []
    for model, flag in ((inplace, True), (plain, False)):
        steer(model, Backbone(blocks=model.body, width=8, inplace=flag), rank=2)
        found.append(control_effort(randomise(model), [ids]))
    for a, b in zip(*(one.layers for one in found), strict=True):
        assert (a.effort, a.cosine, a.rank) == pytest.approx((b.effort, b.cosine, b.rank), rel=1e-6)


def test_bad_input_is_refused():
    model = shake(steer(vit(), rank=4))
    with pytest.raises(SteerError, match="received 'law'"):
        control_effort(model, [IMAGES], name="law")
    use(model, None)
    with pytest.raises(SteerError, match="none of them acts"):
        control_effort(model, [IMAGES])
    with pytest.raises(SteerError, match="not steered"):
        control_effort(unsteer(model), [IMAGES])


@pytest.mark.parametrize("what", ["field", "block"])
def test_nan_of_the_field_or_of_the_block_is_refused(what):
    model = nn.Sequential(Fixed([2.0, 0.0]))
    steer(model, Backbone(blocks=list(model), width=2), rank=1)
    with torch.no_grad():
        broken = model[0].vector if what == "block" else model._residual_steering.fields("default")[0].up.bias
        broken[1] = float("nan")
    match = "adds to it has 2 values of 4" if what == "field" else "update of what a field steers has 2 values of 4"
    with pytest.raises(SteerError, match=match):
        control_effort(model, [torch.ones(1, 2, 2)])


class Skipped(Model):
    def forward(self, ids):
        return self.head(self.body[0](self.embedding(ids)))


def test_a_block_that_is_not_called_is_named():
    model = Skipped()
    steer(model, Backbone(blocks=model.body, width=8), rank=2)
    with pytest.raises(SteerError, match=r"blocks \[1, 2\]"):
        control_effort(model, [torch.randint(4, (2, 3))])
