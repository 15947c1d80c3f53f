"""The life of a field among others: trained alone, frozen, thawed, removed."""

import pytest
import torch

import residual_steer as rs
from cases import CASES, randomise
from fields import assert_as, snapshot
from residual_steer._controller import steering_of
from runs import fit

TABLE = {case.name: case for case in CASES}
NAMES = ("law", "art", "news")


@pytest.fixture(params=["timm-vit", "gpt2", "mamba", "mamba_ssm-1"])
def case(request):
    return TABLE[request.param]


def three(case, model=None, **more):
    """Return a model with three fields that differ in rank, site and layers; `news` is selected."""
    model = rs.steer(case.build() if model is None else model, rank=4, name="law", **more)
    rs.steer(model, rank={1: 2}, name="art", site="mixer", activation="relu", **more)
    rs.steer(model, rank=3, name="news", layers=[0], **more)
    return randomise(model)


def tensors(model, name):
    """Return a copy of all that is a field's own: its weights, and its values of the head."""
    base, state = steering_of(model)
    return [tensor.detach().clone() for tensor in state.tensors(base, name).values()]


def equal(one, other):
    return all(torch.equal(x, y) for x, y in zip(one, other, strict=True))


def trainable(model):
    fields = {id(p): name for name in NAMES for p in rs.parameters(model, name)}
    return {fields.get(id(p), "base") for p in model.parameters() if p.requires_grad}


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
    everything = {id(p): p for name in NAMES for p in rs.parameters(model, name)}
    optimizer = make(list(everything.values()))
    for trained in ("law", "art", "law", "news"):
        rs.use(model, trained)
        before = {name: tensors(model, name) for name in NAMES}
        for _ in range(3):
            optimizer.zero_grad()
            case.loss(model).backward()
            optimizer.step()
        for name, kept in before.items():
            now = tensors(model, name)
            moved = [not torch.equal(x, y) for x, y in zip(kept, now, strict=True)]
            assert all(moved) if name == trained else not any(moved)
    rs.use(model, None)
    now = model.state_dict()
    assert all(torch.equal(now[key], value) for key, value in case.build().state_dict().items())


def test_fit_trains_what_is_selected_and_leaves_the_rest():
    case = TABLE["gpt2"]
    model = three(case)
    rs.use(model, "art")
    before = {name: tensors(model, name) for name in NAMES}
    fit(model, [{**case.inputs(model), "labels": case.inputs(model)["input_ids"]}], steps=3, lr=0.1, weight_decay=0.1)
    assert {name for name in NAMES if not equal(before[name], tensors(model, name))} == {"art"}


def test_freeze_and_thaw(case):
    model = three(case)
    steps = [
        (lambda: rs.freeze(model, "news"), set(), "acts, frozen"),
        (lambda: rs.use(model, "law"), {"law"}, "off, frozen"),
        (lambda: rs.use(model, {"law": 1, "art": 0.5}), set(), "off, frozen"),
        (lambda: rs.thaw(model, "art"), {"art"}, "off, frozen"),
        (lambda: rs.use(model, ["art", "law"]), {"art"}, "off, frozen"),
        (lambda: rs.use(model, None), set(), "off, frozen"),
        (lambda: rs.use(model, "news"), set(), "acts, frozen"),
        (lambda: rs.thaw(model), {"news"}, "acts, trains"),
        (lambda: rs.freeze(model), set(), "acts, frozen"),
    ]
    for step, (act, trains, state) in enumerate(steps):
        act()
        assert (trainable(model), rs.fields(model)["news"].state) == (trains, state), step


def test_a_new_field_is_not_frozen_by_a_namesake():
    model = three(TABLE["gpt2"])
    rs.freeze(model, "art")
    rs.unsteer(model, "art")
    rs.steer(model, rank=2, name="art")
    assert rs.fields(model)["art"].state == "acts, trains"


@pytest.mark.parametrize("call", [rs.freeze, rs.thaw, rs.parameters])
def test_a_field_has_to_be_named_where_not_one_acts(call):
    model = three(TABLE["gpt2"])
    for mix, words in ((None, "none of them acts"), ({"law": 1, "art": 1}, "several of them act")):
        rs.use(model, mix)
        with pytest.raises(rs.SteerError, match=f"received None, while {words}"):
            call(model)
    with pytest.raises(rs.SteerError, match="one of the fields law, art, news; received 'sport'"):
        call(model, "sport")


def test_one_field_learns_what_a_frozen_one_leaves_over():
    case = TABLE["gpt2"]
    model = three(case)
    rs.use(model, {"law": 1, "news": 1})
    rs.thaw(model, "news")
    kept, before = tensors(model, "law"), tensors(model, "news")
    optimizer, losses = torch.optim.Adam(rs.parameters(model, "news"), lr=0.01), []
    for _ in range(5):
        optimizer.zero_grad()
        losses.append(case.loss(model))
        losses[-1].backward()
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
    assert rs.summary(model).acting == (None if "art" in (acting or ()) else acting)
    for one in (model, never):
        rs.use(one, "law")  # a state dict has the heads that are not in place, too
    assert list(model.state_dict()) == list(never.state_dict())
    assert [name for name, _ in model.named_modules()] == [name for name, _ in never.named_modules()]
    for name, output in expected.items():
        rs.use(model, name)
        assert torch.equal(case.run(model), output)
    rs.steer(model, rank=2, name="art")
    assert [field.name for field in rs.fields(model)] == ["law", "news", "art"]
    with pytest.raises(rs.SteerError, match="received 'sport'"):
        rs.unsteer(model, "sport")


@torch.no_grad()
def test_a_compiled_mix_computes_the_fields_that_are_there_as_they_are_now():
    case = TABLE["gpt2"]
    model = randomise(rs.steer(rs.steer(case.build(), rank=2, name="law"), rank=3, name="art"))
    rs.use(model, {"law": 0.5, "art": 1})
    for change in (lambda: rs.unsteer(model, "art"), lambda: setattr_of(model, "law", "activation", "tanh")):
        change()
        rs.use(model, {"law": 0.5})
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(case.run(compiled), case.run(model))


def setattr_of(model, name, attribute, value):
    for field in steering_of(model)[1].fields(name).values():
        setattr(field, attribute, value)


def test_with_the_last_field_goes_the_steering(case):
    model = case.build()
    next(model.parameters()).requires_grad_(True)
    before = snapshot(model)
    three(case, model, train=case.head)
    for name in ("law", "news", "art"):
        rs.unsteer(model, name)
    assert_as(model, before)


def test_hooks_and_guards_do_not_pile_up():
    case = TABLE["timm-vit"]
    model = three(case)
    before = snapshot(model)
    for _ in range(3):
        rs.steer(model, name="new", rank=2, train="head")
        rs.unsteer(model, "new")
        rs.use(model, "news")
    assert_as(model, before)
    assert all(len(p._backward_hooks or {}) <= 1 for name in NAMES for p in rs.parameters(model, name))
