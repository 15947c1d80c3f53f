"""How far back a state remembers: closed forms, the step Δ written out from the mixers' own parts, and simulation."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import residual_steer as rs
from residual_steer.diagnostics.memory import memory_length
from sharp import case_of, sharp, steered, traces


def mixers(model):
    return [module for module in model.modules() if "A_log" in module._parameters]


def constant(name):
    """Return a model with Δ = 0.1·(1 + channel) at every token, and random A."""
    case = case_of(name)
    model = case.build()
    torch.manual_seed(4)
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
    for mixer in mixers(model):
        part = mixer.x_proj if hasattr(mixer, "x_proj") else mixer.in_proj

        def look(_, args, output, mixer=mixer):
            if hasattr(mixer, "x_proj"):
                rank = mixer.dt_proj.weight.shape[1]
                found.append(F.softplus(output[..., :rank] @ mixer.dt_proj.weight.T + mixer.dt_proj.bias))
            else:
                limits = getattr(mixer, "time_step_limit", None) or (0, math.inf)  # which not every release has
                found.append(F.softplus(output[..., -len(mixer.dt_bias) :] + mixer.dt_bias).clamp(*limits))

        handles.append(part.register_forward_hook(look))
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
    spread = expected["frozen"][0].std((0, 1))
    assert name != "mamba2" or (expected["frozen"][0] == 0.5).any()
    assert spread.max() > 1e-3, "Δ is constant, and anything would do"


@pytest.mark.parametrize(("name", "blocks"), [("jamba", (0,)), ("qwen3-next", (0,)), ("falcon-h1", (0, 1))])
def test_hybrids_name_their_blocks(name, blocks):
    case = case_of(name)
    model = steered(case.build(), layers=[0])
    measured = memory_length(model, [case.inputs(model)])
    assert measured.blocks == blocks
    assert measured.untouched == 1
    assert [row["block"] for row in measured.table().rows] == list(blocks)


@pytest.mark.parametrize(("layers", "site", "untouched"), [([0], "block", 1), ([1], "block", 2), ([0], "input", 0)])
def test_a_field_changes_what_the_next_block_remembers(layers, site, untouched):
    case = case_of("mamba")
    measured = memory_length(steered(sharp(case), layers=layers, site=site), [case.inputs(case.build())])
    assert measured.untouched == untouched
    assert measured.equal == tuple(layer < untouched for layer in range(2))
    assert (measured.frozen_step[untouched:] != measured.adapted_step[untouched:]).all()
    assert f"equal in the first {untouched} of 2" in measured.table().notes[0]


@torch.no_grad()
def test_steps_are_equal_only_if_they_are_in_every_batch():
    frozen = sharp(case_of("mamba"))
    model = copy.deepcopy(frozen)
    model.get_input_embeddings().weight[9] += 1
    with_it, without = torch.tensor([[9, 4, 5]]), torch.tensor([[4, 5, 6]])
    assert memory_length(model, [without], reference=frozen).untouched == 2
    for loader in ([with_it, without], [without, with_it]):
        assert memory_length(model, loader, reference=frozen).equal == (False, False)


def padded():
    torch.manual_seed(5)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1]])
    return {"input_ids": torch.randint(3, 50, (3, 6)), "attention_mask": mask}


@pytest.mark.parametrize("name", ["mamba", "mamba2"])
def test_batch_by_batch_is_as_all_at_once_and_padding_does_not_count(name):
    model, whole = steered(sharp(case_of(name))), padded()
    parts = [{key: x[rows] for key, x in whole.items()} for rows in (slice(0, 2), slice(2, 3))]
    once, twice = memory_length(model, [whole]), memory_length(model, iter(parts))
    assert once.tokens == twice.tokens == 14
    torch.testing.assert_close(once.adapted_step, twice.adapted_step, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(once.frozen_states, twice.frozen_states, atol=0, rtol=1e-6)
    texts = zip(*whole.values(), strict=True)
    alone = [memory_length(model, [ids[mask.bool()][None]]) for ids, mask in texts]
    total = sum(one.adapted_step * one.tokens for one in alone)
    torch.testing.assert_close(once.adapted_step, total / 14, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("how", "options"), [("prompt", {"length": 3}), ("vpt-deep", {"length": 3}), ("lora", {"rank": 2})]
)
@torch.no_grad()
def test_methods_are_held_against_the_frozen_model(how, options):
    case = case_of("mamba2")
    frozen = sharp(case)
    torch.manual_seed(1)
    model = rs.baselines.apply(copy.deepcopy(frozen), how, **options)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn(parameter.shape))
    measured = memory_length(model, [case.inputs(frozen)], reference=frozen)
    seen = []
    mixers(model)[0].in_proj.register_forward_hook(lambda *x: seen.append(x[2]))
    case.run(model)
    delta = F.softplus(seen[0][..., -4:] + mixers(model)[0].dt_bias)[:, -7:]  # a prompt stands before the text
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
    torch.testing.assert_close(slower[1], torch.full((4,), 2.0, dtype=torch.float64), rtol=1e-6, atol=0)
    assert measured.change[1] == (measured.adapted[1] / measured.frozen[1]).median()
    assert measured.equal == (True, False)
    rows = measured.table().rows
    assert rows[1]["adapted_middle"] == pytest.approx(measured.adapted[1].quantile(0.5).item())
    (axes,) = measured.plot().axes
    assert axes.lines[0].get_ydata().tolist() == measured.frozen.median(1).values.tolist()
    assert (axes.get_yscale(), axes.lines[1].get_label()) == ("log", "adapted")


class Hidden(nn.Module):
    """A mixer whose Δ is computed where nobody sees it."""

    def __init__(self):
        super().__init__()
        self.A_log = nn.Parameter(torch.zeros(4))

    def forward(self, z):
        return z * 0.5


class Own(Hidden):
    """A user's own mixer, whose Δ at a token is softplus of the token, one for each head."""

    def forward(self, z):
        return z * F.softplus(z)


class Block(nn.Module):
    def __init__(self, mixer):
        super().__init__()
        self.mixer = mixer

    def forward(self, z):
        z = z + self.mixer(z)
        return z + F.softplus(z)  # which is no Δ


class Gated(Own):
    """One that gates by softplus too, in Δ's shape: which of the two is Δ cannot be seen."""

    def forward(self, z):
        return super().forward(z) * F.softplus(-z)


def test_a_second_softplus_of_the_same_shape_is_refused():
    model = nn.Sequential(Block(Gated()))
    rs.steer(model, rs.Backbone(blocks=list(model), width=4), rank=2)
    with pytest.raises(rs.SteerError, match=r"one result of softplus of the shape \(2, 3, 4\).* has 2 of them"):
        memory_length(model, [torch.randn(2, 3, 4)])


def test_as_many_tokens_as_channels_are_refused_where_they_cannot_be_told_apart():
    model = steered(case_of("mamba").build())
    with pytest.raises(rs.SteerError, match="the 32 tokens and as many channels"):
        memory_length(model, [torch.randint(3, 50, (2, 32))])
    model = steered(case_of("mamba2").build())
    assert memory_length(model, [torch.randint(3, 50, (2, 4))]).tokens == 8


@torch.no_grad()
def test_a_mixer_of_ones_own_is_measured_and_nothing_beside_it():
    model, z = nn.Sequential(Block(Own()), Block(Own())), torch.randn(2, 3, 4)
    rs.steer(model, rs.Backbone(blocks=list(model), width=4), rank=2)
    measured = memory_length(model, [z])
    step = torch.stack([F.softplus(x).double().mean((0, 1)) for x in (z, model[0](z))])
    torch.testing.assert_close(measured.frozen_step, step)
    torch.testing.assert_close(measured.frozen, 1 / step)


def test_what_cannot_be_measured_is_refused():
    case = case_of("mamba")
    model, batch = steered(case.build()), padded()
    case.run(model)
    quiet = traces(model)

    def fails(message, *args, **options):
        with pytest.raises(rs.SteerError, match=message):
            memory_length(*args, **options)

    fails("every one is padding", model, [{**batch, "attention_mask": torch.zeros_like(batch["attention_mask"])}])
    assert traces(model) == quiet
    other = case_of("gpt2")
    fails("blocks of GPT2Block have none.*attention_entropy", steered(other.build()), [batch])
    hidden = nn.Sequential(Block(Hidden()), Block(Hidden()))
    rs.steer(hidden, rs.Backbone(blocks=list(hidden), width=4), rank=2)
    fails("Δ of this Hidden was not seen: compiled kernels", hidden, [torch.randn(2, 3, 4)])
    with torch.no_grad():
        mixers(model)[0].dt_proj.bias.fill_(torch.nan)
    fails("Δ of block 0 has .* NaN", model, [batch])
    fails("with \\(channels, states\\) of", case.build(), [batch], reference=case_of("mamba2").build())
