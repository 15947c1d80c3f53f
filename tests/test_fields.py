"""The life of a field among others: added, listed, frozen, thawed, trained alone, removed; and the heads of fields."""

import copy

import pytest
import torch
from torch import nn

import residual_steer as rs
from cases import CASES, WIDTH, randomise
from residual_steer._controller import steering_of
from runs import fit
from test_steering import fingerprint, same

TABLE = {case.name: case for case in CASES}
FAMILIES = ["timm-vit", "gpt2", "mamba", "mamba_ssm-1"]


@pytest.fixture(params=FAMILIES)
def case(request):
    return TABLE[request.param]


def three(case, **more):
    """Return a model with three fields that differ in rank, site and layers; `news` is selected."""
    model = rs.steer(case.build(), rank=4, name="law", **more)
    rs.steer(model, rank={1: 2}, name="art", site="mixer", activation="relu", **more)
    rs.steer(model, rank=3, name="news", layers=[0], **more)
    return randomise(model)


def tensors(model, name):
    """Return a copy of all that is a field's own: its weights, and its values of the head."""
    base, state = steering_of(model)
    return [tensor.detach().clone() for tensor in state.tensors(base, name).values()]


def equal(one, other):
    return all(torch.equal(x, y) for x, y in zip(one, other, strict=True))


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.5),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.5),
    ],
    ids=["AdamW", "SGD"],
)
def test_only_the_selected_field_trains(case, make):
    """One optimizer over everything, with weight decay and with momentum from when another field trained."""
    model = three(case, train=case.head)
    everything = {id(p): p for name in ("law", "art", "news") for p in rs.parameters(model, name)}
    optimizer = make(list(everything.values()))
    for trained in ("law", "art", "law", "news"):
        rs.use(model, trained)
        before = {name: tensors(model, name) for name in ("law", "art", "news")}
        for _ in range(3):
            optimizer.zero_grad()
            case.loss(model).backward()
            optimizer.step()
        for name, kept in before.items():
            now = tensors(model, name)
            if name == trained:
                assert not any(torch.equal(x, y) for x, y in zip(kept, now, strict=True))
            else:
                assert equal(kept, now)
    rs.use(model, None)
    now = model.state_dict()
    assert all(torch.equal(now[key], value) for key, value in case.build().state_dict().items())


def test_fit_trains_what_is_selected_and_leaves_the_rest():
    case = TABLE["gpt2"]
    model = three(case)
    rs.use(model, "art")
    kept = {name: tensors(model, name) for name in ("law", "news")}
    before = tensors(model, "art")
    batch = {**case.inputs(model), "labels": case.inputs(model)["input_ids"]}
    fit(model, [batch], steps=3, lr=0.1, weight_decay=0.1)
    assert not equal(before, tensors(model, "art"))
    assert all(equal(kept[name], tensors(model, name)) for name in kept)


def test_fields_lists_rank_site_layers_parameters_and_state():
    model = three(TABLE["gpt2"])
    found = rs.fields(model)
    assert [field.name for field in found] == ["law", "art", "news"]
    assert [field.rank for field in found] == [4, 2, 3]
    assert [field.site for field in found] == ["block", "mixer", "block"]
    assert [field.layers for field in found] == [(0, 1), (1,), (0,)]
    assert [field.state for field in found] == ["off", "off", "acts, trains"]
    assert [field.parameters for field in found] == [2 * (8 * WIDTH + 4 + WIDTH), 4 * WIDTH + 2 + WIDTH, 7 * WIDTH + 3]
    assert found["art"] == found[1]
    assert "art" in found
    assert "sport" not in found
    assert len(found[1:]) == 2
    with pytest.raises(rs.SteerError, match=r"no field is called 'sport'; fields here: law, art, news"):
        found["sport"]
    assert str(found).splitlines()[1] == (
        f"art: rank 2 beside the mixer of block 1, scale 1, {5 * WIDTH + 2} parameters (off)"
    )
    rs.steer(model, rank={0: 1, 1: 2}, name="both")
    assert rs.fields(model)["both"].rank == (1, 2)
    assert "rank 1 to 2 beside the block of blocks 0–1" in str(rs.fields(model))
    with pytest.raises(rs.SteerError, match="not steered"):
        rs.fields(TABLE["gpt2"].build())


def test_the_summary_shows_the_mix():
    model = three(TABLE["gpt2"])
    rs.use(model, {"law": 0.5, "art": -1})
    assert "mix        {'art': -1.0, 'law': 0.5}" in str(rs.summary(model))
    assert [field.state for field in rs.fields(model)] == ["acts", "acts", "off"]
    assert rs.summary(model).trainable == 0


def trainable(model):
    fields = {id(p): name for name in ("law", "art", "news") for p in rs.parameters(model, name)}
    return {fields.get(id(p), "base") for p in model.parameters() if p.requires_grad}


def test_freeze_and_thaw(case):
    model = three(case)
    rs.freeze(model, "news")
    assert trainable(model) == set()
    assert rs.fields(model)["news"].state == "acts, frozen"
    rs.use(model, "law")
    assert trainable(model) == {"law"}
    assert rs.fields(model)["news"].state == "off, frozen"
    rs.use(model, {"law": 1, "art": 0.5})
    assert trainable(model) == set()
    rs.thaw(model, "art")
    assert trainable(model) == {"art"}
    rs.use(model, ["art", "law"])
    assert trainable(model) == {"art"}
    rs.use(model, "news")
    assert trainable(model) == set()
    rs.thaw(model)
    assert trainable(model) == {"news"}
    rs.freeze(model)
    assert trainable(model) == set()


def test_a_new_field_is_not_frozen_by_a_namesake():
    model = three(TABLE["gpt2"])
    rs.freeze(model, "art")
    rs.unsteer(model, "art")
    rs.steer(model, rank=2, name="art")
    assert rs.fields(model)["art"].state == "acts, trains"


def test_freezing_keeps_the_head_too():
    model = rs.steer(TABLE["timm-vit"].build(), rank=2, train="head")
    assert model.head.weight.requires_grad
    rs.freeze(model)
    assert not any(p.requires_grad for p in model.parameters())
    rs.thaw(model)
    assert model.head.weight.requires_grad


@pytest.mark.parametrize("call", [rs.freeze, rs.thaw, rs.parameters])
def test_a_field_has_to_be_named_where_not_one_acts(call):
    model = three(TABLE["gpt2"])
    rs.use(model, None)
    with pytest.raises(rs.SteerError, match="received None, while none of them acts"):
        call(model)
    rs.use(model, {"law": 1, "art": 1})
    with pytest.raises(rs.SteerError, match="received None, while several of them act"):
        call(model)
    with pytest.raises(rs.SteerError, match="law, art, news; received 'sport'"):
        call(model, "sport")


def test_one_field_learns_what_a_frozen_one_leaves_over():
    case = TABLE["gpt2"]
    model = three(case)
    rs.use(model, {"law": 1, "news": 1})
    rs.thaw(model, "news")
    kept, before = tensors(model, "law"), tensors(model, "news")
    optimizer = torch.optim.Adam(rs.parameters(model, "news"), lr=0.01)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = case.loss(model)
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    assert equal(kept, tensors(model, "law"))
    assert not equal(before, tensors(model, "news"))


@pytest.mark.parametrize(
    "acting", [None, "law", "art", {"law": 0.5, "news": 1.0}, {"art": 2.0, "law": 1.0}, ["art", "law"]]
)
def test_removing_one_field_leaves_the_others(case, acting):
    model, never = three(case, train=case.head), case.build()
    rs.steer(never, rank=4, name="law", train=case.head)
    rs.steer(never, rank=3, name="news", layers=[0], train=case.head)
    expected = {}
    for name in ("law", "news", None):
        rs.use(model, name)
        expected[name] = case.run(model)
    rs.use(model, acting)
    rs.unsteer(model, "art")
    assert [field.name for field in rs.fields(model)] == ["law", "news"]
    assert list(model.state_dict()) == list(never.state_dict())
    assert [name for name, _ in model.named_modules()] == [name for name, _ in never.named_modules()]
    assert rs.summary(model).acting == (None if "art" in (acting or ()) else acting)
    for name, output in expected.items():
        rs.use(model, name)
        assert torch.equal(case.run(model), output)
    rs.steer(model, rank=2, name="art")
    assert [field.name for field in rs.fields(model)] == ["law", "news", "art"]
    with pytest.raises(rs.SteerError, match="received 'sport'"):
        rs.unsteer(model, "sport")


@torch.no_grad()
def test_a_field_that_was_removed_is_not_computed_by_a_compiled_mix():
    case = TABLE["gpt2"]
    model = randomise(rs.steer(rs.steer(case.build(), rank=2, name="law"), rank=3, name="art"))
    rs.use(model, {"law": 0.5})
    rs.unsteer(model, "art")
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(case.run(compiled), case.run(model))


def test_with_the_last_field_goes_the_steering(case):
    model = case.build()
    next(model.parameters()).requires_grad_(True)
    before = fingerprint(model)
    rs.unsteer(three_on(model, case), "law")
    rs.unsteer(model, "news")
    rs.unsteer(model, "art")
    assert same(fingerprint(model), before)
    with pytest.raises(rs.SteerError, match="not steered"):
        rs.fields(model)


def three_on(model, case):
    for name, more in (("law", {}), ("art", {"site": "mixer"}), ("news", {"layers": [0]})):
        rs.steer(model, rank=2, name=name, train=case.head, **more)
    return randomise(model)


def test_the_switches_of_heads_go_with_the_fields_that_need_them():
    model = TABLE["timm-vit"].build()
    rs.steer(model, rank=2, name="law")
    assert not hasattr(model.head, "steering_rows")
    rs.steer(model, rank=2, name="art", train="head")
    rs.steer(model, rank=2, name="news", train=["head", "norm"])
    assert hasattr(model.head, "steering_rows")
    assert hasattr(model.norm, "steering_rows")
    rs.unsteer(model, "news")
    assert hasattr(model.head, "steering_rows")
    assert not hasattr(model.norm, "steering_rows")
    rs.unsteer(model, "art")
    assert not hasattr(model.head, "steering_rows")


def shift(model, name, by):
    """Move a field's head by a constant."""
    with rs.use(model, name), torch.no_grad():
        model.head.weight += by


def test_weights_sum_what_the_heads_learned():
    """Task arithmetic (arXiv 2212.04089): base + Σ w·(head of the field - base)."""
    model = TABLE["timm-vit"].build()
    base = model.head.weight.detach().clone()
    for name, by in (("law", 1.0), ("art", 2.0)):
        rs.steer(model, rank=2, name=name, train="head")
        shift(model, name, by)
    rs.steer(model, rank=2, name="news")
    for mix, by in (({"law": 0.5, "art": -1.0}, -1.5), ({"law": 1.0, "news": 1.0}, 1.0), ({"art": 2}, 4), ({}, 0)):
        rs.use(model, mix)
        torch.testing.assert_close(model.head.weight, base + by)
        assert not model.head.weight.requires_grad
    rs.use(model, {"law": 1.0, "news": 1.0})
    exact = model.head.weight.detach().clone()
    rs.use(model, "law")
    assert torch.equal(model.head.weight, exact)
    rs.use(model, None)
    assert torch.equal(model.head.weight, base)


@pytest.mark.parametrize("other", ["transformer.wte", "lm_head"])
def test_a_tied_tensor_is_summed_once(other):
    model = TABLE["gpt2"].build()
    base = model.lm_head.weight.detach().clone()
    for name, by, train in (("law", 1, ["lm_head", "transformer.wte"]), ("art", 10, other)):
        rs.steer(model, rank=2, name=name, train=train)
        with torch.no_grad():
            model.lm_head.weight += by
    for mix, by in (({"law": 0.5, "art": 0.25}, 3), ("law", 1), ("art", 10), (None, 0), ({"art": -1}, -10)):
        rs.use(model, mix)
        assert model.lm_head.weight is model.transformer.wte.weight
        torch.testing.assert_close(model.lm_head.weight, base + by)


@torch.no_grad()
def test_rows_meet_a_tied_embedding_at_both_its_ends():
    case = TABLE["gpt2"]
    model = case.build()
    for seed, name in enumerate(("law", "art")):
        rs.steer(model, rank=2, name=name, train="lm_head")
        torch.manual_seed(seed)
        model.lm_head.weight += torch.randn_like(model.lm_head.weight) * 0.3
    alone = {}
    for name in ("law", "art"):
        rs.use(model, name)
        alone[name] = case.run(model)
    rs.use(model, ["art", "law"])
    mixed = case.run(model)
    for place, name in enumerate(["art", "law"]):
        torch.testing.assert_close(mixed[place], alone[name][place], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("opened", ["blocks.1", "pos_embed", "blocks.0.norm1"])
def test_rows_that_cannot_differ_are_refused_and_nothing_changes(opened):
    case = TABLE["timm-vit"]
    model = rs.steer(case.build(), rank=2, name="law", train=opened)
    rs.steer(model, rank=2, name="art")
    randomise(model)
    expected = case.run(model)
    with pytest.raises(rs.SteerError, match=rf"field 'law' has its own value of {opened}.*cannot differ.*by name"):
        rs.use(model, ["law", "art"])
    assert rs.summary(model).acting == "art"
    assert torch.equal(case.run(model), expected)
    rs.use(model, ["art", None])
    rs.use(model, ["law", "law"])
    rs.use(model, {"law": 0.5, "art": 0.5})


@torch.no_grad()
def test_a_head_whose_weight_is_taken_straight_is_noticed():
    case = TABLE["timm-vit"]

    class Direct(type(case.build())):
        def forward_head(self, x, pre_logits=False):
            return nn.functional.linear(self.norm(x)[:, 0], self.head.weight)

    model = case.build()
    model.__class__ = Direct
    for name in ("law", "art"):
        rs.steer(model, rank=2, name=name, train="head")
    case.run(model)
    rs.use(model, ["law", "art"])
    with pytest.warns(UserWarning, match="own values of a Linear that this call did not go through"):
        case.run(model)


def test_heads_chosen_in_inference_mode_can_train():
    case = TABLE["timm-vit"]
    model = randomise(three(case, train=["head"]))
    with torch.inference_mode():
        rs.use(model, ["law", "news"])
        rs.thaw(model, "law")
        case.run(model)
    case.loss(model).backward()
    assert all(p.grad is not None for p in rs.parameters(model, "law")[:-2])
    with torch.inference_mode():
        rs.use(model, "law")
    case.loss(model).backward()
    assert all(p.grad is not None for p in rs.parameters(model))


@torch.no_grad()
def test_heads_by_row_follow_casts_modes_and_copies():
    case = TABLE["timm-vit"]
    model = case.build()
    for name, by in (("law", 1.0), ("art", -1.0)):
        rs.steer(model, rank=2, name=name, train="head")
        shift(model, name, by)
    rs.use(model, ["law", None])
    expected = case.run(model)
    twin = copy.deepcopy(model)
    rs.use(model, None)
    assert torch.equal(case.run(twin), expected)
    late = twin.to(torch.float64)
    torch.testing.assert_close(case.run(late), expected.double(), rtol=1e-5, atol=1e-5)
    assert late.head.steering_rows._twins[0][0].weight.dtype == torch.float64
    late.train()
    assert late.head.steering_rows._twins[0][0].training
    assert list(model.state_dict()) == list(twin.state_dict())


@torch.no_grad()
def test_foreign_hooks_on_a_head_run_once_and_see_every_row():
    case = TABLE["timm-vit"]
    model, seen = case.build(), []
    for name, by in (("law", 1.0), ("art", -1.0)):
        rs.steer(model, rank=2, name=name, train="head")
        shift(model, name, by)
    model.head.register_forward_hook(lambda _, args, out: seen.append(out.clone()))
    rs.use(model, ["law", "art"])
    output = case.run(model)
    assert len(seen) == 1
    assert torch.equal(seen[0], output)


@torch.no_grad()
def test_heads_by_row_compile():
    case = TABLE["timm-vit"]
    model = case.build()
    for name, by in (("law", 1.0), ("art", -1.0)):
        rs.steer(model, rank=2, name=name, train="head")
        shift(model, name, by)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for rows in (["law", "art"], ["art", None], [None, "law"]):
        rs.use(model, rows)
        torch.testing.assert_close(case.run(compiled), case.run(model))


@pytest.mark.parametrize("late", [False, True])
def test_a_head_with_a_forward_of_another_cannot_differ_by_row(late):
    model = TABLE["timm-vit"].build()
    if not late:
        model.head.forward = model.head.forward  # as accelerate's hooks do it
    for name in ("law", "art"):
        rs.steer(model, rank=2, name=name, train="head")
    model.head.forward = model.head.forward
    with pytest.raises(rs.SteerError, match="cannot differ"):
        rs.use(model, ["law", "art"])
