"""steer, unsteer, use, summary and parameters, and every request that they refuse."""

import pytest
import torch
from torch import nn

import residual_steer as rs
from cases import CASES, VOCABULARY, WIDTH, randomise

TABLE = {case.name: case for case in CASES}
GPT2, VIT, MAMBA = TABLE["gpt2"], TABLE["timm-vit"], TABLE["mamba"]


def fingerprint(model):
    """Return everything that a refused request must leave alone."""
    hooks = [
        (name, list(module._forward_hooks), list(module._forward_pre_hooks), module.training)
        for name, module in model.named_modules()
    ]
    values = {key: value.clone() for key, value in model.state_dict().items()}
    required = [(name, p.requires_grad) for name, p in model.named_parameters(remove_duplicate=False)]
    return list(values), list(values.values()), required, hooks, sorted(vars(model))


def same(one, other):
    return (
        one[0] == other[0]
        and all(torch.equal(a, b) for a, b in zip(one[1], other[1], strict=True))
        and one[2:] == other[2:]
    )


@pytest.mark.parametrize("before", ["fresh", "steered"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 0}, r"`rank` is an integer from 1 to 16, the width; received 0"),
        ({"rank": 17}, r"from 1 to 16, the width; received 17"),
        ({"rank": 2.0}, r"received 2\.0"),
        ({"rank": {0: 2, 1: 17}}, r"from 1 to 16, the width; received 17"),
        ({"rank": {0: 2, 5: 2}}, r"a layer is an integer from -2 to 1; received 5"),
        ({"rank": {0: 2, -2: 2}}, r"a layer is named once; received \[0, -2\]"),
        ({"rank": {0: 2}, "layers": [0, 1]}, r"every steered block; block 1 is missing"),
        ({"rank": {}}, r"received an empty one"),
        ({"layers": [2]}, r"a layer is an integer from -2 to 1; received 2"),
        ({"layers": [0, -2]}, r"a layer is named once; received \[0, -2\]"),
        ({"layers": []}, r"`layers` is a non-empty list of block indices, or None for all; received \[\]"),
        ({"layers": 1}, r"received 1"),
        ({"layers": [True]}, r"received True"),
        ({"site": "attention"}, r"`site` is one of block, mixer, mlp, input; received 'attention'"),
        ({"activation": "swish"}, r"`activation` is one of gelu, .*; received 'swish'"),
        ({"scale": float("inf")}, r"`scale` is a finite number; received inf"),
        ({"dropout": 1}, r"`dropout` is a number of at least 0 and below 1, a probability; received 1"),
        ({"name": "a.b"}, r"a field's `name` has 1 to 64 letters, digits, '_' or '-', .*; received 'a\.b'"),
        ({"name": ""}, r"received ''"),
        ({"name": "keys"}, r"no module attribute; received 'keys'"),
        ({"name": 3}, r"received 3"),
        ({"train": ["transformer.ln_f", "scorer"]}, r"'scorer' matches no parameter .* top modules are: transformer"),
        ({"train": [""]}, r"a `train` pattern is the name or glob of a module or parameter; received ''"),
        ({"train": [3]}, r"received 3"),
    ],
)
def test_a_bad_argument_is_refused_and_nothing_changes(arguments, message, before):
    model = GPT2.build()
    if before == "steered":
        randomise(rs.steer(model, rank=2, name="first", train="transformer.ln_f"))
    prior = fingerprint(model)
    with pytest.raises(rs.SteerError, match=message):
        rs.steer(model, **{"rank": 4, **arguments})
    assert same(fingerprint(model), prior)


class TwoBlocks(nn.Module):
    """Blocks that share their mixer; the second has no mlp."""

    def __init__(self):
        super().__init__()
        shared = nn.Linear(4, 4)
        self.blocks = nn.ModuleList(nn.ModuleDict({"mix": shared}) for _ in range(2))
        self.blocks[0]["mlp"] = nn.Linear(4, 4)


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (MAMBA.build, {"site": "mlp"}, r"backbone 'mamba' has the sites block, mixer, input; received 'mlp'"),
        (GPT2.build, {"arch": "rwkv"}, r"unknown backbone 'rwkv'; registered are: "),
        (
            GPT2.build,
            {"arch": "vit"},
            r"no known backbone in transformers.*GPT2LMHeadModel: looked along .* for those of vit ",
        ),
        (lambda: nn.Linear(4, 4), {}, r"no known backbone in torch.*Linear.*register_backbone\('mine'"),
        (
            lambda: nn.ModuleDict({"a": VIT.build(), "b": GPT2.build()}),
            {},
            r"several backbones .*: model\.a \(vit\), model\.b\.transformer \(gpt2\)\. .*steer\(model\.a, \.\.\.\)",
        ),
        (TwoBlocks, {"site": "mixer", "rank": 2}, r"some blocks share one module at site 'mixer'"),
        (TwoBlocks, {"site": "mlp", "rank": 2}, r"site 'mlp' is not there in block 1 \(ModuleDict\)"),
        (lambda: torch.compile(GPT2.build()), {}, r"compiled .* the model is compiled\. Steer first, compile after"),
        (lambda: nn.Sequential(torch.compile(GPT2.build())), {}, r"ignored: 0 is compiled\. Steer first"),
        (lambda: _compiled_in_place(GPT2.build()), {}, r"the model is compiled\. Steer first, compile after"),
    ],
)
def test_a_model_that_cannot_be_steered_is_refused_and_stays_as_it_was(make, arguments, message):
    @rs.register_backbone("two", matches=["test_steering.TwoBlocks"])
    def two(model):
        return rs.Backbone(blocks=model.blocks, width=4, mixer="mix", mlp="mlp")

    model = make()
    prior = fingerprint(model)
    with pytest.raises(rs.SteerError, match=message):
        rs.steer(model, **{"rank": 4, **arguments})
    assert same(fingerprint(model), prior)


def _compiled_in_place(model):
    model.compile(backend="eager")
    return model


def test_a_model_is_a_module():
    with pytest.raises(rs.SteerError, match=r"a model is a torch\.nn\.Module; received str"):
        rs.steer("gpt2")


def test_a_data_parallel_model_is_refused(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(GPT2.build().requires_grad_(True))
        prior = fingerprint(model)
        with pytest.raises(rs.SteerError, match=r"wrapped in DistributedDataParallel .*Steer first, wrap after"):
            rs.steer(model, rank=4)
        assert same(fingerprint(model), prior)
        wrapped = nn.parallel.DistributedDataParallel(rs.steer(model.module, rank=4))
        assert rs.summary(wrapped).acting == "default"
        GPT2.loss(wrapped).backward()
    finally:
        torch.distributed.destroy_process_group()


def test_a_part_and_the_whole_are_not_steered_both():
    model = rs.steer(GPT2.build(), rank=4)
    with pytest.raises(rs.SteerError, match=r"part of a steered one; work on the model that was given to `steer`"):
        rs.steer(model.transformer, rank=4)
    whole = GPT2.build()
    rs.steer(whole.transformer, rank=4)
    with pytest.raises(rs.SteerError, match=r"a part of this model, 'transformer', is steered already"):
        rs.steer(whole, rank=4)


def test_two_parts_of_one_model_are_steered_on_their_own():
    model = nn.ModuleDict({"image": VIT.build(), "text": GPT2.build()})
    rs.steer(model["image"], rank=4)
    rs.steer(model["text"], rank=2, name="law")
    assert (rs.summary(model["image"]).acting, rs.summary(model["text"]).acting) == ("default", "law")
    rs.unsteer(model["image"])
    assert ranks(model) == {f"text.transformer.h.{i}.steering_block.fields.law": 2 for i in range(2)}


def test_a_name_in_use_and_another_arch_are_refused():
    model = rs.steer(GPT2.build(), rank=4, name="law")
    prior = fingerprint(model)
    with pytest.raises(rs.SteerError, match=r"the name 'law' is in use; fields here: law\. Choose another"):
        rs.steer(model, rank=4, name="law")
    with pytest.raises(rs.SteerError, match=r"this model is steered as 'gpt2'; received arch='vit'"):
        rs.steer(model, "vit", rank=4, name="other")
    assert same(fingerprint(model), prior)
    rs.steer(model, "gpt2", rank=4, name="other")


@pytest.mark.parametrize("call", [rs.unsteer, rs.summary, rs.parameters, lambda model: rs.use(model, None)])
def test_an_unsteered_model_is_refused(call):
    with pytest.raises(rs.SteerError, match=r"this GPT2LMHeadModel is not steered; call residual_steer\.steer"):
        call(GPT2.build())


@pytest.mark.parametrize("mix", ["other", 3])
def test_use_refuses_what_is_no_field(mix):
    model = rs.steer(GPT2.build(), rank=4, name="law")
    with pytest.raises(rs.SteerError, match=rf"`use` takes .*; received {mix!r}"):
        rs.use(model, mix)
    assert rs.summary(model).acting == "law"


def test_parameters_refuses_what_is_no_field():
    model = rs.steer(GPT2.build(), rank=4)
    with pytest.raises(rs.SteerError, match=r"one of the fields default; received 'other'"):
        rs.parameters(model, "other")
    rs.use(model, None)
    with pytest.raises(rs.SteerError, match=r"received None"):
        rs.parameters(model)


def ranks(model):
    return {name: module.rank for name, module in model.named_modules() if isinstance(module, rs.HRes)}


def test_steer_returns_the_same_object():
    model = GPT2.build()
    assert rs.steer(model, rank=4) is model
    assert rs.unsteer(model) is model


def test_layers_and_ranks():
    assert list(ranks(rs.steer(GPT2.build(), rank=4)).values()) == [4, 4]
    assert list(ranks(rs.steer(GPT2.build(), rank=4, layers=[-1]))) == ["transformer.h.1.steering_block.fields.default"]
    assert list(ranks(rs.steer(GPT2.build(), rank={-1: 3, 0: 2})).values()) == [2, 3]
    assert list(ranks(rs.steer(GPT2.build(), rank={0: 2, 1: 3}, layers=[1])).values()) == [3]


def test_summary_counts_and_prints():
    model = rs.steer(VIT.build(), rank=4, scale=0.5, name="law", train="head")
    summary = rs.summary(model)
    field, head = 2 * (2 * 4 * WIDTH + 4 + WIDTH), WIDTH * 3 + 3
    total = sum(parameter.numel() for parameter in VIT.build().parameters()) + field
    assert (summary.trainable, summary.total) == (field + head, total)
    assert summary.share == pytest.approx((field + head) / total)
    assert str(summary).splitlines() == [
        "backbone   vit at the model itself, 2 blocks, width 16",
        "field      law: rank 4 beside the block of blocks 0–1, scale 0.5, 296 parameters, "
        "with head.weight, head.bias (acts, trains)",
        f"trainable  {field + head} of {total:,} parameters ({(field + head) / total:.2%})",
    ]
    rs.steer(model, rank={1: 2}, name="art", site="mlp")
    first, second = str(rs.summary(model)).splitlines()[1:3]
    assert first.endswith("head.bias (off)")
    assert second == "field      art: rank 2 beside the mlp of block 1, scale 1, 82 parameters (acts, trains)"


def test_parameters_are_those_of_the_field_and_what_it_opens():
    model = rs.steer(VIT.build(), rank=4, name="law", train=["head", "norm.bias"])
    found = rs.parameters(model)
    assert {id(p) for p in found} == {id(p) for p in model.parameters() if p.requires_grad}
    assert any(p is model.head.weight for p in found)
    assert any(p is model.norm.bias for p in found)
    rs.steer(model, rank=2, name="art", layers=[0])
    assert len(rs.parameters(model)) == 4
    assert [id(p) for p in rs.parameters(model, "law")] == [id(p) for p in found]
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in rs.parameters(model)}


def test_use_selects_what_acts_and_what_trains():
    model = rs.steer(rs.steer(GPT2.build(), rank=4, name="a"), rank=2, name="b")
    assert rs.summary(model).acting == "b"
    rs.use(model, "a")
    assert {p.shape[0] for p in model.parameters() if p.requires_grad} == {4, WIDTH}
    rs.use(model, None)
    assert not any(p.requires_grad for p in model.parameters())


def test_use_restores_in_nested_blocks_and_after_exceptions():
    model = rs.steer(rs.steer(GPT2.build(), rank=4, name="a"), rank=2, name="b")
    with rs.use(model, "a"):
        with rs.use(model, None):
            assert rs.summary(model).acting is None
        assert rs.summary(model).acting == "a"
        with pytest.raises(KeyError), rs.use(model, "b"):
            raise KeyError
        assert rs.summary(model).acting == "a"
    assert rs.summary(model).acting == "b"


def test_what_a_field_trains_belongs_to_it():
    model = VIT.build()
    original = model.head.weight.clone()
    rs.steer(model, rank=4, name="a", train="head")
    with torch.no_grad():
        model.head.weight.fill_(1)
    rs.steer(model, rank=4, name="b", train="head")
    assert torch.equal(model.head.weight, original)
    with torch.no_grad():
        model.head.weight.fill_(2)
    values = {}
    for name in ("a", None, "b", "a", "b"):
        rs.use(model, name)
        values[name] = model.head.weight.mean().item()
    assert (values["a"], values["b"]) == (1, 2)
    rs.use(model, None)
    assert torch.equal(model.head.weight, original)
    rs.use(model, "a")
    rs.unsteer(model)
    assert torch.equal(model.head.weight, original)


def test_a_field_that_trains_no_head_acts_with_the_original_one():
    model = VIT.build()
    original = model.head.weight.clone()
    rs.steer(model, rank=4, name="a", train="head")
    with torch.no_grad():
        model.head.weight.fill_(1)
    rs.steer(model, rank=4, name="b")
    assert torch.equal(model.head.weight, original)
    assert not model.head.weight.requires_grad


def test_train_takes_globs_and_names_of_parameters():
    model = rs.steer(VIT.build(), rank=4, train=["blocks.*.norm1", "*.bias"])
    opened = [name for name, p in model.named_parameters() if p.requires_grad and "steering_" not in name]
    expected = [
        name
        for name, _ in VIT.build().named_parameters()
        if name.endswith(".bias") or (name.startswith("blocks.") and ".norm1." in name)
    ]
    assert sorted(opened) == sorted(expected)


def test_train_never_reaches_the_fields_themselves():
    model = rs.steer(GPT2.build(), rank=4, name="a")
    rs.steer(model, rank=4, name="b", train="transformer.h.*")
    assert not any(p.requires_grad for name, p in model.named_parameters() if ".fields.a." in name)
    rs.unsteer(model)


def test_tied_weights_train_under_either_name_and_come_back_tied():
    model = GPT2.build()
    assert model.lm_head.weight is model.transformer.wte.weight
    original = model.lm_head.weight.clone()
    rs.steer(model, rank=4, train="lm_head")
    assert model.lm_head.weight is model.transformer.wte.weight
    assert model.lm_head.weight.requires_grad
    assert sum(p.shape == (VOCABULARY, WIDTH) for p in rs.parameters(model)) == 1
    with torch.no_grad():
        model.lm_head.weight.fill_(1)
    rs.unsteer(model)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert torch.equal(model.lm_head.weight, original)
    assert not model.lm_head.weight.requires_grad


def test_buffers_that_are_trained_along_belong_to_the_field():
    @rs.register_backbone("normed", matches=["test_steering.Normed"])
    def normed(model):
        return rs.Backbone(blocks=model.blocks, width=4)

    model = Normed()
    rs.steer(model, rank=2, train="norm")
    model.train()(torch.randn(3, 4))
    assert model.norm.num_batches_tracked == 1
    rs.use(model, None)
    assert model.norm.num_batches_tracked == 0
    rs.use(model, "default")
    assert model.norm.num_batches_tracked == 1


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks, self.norm = nn.ModuleList([nn.Linear(4, 4)]), nn.BatchNorm1d(4)

    def forward(self, z):
        return self.norm(z + self.blocks[0](z))


@pytest.mark.parametrize("opened", [(), ("transformer.wte",), ("transformer.h.0", "transformer.ln_f")])
def test_unsteer_restores_a_partially_frozen_model(opened):
    model = GPT2.build()
    for name in opened:
        model.get_submodule(name).requires_grad_(True)
    model.transformer.ln_f.register_forward_hook(lambda *_: None)
    prior = fingerprint(model)
    rs.steer(model, rank=4, train="transformer.h.1")
    rs.steer(model, rank=4, name="second", site="input")
    GPT2.loss(model).backward()
    rs.use(model, "default")
    rs.unsteer(model)
    assert same(fingerprint(model), prior)


def test_steering_again_after_unsteer():
    model = GPT2.build()
    expected = GPT2.run(model)
    for _ in range(2):
        randomise(rs.steer(model, rank=4))
        assert not torch.equal(GPT2.run(model), expected)
        rs.unsteer(model)
        assert torch.equal(GPT2.run(model), expected)


def test_it_works_through_compiled_wrappers():
    model = rs.steer(GPT2.build(), rank=4)
    compiled = torch.compile(model, backend="eager")
    assert rs.summary(compiled).acting == "default"
    with rs.use(compiled, None):
        assert rs.summary(model).acting is None


def gpt2():
    return TABLE["gpt2"].build()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layers": 3.5}, "`layers` is a non-empty list"),
        ({"train": None}, "`train` is a list of names"),
        ({"train": 5}, "`train` is a list of names"),
        ({"activation": []}, "`activation` is one of"),
        ({"arch": ["gpt2"]}, "unknown backbone"),
        ({"bias": "no"}, "`bias` is True or False"),
        ({"rank": {}}, "received an empty one"),
        ({"rank": 2.0}, "`rank` is an integer"),
        ({"site": []}, "`site` is one of"),
    ],
)
def test_an_argument_of_the_wrong_kind_is_refused(arguments, message):
    model = gpt2()
    before = fingerprint(model)
    with pytest.raises(rs.SteerError, match=message):
        rs.steer(model, **{"rank": 2, **arguments})
    assert same(fingerprint(model), before)


def test_a_module_of_the_users_may_be_called_like_one_of_ours():
    model = gpt2()
    model.steering_head = nn.Linear(WIDTH, 2)
    rs.steer(model, rank=2, train="steering_head")
    assert model.steering_head.weight.requires_grad
    rs.unsteer(model)
    model.transformer.h[1].steering_block = nn.Linear(2, 2)
    before = fingerprint(model)
    with pytest.raises(rs.SteerError, match="'steering_block' of its own"):
        rs.steer(model, rank=2)
    assert same(fingerprint(model), before)


def test_leaving_a_selection_hides_no_exception_and_needs_no_steering():
    model = rs.steer(gpt2(), rank=2)

    def fail():
        with rs.use(model, None):
            rs.unsteer(model)
            raise KeyError

    with pytest.raises(KeyError):
        fail()


def test_entering_a_selection_selects_again():
    model = rs.steer(gpt2(), rank=2)
    chosen = rs.use(model, "default")
    rs.use(model, None)
    with chosen:
        assert rs.summary(model).acting == "default"
