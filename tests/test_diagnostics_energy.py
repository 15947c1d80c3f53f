"""The Hopfield energy, held against eq. 2 written out number by number, and attention as the step that lowers it."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import residual_steer as rs
from residual_steer._batches import Batch
from residual_steer.diagnostics.attention import attentions_of
from residual_steer.diagnostics.compare import compare
from residual_steer.diagnostics.energy import hopfield_energy, stream_energy
from sharp import case_of, rows_for, sharp, steered


def written_out(state, patterns, beta):
    """Return eq. 2 for one state `(d,)` and the patterns `(patterns, d)` that it sees."""
    state, patterns = state.tolist(), patterns.tolist()
    products = [sum(a * b for a, b in zip(state, pattern, strict=True)) for pattern in patterns]
    lse = math.log(sum(math.exp(beta * x) for x in products)) / beta
    largest = max(math.sqrt(sum(a * a for a in pattern)) for pattern in patterns)
    return -lse + sum(a * a for a in state) / 2 + math.log(len(patterns)) / beta + largest**2 / 2


@given(
    seed=st.integers(0, 10_000),
    count=st.integers(1, 6),
    width=st.integers(1, 5),
    size=st.floats(0.01, 4),
    beta=st.floats(0.05, 5),
)
@settings(deadline=None, max_examples=60)
def test_it_is_never_negative_and_attention_never_raises_it(seed, count, width, size, beta):
    generator = torch.Generator().manual_seed(seed)
    state = torch.randn(3, width, generator=generator, dtype=torch.float64) * size
    patterns = torch.randn(count, width, generator=generator, dtype=torch.float64) * size
    visible = torch.rand(3, count, generator=generator) < 0.7
    visible[:, 0] = True
    energy = hopfield_energy(state, patterns, beta, visible)
    for row in range(3):
        expected = written_out(state[row], patterns[visible[row]], beta)
        assert energy[row].item() == pytest.approx(expected, abs=1e-9, rel=1e-9)
    assert (energy >= -1e-12).all()
    scores = (beta * state @ patterns.T).masked_fill(~visible, -torch.inf)
    stepped = hopfield_energy(scores.softmax(-1) @ patterns, patterns, beta, visible)
    assert (stepped <= energy + 1e-9 * (1 + energy)).all()
    assert (stepped <= 2 * patterns.square().sum(-1).max() + 1e-9).all()  # the bound of the paper's lemma A1


def test_closed_forms():
    one = torch.tensor([[3.0, 4.0]])
    assert hopfield_energy(one, one.expand(7, 2), 0.5).item() == pytest.approx(0, abs=1e-12)  # at a stored pattern
    assert hopfield_energy(torch.zeros(1, 2), one, 0.5).item() == pytest.approx(12.5)  # ½·M²
    assert hopfield_energy(-one, one, 2.0).item() == pytest.approx(50)  # ½·|ξ − x|²
    assert hopfield_energy(one, one, 1.0, torch.tensor([[False]])).isinf().all()


NAMES = [
    "hf-vit",
    "timm-vit",
    "timm-eva",
    "gpt2",
    "gemma3",
    "qwen2-moe",
    "deepseek-v3",
    "bert",
    "opt",
    "falcon",
    "jamba",
]


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_it_is_of_the_queries_and_keys_that_make_the_maps(name):
    """softmax(β·q·k) over the visible keys gives the maps that the library gives; and the energies are written out."""
    case = case_of(name)
    model = steered(sharp(case, 6))
    inputs = case.inputs(model)
    batch = Batch(inputs)
    with compare(model) as pair:
        keys, maps = attentions_of(pair, batch, keys=True), attentions_of(pair, batch, keys=False)
    measured = stream_energy(model, [inputs])
    for side in ("frozen", "adapted"):
        each = []
        for layer, (look, told) in enumerate(zip(keys[side], maps[side], strict=True)):
            scores = look.scale * look.seen[0] @ look.seen[1].mT
            visible = torch.ones_like(scores, dtype=torch.bool) if look.visible is None else look.visible
            visible = visible.expand_as(scores)
            torch.testing.assert_close(
                scores.masked_fill(~visible, -torch.inf).softmax(-1), told.seen[0], atol=1e-5, rtol=0
            )
            rows, heads, length, _ = scores.shape
            energies = torch.tensor(
                [
                    [
                        [
                            written_out(look.seen[0][r, h, t], look.seen[1][r, h][visible[r, h, t]], look.scale)
                            for t in range(length)
                        ]
                        for h in range(heads)
                    ]
                    for r in range(rows)
                ]
            )
            each.append(energies)
            assert measured.beta[layer] == look.scale
        each = torch.stack(each).double()
        torch.testing.assert_close(getattr(measured, side), each.mean((1, 3)), rtol=1e-4, atol=1e-5)
        spread = each.std((1, 2, 3), correction=0)
        torch.testing.assert_close(getattr(measured, f"{side}_spread"), spread, rtol=1e-3, atol=1e-5)
    assert measured.tokens == rows * length
    assert measured.blocks == ((1,) if name == "jamba" else (0, 1))
    assert measured.beta[0] == pytest.approx({"opt": 1.0, "gemma3": 1 / 16, "deepseek-v3": 8**-0.5}.get(name, 8**-0.5))


@torch.no_grad()
def test_heads_that_share_keys_are_given_their_own():
    from transformers import LlamaConfig, LlamaModel

    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 50}
    model = LlamaModel(LlamaConfig(num_attention_heads=4, num_key_value_heads=2, initializer_range=0.5, **shape))
    steered(model.eval())
    with compare(model) as pair:
        batch = Batch(torch.randint(3, 50, (2, 5)))
        look, told = (attentions_of(pair, batch, keys=keys)["frozen"][0] for keys in (True, False))
    scores = (look.scale * look.seen[0] @ look.seen[1].mT).masked_fill(~look.visible, -torch.inf)
    torch.testing.assert_close(scores.softmax(-1), told.seen[0], atol=1e-5, rtol=0)
    assert torch.equal(look.seen[1][:, 0], look.seen[1][:, 1])
    assert not torch.equal(look.seen[1][:, 1], look.seen[1][:, 2])


class Causal(nn.Module):
    """A user's own block on torch's function, whose queries look back with four heads at keys of two."""

    def __init__(self):
        super().__init__()
        self.project = nn.Linear(8, 8 + 2 * 4)

    def forward(self, z):
        q, k, v = self.project(z).split([8, 4, 4], dim=-1)
        q, k, v = (x.unflatten(-1, (-1, 2)).transpose(1, 2) for x in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3, enable_gqa=True)
        return z + y.transpose(1, 2).flatten(2)


@torch.no_grad()
def test_torchs_own_function_is_listened_to():
    torch.manual_seed(0)
    model = nn.Sequential(Causal())
    steered(model, arch=rs.Backbone(blocks=list(model), width=8))
    z = torch.randn(2, 5, 8) * 3
    measured = stream_energy(model, [z])
    q, k, _ = model[0].project(z).split([8, 4, 4], dim=-1)
    q, k = (x.unflatten(-1, (-1, 2)).transpose(1, 2) for x in (q, k))
    expected = [
        [[written_out(q[r, h, t], k[r, h // 2, : t + 1], 0.3) for t in range(5)] for r in range(2)] for h in range(4)
    ]
    torch.testing.assert_close(measured.frozen[0], torch.tensor(expected).double().mean((1, 2)), rtol=1e-5, atol=1e-6)
    assert measured.beta == (0.3,)


@torch.no_grad()
def test_queries_and_keys_are_those_that_the_layer_projects():
    for name, parts in (("hf-vit", ("q_proj", "k_proj")), ("bert", ("query", "key"))):
        case, seen = case_of(name), []
        model = steered(sharp(case))
        for part in parts:
            projection = case.modules(model, "mixer")[0].get_submodule(part)
            projection.register_forward_hook(lambda *x, seen=seen: seen.append(x[2]))
        with compare(model) as pair:
            look = attentions_of(pair, Batch(case.inputs(model)), keys=True)["frozen"][0]
        query, key = (x.unflatten(-1, (2, 8)).transpose(1, 2) for x in seen[:2])
        assert torch.equal(look.seen[0], query)
        assert torch.equal(look.seen[1], key)


def test_beta_is_the_layers_own_unless_it_is_given():
    case = case_of("hf-vit")
    model = steered(sharp(case), layers=[0])
    own, hot = stream_energy(model, [case.inputs(model)]), stream_energy(model, [case.inputs(model)], beta=0.01)
    assert own.beta == (8**-0.5, 8**-0.5)
    assert hot.beta == (0.01, 0.01)
    assert not torch.allclose(own.frozen, hot.frozen, rtol=1e-3)
    same = stream_energy(model, [case.inputs(model)], beta=8**-0.5)
    assert torch.equal(same.frozen, own.frozen)
    assert own.change[0] == 0
    assert own.change[1] != 0


@torch.no_grad()
def test_a_prompts_keys_are_patterns_and_its_queries_no_states():
    case = case_of("hf-vit")
    frozen = sharp(case)
    torch.manual_seed(0)
    model = rs.baselines.apply(copy.deepcopy(frozen), "vpt-shallow", length=4)
    measured = stream_energy(model, [case.inputs(frozen)], reference=frozen)
    with compare(model, frozen) as pair:
        look = attentions_of(pair, Batch(case.inputs(frozen)), keys=True)["adapted"][0]
    assert look.seen[1].shape[2] == 9
    energy = hopfield_energy(look.seen[0], look.seen[1], look.scale)[
        :, :, [0, 5, 6, 7, 8]
    ]  # the prompt stands behind CLS
    torch.testing.assert_close(measured.adapted[0], energy.mean((0, 2)))
    assert measured.tokens == 2 * 5


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mamba", "a state and no attention.*memory_length"),
        ("timm-swin", "inside windows"),
        ("bart", "an encoder and a decoder"),
        ("deberta-v2", "give them to neither"),
        ("hf-convnext", "give them to neither"),
    ],
)
def test_models_without_such_attention_are_refused(name, message):
    case = case_of(name)
    model = steered(case.build())
    with pytest.raises(rs.SteerError, match=message):
        stream_energy(model, [case.inputs(model)])


def test_what_cannot_be_measured_is_refused():
    model = steered(case_of("bert").build())
    batch = rows_for(case_of("bert"), model, labels=None)
    for beta in (0, -1.0, math.nan, math.inf, "1"):
        with pytest.raises(rs.SteerError, match="`beta` is a number above 0"):
            stream_energy(model, [batch], beta=beta)
    with pytest.raises(rs.SteerError, match="every one is padding"):
        stream_energy(model, [{**batch, "attention_mask": torch.zeros_like(batch["attention_mask"])}])


def test_a_table_and_a_plot_have_the_numbers():
    case = case_of("gpt2")
    model = steered(sharp(case))
    found = stream_energy(model, [case.inputs(model)])
    assert [row["adapted_spread"] for row in found.table().rows] == found.adapted_spread.tolist()
    line, _ = found.plot().axes[0].lines[:2]
    assert line.get_ydata().tolist() == found.frozen.mean(1).tolist()
