"""Finding and proving the residual stream of models that no family describes."""

import copy
import functools
import pickle
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_map

import residual_steer as rs
from cases import TABLE, randomise
from residual_steer.recording import watch
from residual_steer.registry import find_backbone
from streams import (
    WIDTH,
    Block,
    Chain,
    ConvBlock,
    ConvNet,
    Detached,
    Gated,
    InPlace,
    KeywordModel,
    LengthFirst,
    Mixed,
    Model,
    Negative,
    Nested,
    PairedModel,
    PlainNet,
    PostNorm,
    Towers,
    Wrapped,
)

IDS = torch.randint(11, (4, 6), generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
FOUND = {
    "pre-norm": (Model, "body", [Block] * 3, IDS),
    "post-norm": (lambda: Model(PostNorm), "body", [PostNorm] * 3, IDS),
    "in-place": (lambda: Model(InPlace), "body", [InPlace] * 3, IDS),
    "wrapped": (lambda: Wrapped(Model()), "inner.body", [Block] * 3, IDS),
    "keyword": (KeywordModel, "body", None, IDS),
    "pair": (PairedModel, "body", None, IDS),
    "length-first": (LengthFirst, "body", [Block] * 3, IDS),
    "nested": (lambda: Model(Nested), "body", [Nested] * 3, IDS),
    "convnet": (ConvNet, "stages", [ConvBlock] * 6, IMAGES),
    "mixed": (Mixed, "", [ConvBlock] * 2 + [Block] * 2, IMAGES),
}
every_model = pytest.mark.parametrize("case", FOUND)


def floats(output):
    values = output.values() if isinstance(output, dict) else [output]
    return torch.cat([value.flatten() for value in values])


def kept(value):
    return value.detach().clone() if isinstance(value, torch.Tensor) else value


def built(case):
    torch.manual_seed(0)
    model = FOUND[case][0]().eval().requires_grad_(False)
    return model, FOUND[case][3]


@every_model
def test_it_is_found_and_steered_as_the_contract_says(case, tmp_path):
    model, x = built(case)
    frozen, kinds = floats(model(x)), FOUND[case][2]
    backbone = find_backbone(model)
    assert backbone.name == "auto"
    assert kinds is None or [type(block) for block in backbone.blocks] == kinds
    names = [name for block in backbone.blocks for name, module in model.named_modules() if module is block]
    assert all(name.startswith(FOUND[case][1]) for name in names)
    rs.steer(model, rank=2)
    assert torch.equal(floats(model(x)), frozen)
    randomise(model)
    expected = floats(model(x))
    expected.square().sum().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in rs.parameters(model))
    assert not torch.allclose(expected, frozen)
    if case != "wrapped":  # whose output is two tensors
        with rs.use(model, ["default", None, "default", None]):
            rows = model(x)
        assert torch.allclose(rows[1::2], frozen.view(rows.shape)[1::2], atol=1e-5)
        assert torch.allclose(rows[::2], expected.view(rows.shape)[::2], atol=1e-5)
    rs.save(model, tmp_path / "field")
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(floats(twin(x)), expected)
    fresh, _ = built(case)
    assert torch.equal(floats(rs.load(fresh, tmp_path / "field")(x)), expected)
    with rs.use(model, None):
        assert torch.equal(floats(model(x)), frozen)


@every_model
def test_every_block_moves_by_the_field_of_what_entered(case):
    model, x = built(case)
    backbone = find_backbone(model)
    randomise(rs.steer(model, rank=2))
    frozen, _ = built(case)
    blocks = [frozen.get_submodule(n) for b in backbone.blocks for n, m in model.named_modules() if m is b]
    for index, (block, twin) in enumerate(zip(backbone.blocks, blocks, strict=True)):
        calls = []
        note = functools.partial(lambda calls, _, *given: calls.append(tree_map(kept, given)), calls)
        with watch([block], note, first=True), watch([block], after=note):
            model(x)
        (args, kwargs), (*_, left) = calls
        z, streams = backbone.read(args, kwargs).clone(), []
        for output in (left, twin(*args, **kwargs)):
            backbone.write(output, lambda y, streams=streams: streams.append(y) or y)
        field = block.steering_block.fields["default"]
        assert z.shape[backbone.channels] == backbone.widths[index] == field.width
        assert torch.allclose(streams[0] - streams[1], field(z), atol=1e-5)


def test_it_prints_where_it_came_from():
    assert str(find_backbone(Wrapped(Model()))).splitlines() == [
        "auto at inner",
        "├─ blocks: 3 × Block",
        f"├─ width:  {WIDTH}",
        "├─ sites:  block, mlp, after  (mlp: .mlp)",
        "└─ origin: auto: proved on a probe of (2, 7)",
    ]


@pytest.mark.parametrize("block", [Chain, Gated, Negative, Detached])
def test_blocks_that_are_not_residual_are_refused(block):
    with pytest.raises(rs.SteerError, match=r"no residual stream was found in Model: .*body.0.*register_backbone"):
        find_backbone(Model(block))


class Aside(Model):
    """Whose blocks do not reach the output."""

    def forward(self, ids):
        super().forward(ids)
        return self.head(self.embedding(ids))


def of_timm(name, size):
    import timm

    return timm.create_model(name, pretrained_cfg_overlay={"input_size": (3, size, size)})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (PlainNet, "no residual stream was found"),
        (lambda: of_timm("densenet121", 32), "no residual stream was found"),
        (lambda: of_timm("inception_v3", 96), "no residual stream was found"),
        (Aside, "no residual stream was found"),
        (Towers, r"several residual streams.*left \(3 × Block\), right \(3 × Block\)"),
        (lambda: nn.Sequential(nn.ReLU()), "has no parameters"),
        (lambda: Model().to("meta"), "on the meta device and has no values"),
    ],
)
def test_models_without_a_stream_or_with_several_are_refused(make, message):
    with pytest.raises(rs.SteerError, match=message):
        find_backbone(make(), "auto")


def test_a_small_stack_beside_a_large_one_is_left_out_and_named():
    backbone = find_backbone(Towers(8, 2))
    assert len(backbone.blocks) == 8
    assert "left out: right (2 × Block)" in str(backbone)


def test_a_layer_among_marked_ones_that_is_not_residual_is_not_passed_over():
    class GradientCheckpointingLayer(nn.Module):
        pass

    class Marked(GradientCheckpointingLayer):
        def __init__(self, residual):
            super().__init__()
            self.residual, self.parts = residual, nn.ModuleList([Block(), nn.Linear(WIDTH, WIDTH)])

        def forward(self, z):
            return z + self.parts[1](z) if self.residual else self.parts[1](self.parts[0](z))

    model = Model()
    model.body = nn.ModuleList(Marked(index != 1) for index in range(3))
    with pytest.raises(rs.SteerError, match=r"body.1 stands in a list of residual blocks and is none"):
        find_backbone(model)


def snapshot(model):
    tensors = {name: (value.clone(), value.requires_grad) for name, value in model.state_dict(keep_vars=True).items()}
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    return tensors, [module.training for module in model.modules()], hooks


@pytest.mark.parametrize("make", [ConvNet, Towers, lambda: Model(Chain)], ids=["found", "several", "none"])
def test_a_probe_leaves_no_trace(make):
    model = make().train()
    next(model.children()).eval()
    next(model.parameters()).requires_grad_(False)
    before = snapshot(model)
    generators = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    try:
        find_backbone(model)
    except rs.SteerError:
        assert make is not ConvNet
    after = snapshot(model)
    assert before[1:] == after[1:]
    for name, (value, required) in before[0].items():
        assert torch.equal(after[0][name][0], value)
        assert after[0][name][1] == required
    assert torch.equal(torch.get_rng_state(), generators[0])
    assert random.getstate() == generators[1]
    assert (np.random.get_state()[1] == generators[2]).all()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_statistics_that_move_in_any_mode_are_put_back():
    class Counting(Model):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))
            self.register_buffer("cache", None)

        def forward(self, ids):
            self.calls += 1
            self.cache = ids.float()
            return super().forward(ids)

    model = Counting()
    find_backbone(model)
    assert model.calls == 0
    assert model.cache is None


def test_what_a_model_keeps_from_its_first_call_is_not_in_the_graph_of_the_probe():
    class Keeping(Model):
        kept = None

        def forward(self, ids):
            if self.kept is None:
                self.kept = self.head.weight * 2
            return super().forward(ids) @ self.kept

    model = Keeping().requires_grad_(False)
    rs.steer(model, rank=2)
    model(IDS).sum().backward()
    assert rs.parameters(model)[-1].grad is not None


@pytest.mark.parametrize("given", [IDS, (IDS,), [IDS], {"ids": IDS}], ids=["tensor", "tuple", "list", "dict"])
def test_a_batch_can_be_given(given):
    class Demanding(Model):
        def forward(self, ids):
            assert ids.shape[1] == IDS.shape[1]
            return super().forward(ids)

    model = Demanding()
    with pytest.raises(rs.SteerError, match=r"did not run on what it was given.*example=batch.*AssertionError"):
        find_backbone(model)
    backbone = find_backbone(model, example=given)
    assert "(4, 6)" in backbone.origin
    assert rs.summary(rs.steer(model, backbone, rank=2)).backbone == "auto"
    assert len(find_backbone(Model(), example=IDS[:1]).blocks) == 3, "one row is enough"


@pytest.mark.parametrize("given", ["ids", 3, (), {}, {"ids": None}])
def test_what_is_no_batch_is_refused(given):
    with pytest.raises(rs.SteerError, match="`example` is a batch that the model can be called with"):
        find_backbone(Model(), example=given)


def test_a_block_that_is_called_several_times_is_one_block():
    class Recurrent(Model):
        def step(self, block, z):
            return super().step(block, super().step(block, z))

    assert len(find_backbone(Recurrent()).blocks) == 3

    class Shared(Model):
        def forward(self, ids):
            return super().forward(ids) + super().forward(ids.flip(1))

    assert len(find_backbone(Shared()).blocks) == 3


def test_a_model_is_probed_in_half_precision_and_inside_inference_mode():
    model = Model().to(torch.bfloat16).eval()
    frozen = model(IDS)
    assert torch.equal(rs.steer(model, rank=2)(IDS), frozen)
    model = Model()
    with torch.inference_mode(), torch.no_grad():
        assert len(find_backbone(model).blocks) == 3


@pytest.mark.parametrize(
    ("model", "config", "more", "blocks"),
    [
        ("LlamaForCausalLM", "LlamaConfig", {"num_key_value_heads": 2}, 3),
        ("BertForMaskedLM", "BertConfig", {}, 3),
        ("T5ForConditionalGeneration", "T5Config", {"d_kv": 8, "d_ff": 32, "num_decoder_layers": 3}, 6),
        ("XLNetLMHeadModel", "XLNetConfig", {"d_inner": 32, "d_head": 8}, 3),
        ("AlbertForMaskedLM", "AlbertConfig", {"embedding_size": 8}, 1),
    ],
)
def test_models_of_transformers(model, config, more, blocks):
    import transformers

    shape = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "intermediate_size": 32}
    settings = getattr(transformers, config)(**shape, **ids, **more)
    frozen = getattr(transformers, model)(settings).eval()
    backbone = find_backbone(frozen, "auto")
    assert len(backbone.blocks) == blocks
    assert backbone.width == 16
    assert getattr(frozen.get_submodule(backbone.path), "config", None) is not None


def test_mixer_and_mlp_are_found_where_every_block_has_them():
    model = TABLE["gpt2"].build()
    gpt2, auto = find_backbone(model, "gpt2"), find_backbone(model, "auto")
    assert (auto.widths, auto.path) == (gpt2.widths, gpt2.path)
    for site in ("mixer", "mlp"):
        assert [auto.point(i, site) for i in (0, 1)] == [gpt2.point(i, site) for i in (0, 1)]

    class Renamed(Block):
        def __init__(self):
            super().__init__()
            self.attn = nn.Linear(WIDTH, WIDTH + 1)

        def forward(self, z):
            return super().forward(z) + self.attn(z)[..., :WIDTH]

    assert find_backbone(Model(Renamed)).mixer is None, "its attn does not return what it was given"
