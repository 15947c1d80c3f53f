"""The entropy of attention, held against the maps that each library gives by its own public ways."""

import copy
import math

import pytest
import torch
from torch import nn

import residual_steer as rs
from residual_steer.diagnostics.entropy import attention_entropy
from sharp import case_of, sharp, steered, traces


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
        x = args[0]
        q, k, _ = attention.qkv(x).unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
        found.append((q @ k.mT * q.shape[-1] ** -0.5).softmax(-1))

    for block in twin.blocks:
        block.attn.register_forward_hook(look)
    case.run(twin)
    return found


def entropy(weights):
    """Return −Σ a·ln a number by number, `(queries,)` of one head of one row."""
    return torch.tensor([-sum(a * math.log(a) for a in row if a > 0) for row in weights.tolist()])


NAMES = ["hf-vit", "timm-vit", "gpt2", "gemma3", "bert", "falcon", "deberta-v2", "jamba", "albert", "hf-dinov2"]


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_it_is_that_of_the_maps_that_the_library_gives(name):
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
        assert (share > 0).all()
        assert (share < 1).all()
    assert measured.queries == rows * length
    assert measured.frozen.shape == (len(expected["frozen"]), heads)
    spread = measured.frozen / measured.frozen_bound[:, None]
    assert spread.min() < 0.995, "the maps are uniform, and so would be anything else"
    wanted = {"jamba": (1,), "albert": (0, 0, 1, 1)}.get(name, (0, 1))
    assert measured.blocks == wanted


def test_relative_positions_of_timm_are_in_its_maps():
    from timm.models.beit import Beit

    shape = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 3}
    model, images = steered(Beit(**shape, use_rel_pos_bias=True).eval()), torch.randn(2, 3, 16, 16)
    before = attention_entropy(model, [images])
    with torch.no_grad():
        for block in model.blocks:
            block.attn.relative_position_bias_table.normal_(std=3)
    after = attention_entropy(model, [images])
    assert (after.frozen < before.frozen - 0.1).any()
    assert before.query == "first"


@pytest.mark.parametrize(("layers", "site", "untouched"), [([0], "block", 1), ([1], "block", 2), ([0], "input", 0)])
@pytest.mark.parametrize("name", ["hf-vit", "timm-vit", "gpt2"])
def test_lemma_2_holds_up_to_the_first_steered_block(name, layers, site, untouched):
    case = case_of(name)
    model = steered(sharp(case), layers=layers, site=site)
    measured = attention_entropy(model, [case.inputs(model)])
    assert measured.untouched == untouched
    assert measured.equal == tuple(layer < untouched for layer in range(2))
    assert (measured.change[:untouched] == 0).all()
    assert (measured.change[untouched:] != 0).all()
    assert f"first {untouched} of 2" in measured.table().notes[1]


@torch.no_grad()
def test_maps_are_equal_only_if_they_are_in_every_batch():
    frozen = sharp(case_of("gpt2"))
    model = copy.deepcopy(frozen)
    model.transformer.wte.weight[9] += 1
    with_it, without = torch.tensor([[9, 4, 5]]), torch.tensor([[4, 5, 6]])
    assert attention_entropy(model, [without], reference=frozen).untouched == 2
    for loader in ([with_it, without], [without, with_it]):
        assert attention_entropy(model, loader, reference=frozen).equal == (False, False)


def padded():
    """Return four texts of different lengths, padded on the right, the left and on both sides."""
    torch.manual_seed(5)
    mask = torch.tensor(
        [[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 0, 0]],
    )
    return {"input_ids": torch.randint(3, 50, (4, 6)), "attention_mask": mask}


@pytest.mark.parametrize("query", ["all", "first", "last"])
@torch.no_grad()
def test_padding_neither_asks_nor_is_looked_at(query):
    """Each text alone, without its padding, gives the same; gpt2's positions begin with the text."""
    model, batch = steered(sharp(case_of("bert"))), padded()
    measured = attention_entropy(
        model, [{**batch, "position_ids": (batch["attention_mask"].cumsum(1) - 1).clamp(0)}], query=query
    )
    alone = [
        attention_entropy(model, [{"input_ids": ids[mask.bool()][None]}], query=query)
        for ids, mask in zip(*batch.values(), strict=True)
    ]
    for key in ("frozen", "adapted", "frozen_keys", "adapted_bound"):
        total = sum(getattr(one, key) * one.queries for one in alone)
        torch.testing.assert_close(getattr(measured, key), total / measured.queries, atol=1e-6, rtol=1e-5)


class Masked(nn.Module):
    """A user's own block on torch's attention, whose padding sees nothing: its weights are NaN."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, z, attention_mask):
        return z + self.attention(z, z, z, key_padding_mask=~attention_mask)[0].nan_to_num()


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Masked()])

    def forward(self, z, attention_mask):
        return self.blocks[0](z, attention_mask)


@torch.no_grad()
def test_padding_that_sees_nothing_spoils_nothing():
    model, z = Stack().eval(), torch.randn(2, 4, 8)
    rs.steer(model, rs.Backbone(blocks=model.blocks, width=8), rank=2)
    mask = torch.tensor([[True] * 4, [False] * 4])
    found = attention_entropy(model, [{"z": z, "attention_mask": mask}])
    alone = attention_entropy(model, [{"z": z[:1], "attention_mask": mask[:1]}])
    torch.testing.assert_close(found.frozen, alone.frozen)
    assert found.queries == alone.queries == 4


def method(name, frozen, **options):
    torch.manual_seed(7)
    model = rs.baselines.apply(copy.deepcopy(frozen), name, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape) * 0.3)
    return model


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
def test_methods_are_held_against_the_frozen_model(name, how, options, keys, queries):
    case = case_of(name)
    frozen = sharp(case)
    model = method(how, frozen, **options)
    loud, quiet = case.run(model), traces(model)
    images = "vit" in name
    for query in ("all", "first", "last"):
        measured = attention_entropy(model, [case.inputs(model)], reference=frozen, query=query)
        torch.testing.assert_close(measured.adapted_keys, measured.frozen_keys + keys)
        assert measured.untouched == 0
        maps = [layer.double() for layer in maps_of(case, model)]
        place = 1 if images else 0  # behind CLS, before a text
        real = [i for i in range(maps[0].shape[2]) if not place <= i < place + queries]
        asked = {"all": real, "first": real[:1], "last": real[-1:]}[query]
        expected = torch.stack([torch.special.entr(layer[:, :, asked]).sum(-1).mean((0, 2)) for layer in maps])
        torch.testing.assert_close(measured.adapted, expected, atol=1e-6, rtol=0)
        expected = [torch.special.entr(layer.double()).sum(-1).mean((0, 1)) for layer in maps_of(case, frozen)]
        if query == "all":
            torch.testing.assert_close(measured.frozen_by_position, torch.stack(expected), atol=1e-6, rtol=0)
    assert torch.equal(case.run(model), loud)
    assert traces(model) == quiet


@torch.no_grad()
def test_a_prompt_behind_padding_on_the_left_has_no_place_among_the_queries():
    frozen, batch = sharp(case_of("gpt2")), padded()
    model = method("prompt", frozen, length=2)
    measured = attention_entropy(model, [batch], reference=frozen)
    twin = copy.deepcopy(model)
    twin.set_attn_implementation("eager")
    maps = twin(**batch, output_attentions=True).attentions
    real = [[2, 3, 4, 5, 6, 7], [2, 3, 4, 5], [4, 5, 6, 7], [3, 4, 5]]
    for layer, weights in enumerate(maps):
        each = torch.special.entr(weights.double()).sum(-1)
        expected = torch.cat([each[row, :, asked] for row, asked in enumerate(real)], dim=1).mean(1)
        torch.testing.assert_close(measured.adapted[layer], expected, atol=1e-6, rtol=0)


@torch.no_grad()
def test_lemma_1_in_closed_form():
    """Queries of zero attend to all keys alike: ln N without a prompt, ln(N + p) with one, however it is chosen."""
    case = case_of("hf-vit")
    frozen = case.build()
    for layer in frozen.vit.layers:
        nn.init.zeros_(layer.attention.q_proj.weight)
        nn.init.zeros_(layer.attention.q_proj.bias)
    measured = attention_entropy(method("vpt-shallow", frozen, length=4), [case.inputs(frozen)], reference=frozen)
    assert torch.allclose(measured.frozen, torch.tensor(math.log(5), dtype=torch.float64), atol=1e-6)
    assert torch.allclose(measured.adapted, torch.tensor(math.log(9), dtype=torch.float64), atol=1e-6)
    torch.testing.assert_close(measured.frozen_normalised, torch.ones(2, 2, dtype=torch.float64))
    torch.testing.assert_close(measured.change, torch.full((2,), math.log(9 / 5), dtype=torch.float64))


class Encoder(nn.Module):
    """A user's own model on torch's attention, inside a wrapper that asks for no weights."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        settings = {"d_model": 8, "nhead": 2, "dim_feedforward": 16, "batch_first": True, "norm_first": True}
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(**settings) for _ in range(2))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


@torch.no_grad()
def test_torchs_own_attention_is_asked_for_its_weights():
    model, x = Encoder().eval(), torch.randn(3, 5, 8) * 4
    rs.steer(model, rs.Backbone(blocks=model.layers, width=8), rank=2, layers=[1])
    seen = []
    for layer in model.layers:
        layer.self_attn.register_forward_hook(lambda _, args, output: seen.append(output[1]))
    before, quiet = model(x), traces(model)
    measured = attention_entropy(model, [(x, torch.zeros(3))])
    assert measured.query == "all"
    assert seen == [None] * len(seen), "those who ask for no weights get none"
    assert torch.equal(model(x), before)
    assert traces(model) == quiet
    layer = model.layers[0]
    _, weights = layer.self_attn(*[layer.norm1(x)] * 3, average_attn_weights=False)
    expected = torch.special.entr(weights.double()).sum(-1).mean((0, 2))
    torch.testing.assert_close(measured.frozen[0], expected, atol=1e-6, rtol=0)
    asked = layer.self_attn(*[x] * 3)[1]
    assert asked.shape == (3, 5, 5)


def test_configs_inside_configs_name_what_they_named_before():
    from transformers import CLIPConfig, CLIPModel

    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    images, texts = {**small, "image_size": 16, "patch_size": 8}, {**small, "vocab_size": 50, "eos_token_id": 2}
    model = CLIPModel(CLIPConfig(text_config=texts, vision_config=images, projection_dim=4)).eval()
    model.config.text_config._attn_implementation = "eager"
    model.config.vision_config._attn_implementation = "sdpa"
    quiet = traces(model)
    steered(model.vision_model)
    inner = traces(model.text_model)
    measured = attention_entropy(model.vision_model, [{"pixel_values": torch.randn(2, 3, 16, 16)}])
    assert measured.query == "first"
    assert traces(model.text_model) == inner
    rs.unsteer(model.vision_model)
    assert traces(model) == quiet


def test_a_class_token_of_another_tower_is_not_asked():
    from transformers import CLIPConfig, CLIPModel

    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    texts = {**small, "vocab_size": 50, "eos_token_id": 2}
    images = {**small, "image_size": 16, "patch_size": 8}
    model = CLIPModel(CLIPConfig(text_config=texts, vision_config=images, projection_dim=4)).eval()
    backbone = rs.find_backbone(model.text_model)
    steered(model, arch=rs.Backbone(blocks=backbone.blocks, width=16, path="text_model"))
    model.config.text_config._attn_implementation = "eager"
    model.config.vision_config._attn_implementation = "sdpa"
    batch = {"input_ids": torch.randint(3, 50, (2, 6)), "pixel_values": torch.randn(2, 3, 16, 16)}
    model(**batch)
    quiet = traces(model)
    measured = attention_entropy(model, [batch])
    assert measured.query == "all"
    assert measured.queries == 12
    assert traces(model) == quiet
    assert measured.blocks == (0,)


def test_a_table_and_a_plot_have_the_numbers():
    case = case_of("gpt2")
    model = steered(sharp(case), layers=[0])
    measured = attention_entropy(model, [case.inputs(model)])
    table, (axes,) = measured.table(), measured.plot().axes
    assert [row["block"] for row in table.rows] == [0, 1]
    assert [row["equal"] for row in table.rows] == ["yes", "no"]
    assert [row["adapted"] for row in table.rows] == measured.adapted.mean(1).tolist()
    assert [line.get_label() for line in axes.lines] == ["frozen", "adapted"]
    assert axes.lines[0].get_ydata().tolist() == measured.frozen.mean(1).tolist()
    assert "nats" in axes.get_ylabel()


def fails(message, model, loader, **options):
    quiet = traces(model)
    with pytest.raises(rs.SteerError, match=message):
        attention_entropy(model, loader, **options)
    assert traces(model) == quiet


def test_what_cannot_be_measured_is_refused():
    case = case_of("bert")
    model, batch = steered(case.build()), padded()
    model(**batch)  # steering's own hooks for the first call are gone after it
    fails("one of auto, first, last, all; received 'cls'", model, [batch], query="cls")
    fails("every one is padding", model, [{**batch, "attention_mask": torch.zeros(4, 6, dtype=torch.long)}])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mamba", "MambaBlock have a state and no attention.*memory_length"),
        ("mamba_ssm-1", "have a state and no attention.*memory_length"),
        ("timm-swin", "inside windows"),
        ("hf-swin", "inside windows"),
        ("t5", "has an encoder and a decoder"),
        ("rwkv", "gave no attention map"),
        ("hf-convnext", "gave no attention map"),
    ],
)
def test_models_without_such_attention_are_refused(name, message):
    case = case_of(name)
    model = steered(case.build())
    fails(message, model, [case.inputs(model)])


def test_one_stack_of_an_encoder_decoder_is_measured():
    case = case_of("bart")
    encoder = steered(sharp(case).get_encoder())
    batch = padded()
    assert attention_entropy(encoder, [batch]).blocks == (0, 1)


def test_a_reference_must_have_the_same_heads_and_tokens():
    from transformers import GPT2Config, GPT2Model

    shape = {"n_embd": 16, "n_layer": 1, "vocab_size": 50, "n_positions": 16}
    two, four = (GPT2Model(GPT2Config(n_head=heads, **shape)) for heads in (2, 4))
    ids = torch.randint(3, 50, (2, 5))
    fails(r"the reference has layers of \[2\] heads, the adapted model of \[4\]", four, [ids], reference=two)
    longer = method("prompt", two, length=2)
    fails("5 tokens where the reference has 7", two, [ids], reference=longer)
