"""steer, unsteer, use, summary and parameters, and every request that they refuse."""

import cProfile
import pstats
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

import residual_steer as rs
from cases import TABLE, WIDTH, randomise
from fields import assert_as, snapshot

GPT2, VIT, MAMBA = TABLE["gpt2"], TABLE["timm-vit"], TABLE["mamba"]


def ranks(model):
    return {name: module.rank for name, module in model.named_modules() if isinstance(module, rs.HRes)}


def refused(model, message, **arguments):
    """Check that `steer` raises an error with these words, and changes nothing."""
    before = snapshot(model)
    with pytest.raises(rs.SteerError, match=message):
        rs.steer(model, **{"rank": 4, **arguments})
    assert_as(model, before)


@pytest.mark.parametrize("before", ["fresh", "steered"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 0}, r"`rank` is an integer from 1 to 16.*; received 0"),
        ({"rank": 17}, r"received 17"),
        ({"rank": 2.0}, r"`rank` is an integer.*received 2\.0"),
        ({"rank": {0: 2, 1: 17}}, r"received 17"),
        ({"rank": {0: 2, 5: 2}}, r"a layer is an integer from -2 to 1; received 5"),
        ({"rank": {0: 2, -2: 2}}, r"a layer is named once; received \[0, -2\]"),
        ({"rank": {0: 2}, "layers": [0, 1]}, r"every steered block; block 1 is missing"),
        ({"rank": {}}, r"received an empty one"),
        ({"layers": [2]}, r"a layer is an integer from -2 to 1; received 2"),
        ({"layers": [0, -2]}, r"a layer is named once; received \[0, -2\]"),
        ({"layers": []}, r"`layers` is a non-empty list of block indices, or None for all; received \[\]"),
        ({"layers": 3.5}, r"`layers` is a non-empty list.*received 3\.5"),
        ({"layers": [True]}, r"received True"),
        ({"site": "attention"}, r"`site` is one of block, mixer, mlp, input, after; received 'attention'"),
        ({"site": []}, r"`site` is one of"),
        ({"activation": "swish"}, r"`activation` is one of gelu, .*; received 'swish'"),
        ({"activation": []}, r"`activation` is one of"),
        ({"scale": float("inf")}, r"`scale` is a finite number; received inf"),
        ({"bias": "no"}, r"`bias` is True or False; received 'no'"),
        ({"dropout": 1}, r"`dropout` is a number of at least 0 and below 1.*; received 1"),
        ({"name": "a.b"}, r"a field's `name` has 1 to 64 letters, digits, '_' or '-', .*; received 'a\.b'"),
        ({"name": ""}, r"received ''"),
        ({"name": "keys"}, r"no module attribute; received 'keys'"),
        ({"name": 3}, r"received 3"),
        ({"train": ["transformer.ln_f", "scorer"]}, r"'scorer' matches no parameter .* top modules are: transformer"),
        ({"train": [""]}, r"a `train` pattern is the name or glob of a module or parameter; received ''"),
        ({"train": [3]}, r"received 3"),
        ({"train": None}, r"`train` is a list of names"),
        ({"arch": "rwkv"}, r"unknown backbone 'rwkv'; registered are: |steered as 'gpt2'; received arch='rwkv'"),
        ({"arch": ["gpt2"]}, r"unknown backbone|steered as 'gpt2'"),
    ],
)
def test_a_bad_argument_is_refused_and_nothing_changes(arguments, message, before):
    model = GPT2.build()
    if before == "steered":
        randomise(rs.steer(model, rank=2, name="first", train="transformer.ln_f"))
    refused(model, message, **arguments)


class TwoBlocks(nn.Module):
    """Blocks that share their mixer; the second has no mlp."""

    def __init__(self):
        super().__init__()
        shared = nn.Linear(4, 4)
        self.blocks = nn.ModuleList(nn.ModuleDict({"mix": shared}) for _ in range(2))
        self.blocks[0]["mlp"] = nn.Linear(4, 4)


def compiled_in_place():
    model = GPT2.build()
    model.compile(backend="eager")
    return model


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (MAMBA.build, {"site": "mlp"}, r"backbone 'mamba' has the sites block, mixer, input, after; received 'mlp'"),
        (GPT2.build, {"arch": "vit"}, r"no known backbone in transformers.*GPT2LMHeadModel: .* for those of vit "),
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
        (compiled_in_place, {}, r"the model is compiled\. Steer first, compile after"),
    ],
)
def test_a_model_that_cannot_be_steered_is_refused_and_stays_as_it_was(make, arguments, message):
    @rs.register_backbone("two", matches=["test_steering.TwoBlocks"])
    def two(model):
        return rs.Backbone(blocks=model.blocks, width=4, mixer="mix", mlp="mlp")

    refused(make(), message, **arguments)


def test_data_parallelism_comes_after_steering_and_after_selecting():
    """The wrapper synchronises what required a gradient when it was made, and nothing else."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(GPT2.build().requires_grad_(True))
        refused(model, r"wrapped in DistributedDataParallel .*Steer first, wrap after")
        rs.steer(rs.steer(model.module, rank=4, name="law"), rank=4, name="art")
        wrapped = nn.parallel.DistributedDataParallel(model.module)
        GPT2.loss(wrapped).backward()
        with pytest.raises(rs.SteerError, match="what trains cannot change once a model is wrapped"):
            rs.use(wrapped, "law")
        rs.use(wrapped, "art")
        rs.use(wrapped, ["law", "art"])
        assert rs.summary(wrapped).acting == ["law", "art"]
    finally:
        torch.distributed.destroy_process_group()


def test_a_part_and_the_whole_are_not_steered_both():
    model = rs.steer(GPT2.build(), rank=4)
    with pytest.raises(rs.SteerError, match=r"part of a steered one; work on the model that was given to `steer`"):
        rs.steer(model.transformer, rank=4)
    whole = GPT2.build()
    rs.steer(whole.transformer, rank=4)
    refused(whole, r"a part of this model, 'transformer', is steered already")


def test_two_parts_of_one_model_are_steered_on_their_own():
    model = nn.ModuleDict({"image": VIT.build(), "text": GPT2.build()})
    rs.steer(model["image"], rank=4)
    rs.steer(model["text"], rank=2, name="law")
    assert (rs.summary(model["image"]).acting, rs.summary(model["text"]).acting) == ("default", "law")
    rs.unsteer(model["image"])
    assert ranks(model) == {f"text.transformer.h.{i}.steering_block.fields.law": 2 for i in range(2)}


def test_a_name_in_use_and_another_backbone_are_refused():
    model = rs.steer(GPT2.build(), "gpt2", rank=4, name="law")
    refused(model, r"the name 'law' is in use; fields here: law\. Choose another", name="law")
    other = rs.Backbone(blocks=list(model.transformer.h)[:1], width=WIDTH)
    refused(model, r"steered as 'gpt2'; received a Backbone of 1 blocks", arch=other, name="other")


@pytest.mark.parametrize(
    "call",
    [rs.unsteer, rs.summary, rs.fields, rs.parameters, lambda model: rs.use(model, None)],
    ids=["unsteer", "summary", "fields", "parameters", "use"],
)
def test_an_unsteered_model_is_refused(call):
    with pytest.raises(rs.SteerError, match=r"this GPT2LMHeadModel is not steered; call residual_steer\.steer"):
        call(GPT2.build())


def test_layers_and_ranks():
    model = GPT2.build()
    assert rs.steer(model, rank=4) is model
    assert list(ranks(model).values()) == [4, 4]
    assert rs.unsteer(model) is model
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
    rs.use(model, {"law": 0.5, "art": -1})
    assert "mix        {'art': -1.0, 'law': 0.5}" in str(rs.summary(model))
    assert [field.state for field in rs.fields(model)] == ["acts", "acts"]
    assert rs.summary(model).trainable == 0


def test_fields_lists_rank_site_layers_parameters_and_state():
    model = rs.steer(GPT2.build(), rank=4, name="law")
    rs.steer(model, rank={1: 2}, name="art", site="mixer", activation="relu")
    rs.steer(model, rank=3, name="news", layers=[0])
    found = rs.fields(model)
    assert [(field.name, field.rank, field.site, field.layers, field.state) for field in found] == [
        ("law", 4, "block", (0, 1), "off"),
        ("art", 2, "mixer", (1,), "off"),
        ("news", 3, "block", (0,), "acts, trains"),
    ]
    assert [field.parameters for field in found] == [2 * (8 * WIDTH + 4 + WIDTH), 4 * WIDTH + 2 + WIDTH, 7 * WIDTH + 3]
    assert (found["art"].activation, found["art"].scale, found["art"].bias, found["art"].train) == ("relu", 1, True, ())
    assert found["art"] == found[1]
    assert "art" in found
    assert found[1] in found
    assert "sport" not in found
    assert replace(found[1], scale=2.0) not in found
    assert found[1:]["news"] == found[-1]
    with pytest.raises(rs.SteerError, match=r"no field is called 'sport'; fields here: law, art, news"):
        found["sport"]
    line = f"art: rank 2 beside the mixer of block 1, scale 1, {5 * WIDTH + 2} parameters (off)"
    assert str(found).splitlines()[1] == line
    rs.steer(model, rank={0: 1, 1: 2}, name="both")
    assert rs.fields(model)["both"].rank == (1, 2)
    assert "rank 1 to 2 beside the block of blocks 0–1" in str(rs.fields(model))


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


def test_train_takes_globs_and_names_of_parameters_and_never_reaches_fields():
    model = rs.steer(VIT.build(), rank=4, train=["blocks.*.norm1", "*.bias"])
    opened = [name for name, p in model.named_parameters() if p.requires_grad and "steering_" not in name]
    names = [name for name, _ in VIT.build().named_parameters()]
    wanted = [n for n in names if n.endswith(".bias") or (n.startswith("blocks.") and ".norm1." in n)]
    assert sorted(opened) == sorted(wanted)
    rs.steer(model, rank=4, name="b", train="blocks.*")
    assert not any(p.requires_grad for name, p in model.named_parameters() if ".fields.default." in name)


@pytest.mark.parametrize("opened", [(), ("transformer.wte",), ("transformer.h.0", "transformer.ln_f")])
def test_unsteer_restores_a_partially_frozen_model(opened):
    model = GPT2.build()
    for name in opened:
        model.get_submodule(name).requires_grad_(True)
    model.transformer.ln_f.register_forward_hook(lambda *_: None)
    before, expected = snapshot(model), GPT2.run(model)
    for _ in range(2):
        randomise(rs.steer(model, rank=4, train="transformer.h.1"))
        rs.steer(model, rank=4, name="second", site="input")
        GPT2.loss(model).backward()
        rs.use(model, "default")
        assert not torch.equal(GPT2.run(model), expected)
        rs.unsteer(model)
        assert_as(model, before)
        assert torch.equal(GPT2.run(model), expected)


def test_it_works_through_compiled_wrappers():
    model = rs.steer(GPT2.build(), rank=4)
    compiled = torch.compile(model, backend="eager")
    assert rs.summary(compiled).acting == "default"
    with rs.use(compiled, None):
        assert rs.summary(model).acting is None


@pytest.mark.parametrize(("place", "key"), [("transformer.h.1", "steering_block"), ("lm_head", "steering_rows")])
def test_a_module_of_the_users_may_be_called_like_one_of_ours(place, key):
    model = GPT2.build()
    model.steering_head = nn.Linear(WIDTH, 2)
    rs.steer(model, rank=2, train="steering_head")
    assert model.steering_head.weight.requires_grad
    rs.unsteer(model)
    setattr(model.get_submodule(place), key, 1)
    refused(model, f"{key}' of its own", train="lm_head")


def test_leaving_a_selection_hides_no_exception_and_needs_no_steering():
    model = rs.steer(GPT2.build(), rank=2)

    def fail():
        with rs.use(model, None):
            rs.unsteer(model)
            raise KeyError

    with pytest.raises(KeyError):
        fail()


def test_a_selection_that_is_entered_later_restores_what_it_found():
    model = rs.steer(rs.steer(GPT2.build(), rank=2, name="law"), rank=2, name="art")
    rs.use(model, None)
    chosen = rs.use(model, "law")
    rs.use(model, "art")
    with chosen:
        assert rs.summary(model).acting == "law"
    assert rs.summary(model).acting == "art"
    assert repr(chosen) == "<selected: law>"


def test_adding_and_selecting_cost_no_more_beside_many_fields():
    """Counted in what Python calls, which no other process disturbs."""

    def calls(action):
        profile = cProfile.Profile()
        profile.runcall(action)
        return pstats.Stats(profile).total_calls

    model, counts = GPT2.build(), []
    for size in (4, 24):
        for index in range(size):
            rs.steer(model, rank=2, name=f"{size}-{index}")
        one, other, found = f"{size}-0", f"{size}-1", [calls(partial(rs.steer, model, rank=2, name=f"new-{size}"))]
        rs.use(model, {one: 1})  # makes once what all mixes of these fields share
        found += [calls(partial(rs.use, model, mix)) for mix in (one, {one: 0.5, other: 0.5}, [one, None])]
        counts.append(found)
    for few, many in zip(*counts, strict=True):
        assert many <= 1.1 * few
