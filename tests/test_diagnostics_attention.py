"""The entropy and the energy of attention, against the maps that each library gives in public, number by number."""

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
from residual_steer.diagnostics import attention_entropy, hopfield_energy, stream_energy
from residual_steer.diagnostics.attention import attentions_of
from residual_steer.diagnostics.compare import compare
from sharp import case_of, method, sharp, steered, traces


def maps_of(case, model):
    """Return what transformers itself gives, or what timm's attention computes from its own parts."""
    twin = copy.deepcopy(model).eval()
    if not case.name.startswith("timm"):
        if case.name in ("falcon", "deberta-v2"):  # which cannot be switched; Falcon's maps are not causal under SDPA
            twin.config._attn_implementation = "eager"
        else:
            twin.set_attn_implementation("eager")
        return twin(**case.inputs(twin), output_attentions=True).attentions
    found = []

    def look(attention, args, output):
        q, k, _ = attention.qkv(args[0]).unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
        found.append((q @ k.mT * q.shape[-1] ** -0.5).softmax(-1))

    for block in twin.blocks:
        block.attn.register_forward_hook(look)
    case.run(twin)
    return found


def looked(pair, inputs, keys, side="frozen"):
    return attentions_of(pair, Batch(inputs), keys=keys)[side]


def entropy(weights):
    """Return −Σ a·ln a a number by number, `(queries,)` of one head of one row."""
    return torch.tensor([-sum(a * math.log(a) for a in row if a > 0) for row in weights.tolist()])


@pytest.mark.parametrize(
    "name", ["hf-vit", "timm-vit", "gpt2", "gemma3", "bert", "falcon", "deberta-v2", "jamba", "albert", "hf-dinov2"]
)
@torch.no_grad()
def test_the_entropy_is_that_of_the_maps_that_the_library_gives(name):
    case = case_of(name)
    model = sharp(case)
    expected = {"frozen": maps_of(case, model)}
    steered(model)
    expected["adapted"] = maps_of(case, model)
    measured = attention_entropy(model, [case.inputs(model)], query="all")
    rows, heads, length, _ = expected["frozen"][0].shape
    for side, maps in expected.items():
        found = torch.stack([torch.stack([torch.stack([entropy(a) for a in row]) for row in layer]) for layer in maps])
        assert torch.allclose(getattr(measured, side).float(), found.mean((1, 3)), atol=1e-5)
        assert torch.allclose(getattr(measured, f"{side}_by_position").float(), found.mean((1, 2)), atol=1e-5)
        keys = torch.stack([(layer > 0).sum(-1).double() for layer in maps])
        assert torch.allclose(getattr(measured, f"{side}_keys"), keys.mean((1, 2, 3)))
        assert torch.allclose(getattr(measured, f"{side}_bound"), keys.log().mean((1, 2, 3)))
        share = getattr(measured, f"{side}_normalised")
        assert 0 < share.min() < 0.995, "the maps are uniform, and so would be anything else"
        assert share.max() < 1
    assert measured.queries == rows * length
    assert measured.frozen.shape == (len(expected["frozen"]), heads)
    assert measured.blocks == {"jamba": (1,), "albert": (0, 0, 1, 1)}.get(name, (0, 1))


def test_relative_positions_of_timm_are_in_its_maps():
    from timm.models.beit import Beit

    shape = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 3}
    model, images = steered(Beit(**shape, use_rel_pos_bias=True).eval()), torch.randn(2, 3, 16, 16)
    before = attention_entropy(model, [images])
    with torch.no_grad():
        for block in model.blocks:
            block.attn.relative_position_bias_table.normal_(std=3)
    assert (attention_entropy(model, [images]).frozen < before.frozen - 0.1).any()
    assert before.query == "first"


@pytest.mark.parametrize(
    ("name", "how", "options", "keys", "queries"),
    [
        ("gpt2", "prompt", {"length": 3}, 3, 3),
        ("gpt2", "prefix", {"length": 3}, 3, 0),
        ("gpt2", "lora", {"rank": 2}, 0, 0),
        ("hf-vit", "vpt-shallow", {"length": 4}, 4, 4),
        ("hf-vit", "vpt-deep", {"length": 4}, 4, 4),
        ("timm-vit", "vpt-deep", {"length": 4}, 4, 4),
    ],
)
@torch.no_grad()
def test_methods_against_the_frozen_model(name, how, options, keys, queries):
    case = case_of(name)
    frozen = sharp(case)
    model = method(how, frozen, **options)
    loud, quiet = case.run(model), traces(model)
    maps = [layer.double() for layer in maps_of(case, model)]
    place = 1 if "vit" in name else 0  # behind CLS, before a text
    real = [i for i in range(maps[0].shape[2]) if not place <= i < place + queries]
    for query, asked in {"all": real, "first": real[:1], "last": real[-1:]}.items():
        measured = attention_entropy(model, [case.inputs(model)], reference=frozen, query=query)
        torch.testing.assert_close(measured.adapted_keys, measured.frozen_keys + keys)
        assert measured.untouched == 0
        expected = torch.stack([torch.special.entr(layer[:, :, asked]).sum(-1).mean((0, 2)) for layer in maps])
        torch.testing.assert_close(measured.adapted, expected, atol=1e-6, rtol=0)
    assert torch.equal(case.run(model), loud)
    assert traces(model) == quiet


@torch.no_grad()
def test_lemma_1_in_closed_form():
    """Queries of zero attend to all keys alike: ln N without a prompt, ln(N + p) with one, however it is chosen."""
    case = case_of("hf-vit")
    frozen = case.build()
    for layer in frozen.vit.layers:
        nn.init.zeros_(layer.attention.q_proj.weight)
        nn.init.zeros_(layer.attention.q_proj.bias)
    measured = attention_entropy(
        method("vpt-shallow", frozen, length=4), [case.inputs(frozen)], reference=frozen, query="first"
    )
    every = torch.ones(2, 2, dtype=torch.float64)
    torch.testing.assert_close(measured.frozen, math.log(5) * every, atol=1e-6, rtol=0)
    torch.testing.assert_close(measured.frozen_normalised, every)
    torch.testing.assert_close(measured.change, math.log(9 / 5) * every[0])


class Masked(nn.Module):
    """A user's own block on torch's attention, whose padding sees nothing: its weights are NaN."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, z, attention_mask):
        return z + self.attention(z, z, z, key_padding_mask=~attention_mask)[0].nan_to_num()


class Stack(nn.Module):
    def __init__(self, *blocks):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, z, **more):
        for block in self.blocks:
            z = block(z, **more)
        return z


@torch.no_grad()
def test_padding_that_sees_nothing_spoils_nothing():
    model, z = Stack(Masked()).eval(), torch.randn(2, 4, 8)
    rs.steer(model, rs.Backbone(blocks=model.blocks, width=8), rank=2)
    mask = torch.tensor([[True] * 4, [False] * 4])
    found = attention_entropy(model, [{"z": z, "attention_mask": mask}])
    alone = attention_entropy(model, [{"z": z[:1], "attention_mask": mask[:1]}])
    torch.testing.assert_close(found.frozen, alone.frozen)
    assert found.queries == alone.queries == 4


@torch.no_grad()
def test_torchs_own_attention_gives_its_weights():
    shape = {"d_model": 8, "nhead": 2, "dim_feedforward": 16, "batch_first": True, "norm_first": True}
    model, x = Stack(*(nn.TransformerEncoderLayer(**shape) for _ in range(2))).eval(), torch.randn(3, 5, 8) * 4
    rs.steer(model, rs.Backbone(blocks=model.blocks, width=8), rank=2, layers=[1])
    seen = []
    for layer in model.blocks:
        layer.self_attn.register_forward_hook(lambda _, args, output: seen.append(output[1]))
    before, quiet = model(x), traces(model)
    measured = attention_entropy(model, [(x, torch.zeros(3))])
    assert measured.query == "all"
    assert seen == [None] * len(seen), "those who want no weights get none"
    assert torch.equal(model(x), before)
    assert traces(model) == quiet
    layer = model.blocks[0]
    _, weights = layer.self_attn(*[layer.norm1(x)] * 3, average_attn_weights=False)
    expected = torch.special.entr(weights.double()).sum(-1).mean((0, 2))
    torch.testing.assert_close(measured.frozen[0], expected, atol=1e-6, rtol=0)


class Averaged(nn.Module):
    """One that reads its own weights, averaged over heads or of each."""

    def __init__(self, average):
        super().__init__()
        self.attention, self.average, self.shape = nn.MultiheadAttention(8, 2, batch_first=True), average, None

    def forward(self, z):
        y, weights = self.attention(z, z, z, need_weights=True, average_attn_weights=self.average)
        self.shape = tuple(weights.shape)
        return z + y


@torch.no_grad()
def test_those_who_want_weights_get_the_ones_they_want():
    model = Stack(Averaged(True), Averaged(False)).eval()
    rs.steer(model, rs.Backbone(blocks=model.blocks, width=8), rank=2)
    assert attention_entropy(model, [torch.randn(3, 5, 8)]).frozen.shape == (2, 2)
    assert [block.shape for block in model.blocks] == [(3, 5, 5), (3, 2, 5, 5)]


@pytest.mark.parametrize("tower", ["vision_model", "text_model"])
def test_towers_attend_as_before_and_only_one_is_measured(tower):
    from transformers import CLIPConfig, CLIPModel

    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    images, texts = {**small, "image_size": 16, "patch_size": 8}, {**small, "vocab_size": 50, "eos_token_id": 2}
    model = CLIPModel(CLIPConfig(text_config=texts, vision_config=images, projection_dim=4)).eval()
    backbone = rs.find_backbone(model.get_submodule(tower))
    steered(model, arch=rs.Backbone(blocks=backbone.blocks, width=16, path=tower))
    model.config.text_config._attn_implementation = "eager"
    model.config.vision_config._attn_implementation = "sdpa"
    batch = {"input_ids": torch.randint(3, 50, (2, 6)), "pixel_values": torch.randn(2, 3, 16, 16)}
    model(**batch)
    quiet = traces(model)
    measured = attention_entropy(model, [batch])
    assert traces(model) == quiet
    assert measured.blocks == (0,)
    assert (measured.query, measured.queries) == (("first", 2) if tower == "vision_model" else ("all", 12))


REFUSED = [  # what the error about maps says, and that about queries and keys
    ("mamba", "MambaBlock have a state and no attention.*memory_length", None),
    ("mamba_ssm-1", "have a state and no attention.*memory_length", None),
    ("timm-swin", "inside windows", None),
    ("hf-swin", "inside windows", None),
    ("t5", "an encoder and a decoder", None),
    ("rwkv", "gave no attention map", "give them to neither"),
    ("hf-convnext", "gave no attention map", "give them to neither"),
    ("deberta-v2", None, "give them to neither"),
]


@pytest.mark.parametrize(("name", "maps", "keys"), REFUSED)
def test_models_without_such_attention_are_refused(name, maps, keys):
    case = case_of(name)
    model = steered(case.build())
    case.run(model)  # a first call, after which the points trust their hosts
    quiet = traces(model)
    for measure, message in ((attention_entropy, maps), (stream_energy, keys or maps)):
        if message is not None:
            with pytest.raises(rs.SteerError, match=message):
                measure(model, [case.inputs(model)])
    assert traces(model) == quiet


def test_one_stack_of_an_encoder_decoder_is_measured():
    encoder = steered(sharp(case_of("bart")).get_encoder())
    assert attention_entropy(encoder, [{"input_ids": torch.randint(3, 50, (4, 6))}]).blocks == (0, 1)


def test_a_reference_must_have_the_same_heads_and_tokens():
    from transformers import GPT2Config, GPT2Model

    shape = {"n_embd": 16, "n_layer": 1, "vocab_size": 50, "n_positions": 16}
    two, four = (GPT2Model(GPT2Config(n_head=heads, **shape)) for heads in (2, 4))
    ids = torch.randint(3, 50, (2, 5))
    with pytest.raises(rs.SteerError, match=r"layers of \[2\] heads, the adapted model of \[4\]"):
        attention_entropy(four, [ids], reference=two)
    with pytest.raises(rs.SteerError, match="5 tokens where the reference has 7"):
        attention_entropy(two, [ids], reference=method("prompt", two, length=2))


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
def test_the_energy_is_never_negative_and_attention_never_raises_it(seed, count, width, size, beta):
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


def test_energies_in_closed_form():
    one = torch.tensor([[3.0, 4.0]])
    assert hopfield_energy(one, one.expand(7, 2), 0.5).item() == pytest.approx(0, abs=1e-12)  # at a stored pattern
    assert hopfield_energy(torch.zeros(1, 2), one, 0.5).item() == pytest.approx(12.5)  # ½·M²
    assert hopfield_energy(-one, one, 2.0).item() == pytest.approx(50)  # ½·|ξ − x|²
    assert hopfield_energy(one, one, 1.0, torch.tensor([[False]])).isinf().all()


def check_that_keys_make_the_maps(keys, maps):
    """Check that softmax(β·q·k) over the visible keys is the map; return the scores and what is visible in them."""
    scores = keys.scale * keys.seen[0] @ keys.seen[1].mT
    visible = (torch.tensor(True) if keys.visible is None else keys.visible).expand_as(scores)
    torch.testing.assert_close(scores.masked_fill(~visible, -torch.inf).softmax(-1), maps.seen[0], atol=1e-5, rtol=0)
    return scores, visible


@pytest.mark.parametrize(
    "name",
    ["hf-vit", "timm-vit", "timm-eva", "gpt2", "gemma3", "qwen2-moe", "deepseek-v3", "bert", "opt", "falcon", "jamba"],
)
@torch.no_grad()
def test_the_energy_is_of_the_queries_and_keys_that_make_the_maps(name):
    case = case_of(name)
    model = steered(sharp(case, 6))
    inputs = case.inputs(model)
    measured = stream_energy(model, [inputs])
    for side in ("frozen", "adapted"):
        each = []
        with compare(model) as pair:
            layers = zip(looked(pair, inputs, True, side), looked(pair, inputs, False, side), strict=True)
            for layer, (keys, maps) in enumerate(layers):
                scores, visible = check_that_keys_make_the_maps(keys, maps)
                rows, heads, length, _ = scores.shape
                energies = [
                    written_out(keys.seen[0][r, h, t], keys.seen[1][r, h][visible[r, h, t]], keys.scale)
                    for r in range(rows) for h in range(heads) for t in range(length)
                ]  # fmt: skip
                each.append(torch.tensor(energies).double().view(rows, heads, length))
                assert measured.beta[layer] == keys.scale
        each = torch.stack(each)
        torch.testing.assert_close(getattr(measured, side), each.mean((1, 3)), rtol=1e-4, atol=1e-5)
        spread = each.std((1, 2, 3), correction=0)
        torch.testing.assert_close(getattr(measured, f"{side}_spread"), spread, rtol=1e-3, atol=1e-5)
    assert measured.tokens == rows * length
    assert measured.blocks == ((1,) if name == "jamba" else (0, 1))
    assert measured.beta[0] == pytest.approx({"opt": 1.0, "gemma3": 1 / 16}.get(name, 8**-0.5))


@torch.no_grad()
def test_heads_that_share_keys_have_them_each():
    from transformers import LlamaConfig, LlamaModel

    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 50}
    model = LlamaModel(LlamaConfig(num_attention_heads=4, num_key_value_heads=2, initializer_range=0.5, **shape))
    steered(model.eval())
    with compare(model) as pair:
        ids = torch.randint(3, 50, (2, 5))
        (keys,), (maps,) = looked(pair, ids, True), looked(pair, ids, False)
    check_that_keys_make_the_maps(keys, maps)
    assert torch.equal(keys.seen[1][:, 0], keys.seen[1][:, 1])
    assert not torch.equal(keys.seen[1][:, 1], keys.seen[1][:, 2])


class Causal(nn.Module):
    """A user's own block on torch's function, whose queries look back with four heads at keys of two."""

    def __init__(self):
        super().__init__()
        self.project = nn.Linear(8, 8 + 2 * 4)

    def split(self, z):
        return (x.unflatten(-1, (-1, 2)).transpose(1, 2) for x in self.project(z).split([8, 4, 4], dim=-1))

    def forward(self, z):
        y = F.scaled_dot_product_attention(*self.split(z), is_causal=True, scale=0.3, enable_gqa=True)
        return z + y.transpose(1, 2).flatten(2)


@torch.no_grad()
def test_torchs_own_function_is_looked_at():
    model = nn.Sequential(Causal())
    steered(model, arch=rs.Backbone(blocks=list(model), width=8))
    z = torch.randn(2, 5, 8) * 3
    measured = stream_energy(model, [z])
    q, k, _ = model[0].split(z)
    expected = [
        [[written_out(q[r, h, t], k[r, h // 2, : t + 1], 0.3) for t in range(5)] for r in range(2)] for h in range(4)
    ]
    torch.testing.assert_close(measured.frozen[0], torch.tensor(expected).double().mean((1, 2)), rtol=1e-5, atol=1e-6)
    assert measured.beta == (0.3,)


@pytest.mark.parametrize(("name", "parts"), [("hf-vit", ("q_proj", "k_proj")), ("bert", ("query", "key"))])
@torch.no_grad()
def test_queries_and_keys_are_those_that_the_layer_projects(name, parts):
    case, seen = case_of(name), []
    model = steered(sharp(case))
    for part in parts:
        projection = case.modules(model, "mixer")[0].get_submodule(part)
        projection.register_forward_hook(lambda *x: seen.append(x[2]))
    with compare(model) as pair:
        keys = looked(pair, case.inputs(model), True)[0]
    query, key = (x.unflatten(-1, (2, 8)).transpose(1, 2) for x in seen[:2])
    assert torch.equal(keys.seen[0], query)
    assert torch.equal(keys.seen[1], key)


def test_beta_is_the_layers_own_unless_it_is_given():
    case = case_of("hf-vit")
    model = steered(sharp(case), layers=[0])
    inputs = [case.inputs(model)]
    own, hot, same = (stream_energy(model, inputs, beta=beta) for beta in (None, 0.01, 8**-0.5))
    assert own.beta == (8**-0.5, 8**-0.5)
    assert hot.beta == (0.01, 0.01)
    assert not torch.allclose(own.frozen, hot.frozen, rtol=1e-3)
    assert torch.equal(same.frozen, own.frozen)
    assert own.change[0] == 0
    assert own.change[1] != 0


@torch.no_grad()
def test_a_prompts_keys_are_patterns_and_its_queries_no_states():
    case = case_of("hf-vit")
    frozen = sharp(case)
    model, inputs = method("vpt-shallow", frozen, length=4), case.inputs(frozen)
    measured = stream_energy(model, [inputs], reference=frozen)
    with compare(model, frozen) as pair:
        keys = looked(pair, inputs, True, "adapted")[0]
    assert keys.seen[1].shape[2] == 9
    energy = hopfield_energy(*keys.seen, keys.scale)[:, :, [0, 5, 6, 7, 8]]  # the prompt stands behind CLS
    torch.testing.assert_close(measured.adapted[0], energy.mean((0, 2)))
    assert measured.tokens == 2 * 5
