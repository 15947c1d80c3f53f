"""How far back a state remembers: closed forms, and the step Δ written out from the mixers' own parts."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import residual_steer as rs
from residual_steer.diagnostics import memory_length
from sharp import case_of, method, sharp, steered


def mixers(model):
    return [module for module in model.modules() if "A_log" in module._parameters]


def constant(name):
    """Return a model with Δ = 0.1·(1 + channel) at every token, and random A."""
    case = case_of(name)
    model = case.build()
    with torch.no_grad():
        for mixer in mixers(model):
            channels = mixer.A_log.shape[0]
            wanted = 0.1 * (1 + torch.arange(channels))
            if hasattr(mixer, "dt_proj"):
                mixer.dt_proj.weight.zero_()
                mixer.dt_proj.bias.copy_(wanted.expm1().log())
            else:
                mixer.in_proj.weight[-channels:] = 0
                mixer.dt_bias.copy_(wanted.expm1().log())
            mixer.A_log.copy_(torch.randn(mixer.A_log.shape))
    return case, model, wanted.double()


@pytest.mark.parametrize("name", ["mamba", "falcon-mamba", "mamba2", "mamba_ssm-1", "mamba_ssm-2"])
def test_a_constant_step_in_closed_form(name):
    case, model, step = constant(name)
    decays = [-mixer.A_log.detach().double().exp().reshape(len(step), -1) for mixer in mixers(model)]
    measured = memory_length(steered(model), [case.inputs(model)])
    expected = torch.stack([-1 / (step[:, None] * decay) for decay in decays])
    torch.testing.assert_close(measured.frozen_states, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(measured.frozen, expected.amax(2), rtol=1e-5, atol=0)
    torch.testing.assert_close(measured.adapted_step, step.expand(2, -1), rtol=1e-5, atol=0)
    torch.testing.assert_close(measured.change, torch.ones(2, dtype=torch.float64))
    # a unit state that is left alone for τ tokens falls to 1/e
    fallen = torch.exp(step[:, None] * decays[0]) ** measured.frozen_states[0]
    torch.testing.assert_close(fallen, torch.full_like(fallen, 1 / math.e), rtol=1e-4, atol=0)


def written_out(case, model, side):
    """Return Δ of every mixer from its own parts: what enters `dt_proj`'s product, or the end of `in_proj`."""
    found, handles = [], []

    def look(mixer, output):
        if hasattr(mixer, "x_proj"):
            rank = mixer.dt_proj.weight.shape[1]
            return F.softplus(output[..., :rank] @ mixer.dt_proj.weight.T + mixer.dt_proj.bias)
        limits = getattr(mixer, "time_step_limit", (0, math.inf))
        if case.name in {"zamba2", "nemotron-h"}:  # in some releases these ignore their `time_step_limit`
            limits = (model.config.time_step_min, math.inf)
        return F.softplus(output[..., -len(mixer.dt_bias) :] + mixer.dt_bias).clamp(*limits)

    for mixer in mixers(model):
        part = mixer.x_proj if hasattr(mixer, "x_proj") else mixer.in_proj
        hook = part.register_forward_hook(lambda _, args, output, mixer=mixer: found.append(look(mixer, output)))
        handles.append(hook)
    with rs.use(model, None if side == "frozen" else "default"):
        case.run(model)
    for handle in handles:
        handle.remove()
    return [delta.detach().double() for delta in found]


@pytest.mark.parametrize(
    ("name", "blocks"),
    [("mamba", (0, 1)), ("mamba2", (0, 1)), ("zamba2", (0, 1)), ("nemotron-h", (0,)), ("mamba_ssm-2", (0, 1))],
)
def test_it_follows_the_tokens(name, blocks):
    case = case_of(name)
    model = steered(sharp(case, 8))
    for mixer in mixers(model):
        if name == "mamba2":
            mixer.time_step_limit = (0.5, 2.0)
    expected = {side: written_out(case, model, side) for side in ("frozen", "adapted")}
    measured = memory_length(model, [case.inputs(model)])
    assert measured.blocks == blocks
    for side, steps in expected.items():
        step = torch.stack([delta.mean((0, 1)) for delta in steps])
        torch.testing.assert_close(getattr(measured, f"{side}_step"), step, rtol=1e-4, atol=1e-6)
        decay = torch.stack([mixer.A_log.detach().double().exp().reshape(step.shape[1], -1) for mixer in mixers(model)])
        lengths = getattr(measured, f"{side}_states")
        torch.testing.assert_close(lengths, 1 / (step[..., None] * decay), rtol=1e-4, atol=0)
    assert name != "mamba2" or (expected["frozen"][0] == 0.5).any()
    assert expected["frozen"][0].std((0, 1)).max() > 1e-3, "Δ is constant, and anything would do"


@pytest.mark.parametrize(("name", "blocks"), [("jamba", (0,)), ("qwen3-next", (0,)), ("falcon-h1", (0, 1))])
def test_hybrids_name_their_blocks(name, blocks):
    case = case_of(name)
    model = steered(case.build(), layers=[0])
    measured = memory_length(model, [case.inputs(model)])
    assert measured.blocks == blocks
    assert measured.untouched == 1
    assert [row["block"] for row in measured.table().rows] == list(blocks)


@pytest.mark.parametrize(("name", "switch"), [("mamba_ssm-1", "use_fast_path"), ("mamba_ssm-2", "use_mem_eff_path")])
def test_fused_functions_are_off_meanwhile(name, switch):
    case, seen = case_of(name), []
    model = steered(case.build())
    for mixer in mixers(model):
        setattr(mixer, switch, True)
        mixer.register_forward_pre_hook(lambda mixer, _: seen.append(getattr(mixer, switch)))
    memory_length(model, [case.inputs(model)])
    assert set(seen) == {False}
    assert all(getattr(mixer, switch) for mixer in mixers(model))


@pytest.mark.parametrize(
    ("how", "options"), [("prompt", {"length": 3}), ("vpt-deep", {"length": 3}), ("lora", {"rank": 2})]
)
@torch.no_grad()
def test_methods_against_the_frozen_model(how, options):
    case = case_of("mamba2")
    frozen = sharp(case)
    model, seen = method(how, frozen, **options), []
    measured = memory_length(model, [case.inputs(frozen)], reference=frozen)
    mixers(model)[0].in_proj.register_forward_hook(lambda *x: seen.append(x[2]))
    case.run(model)
    bias = mixers(model)[0].dt_bias
    delta = F.softplus(seen[0][..., -len(bias) :] + bias)[:, -7:]  # a prompt stands before the text
    torch.testing.assert_close(measured.adapted_step[0], delta.double().mean((0, 1)), rtol=1e-5, atol=0)
    assert measured.tokens == 14


def test_a_decay_that_trains_along_is_another_one():
    case = case_of("mamba2")
    model = steered(case.build(), layers=[0], train=["backbone.layers.1.mixer.A_log"])
    with torch.no_grad():
        mixers(model)[1].A_log.sub_(math.log(2))
    measured = memory_length(model, [case.inputs(model)])
    torch.testing.assert_close(measured.change[0], torch.tensor(1.0, dtype=torch.float64))
    slower = measured.adapted * measured.adapted_step / (measured.frozen * measured.frozen_step)
    torch.testing.assert_close(slower[1], torch.full_like(slower[1], 2.0), rtol=1e-6, atol=0)
    assert measured.change[1] == (measured.adapted[1] / measured.frozen[1]).median()
    assert measured.equal == (True, False)
    (axes,) = measured.plot().axes
    assert (axes.get_yscale(), axes.lines[1].get_label()) == ("log", "adapted")


class Mixer(nn.Module):
    """A user's own mixer, whose Δ at a token is softplus of the token, one for each head."""

    def __init__(self, function):
        super().__init__()
        self.A_log, self.function = nn.Parameter(torch.zeros(4)), function

    def forward(self, z):
        return z * self.function(z)


class Block(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.mixer = Mixer(function)

    def forward(self, z):
        z = z + self.mixer(z)
        return z + F.softplus(z)  # which is no Δ


def built(function, depth=2):
    model = nn.Sequential(*(Block(function) for _ in range(depth)))
    rs.steer(model, rs.Backbone(blocks=list(model), width=4), rank=2)
    return model


@torch.no_grad()
def test_a_mixer_of_ones_own_is_measured_and_nothing_beside_it():
    model, z = built(F.softplus), torch.randn(2, 3, 4)
    measured = memory_length(model, [z])
    step = torch.stack([F.softplus(x).double().mean((0, 1)) for x in (z, model[0](z))])
    torch.testing.assert_close(measured.frozen_step, step)
    torch.testing.assert_close(measured.frozen, 1 / step)


def test_as_many_tokens_as_channels_are_refused_where_they_cannot_be_told_apart():
    model = steered(case_of("mamba").build())
    with pytest.raises(rs.SteerError, match="the 32 tokens and as many channels"):
        memory_length(model, [torch.randint(3, 50, (2, 32))])
    model = steered(case_of("mamba2").build())
    assert memory_length(model, [torch.randint(3, 50, (2, 4))]).tokens == 8


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: (built(torch.tanh), torch.randn(2, 3, 4)), "Δ of this Mixer was not seen: compiled kernels"),
        (
            lambda: (built(lambda z: F.softplus(z) * F.softplus(-z)), torch.randn(2, 3, 4)),
            r"one result of softplus of the shape \(2, 3, 4\).* has 2 of them",
        ),
        (lambda: (steered(case_of("gpt2").build()), torch.ones(1, 3).long()), "GPT2Block have none.*attention_entropy"),
    ],
)
def test_what_cannot_be_measured_is_refused(make, match):
    model, x = make()
    with pytest.raises(rs.SteerError, match=match):
        memory_length(model, [x])


def test_a_reference_of_other_states_and_a_step_that_is_nan_are_refused():
    case = case_of("mamba")
    model, ids = steered(case.build()), torch.randint(3, 50, (2, 5))
    with pytest.raises(rs.SteerError, match=r"with \(channels, states\) of"):
        memory_length(model, [ids], reference=case_of("mamba2").build())
    with torch.no_grad():
        mixers(model)[0].dt_proj.bias.fill_(torch.nan)
    with pytest.raises(rs.SteerError, match=r"Δ of block 0 has .* NaN"):
        memory_length(model, [ids])
