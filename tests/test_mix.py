"""The mix at one point, against the sum of closed forms: algebra, rows, and what `use` takes."""

import math

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import residual_steer as rs
from cases import closed_form
from residual_steer.field import ACTIVATIONS
from residual_steer.routing import Mix, row_factor

WIDTH, BATCH, LENGTH = 6, 4, 3
NAMES = ("a", "b", "c", "d")


class Block(nn.Module):
    """Half of what comes in, whatever its shape; its mixer is all there is to it."""

    def __init__(self):
        super().__init__()
        self.mixer = nn.Sequential()
        self.weight = nn.Parameter(torch.tensor(0.5))

    def forward(self, z):
        return self.weight * self.mixer(z)


@st.composite
def field_sets(draw):
    """Between one and four fields of any rank, activation, scale and bias, with their weights."""
    fields = []
    for name in NAMES[: draw(st.integers(1, 4))]:
        options = {
            "rank": draw(st.integers(1, WIDTH)),
            "activation": draw(st.sampled_from(sorted(ACTIVATIONS))),
            "scale": draw(st.sampled_from([1.0, -0.5, 2.0])),
            "bias": draw(st.booleans()),
        }
        fields.append((name, options))
    return fields


def steered(fields, seed, channels=-1, **more):
    """Return a frozen model in fp64 whose fields have random weights."""
    model = nn.Sequential(Block()).double().eval()
    described = rs.Backbone(blocks=list(model), width=WIDTH, channels=channels, mixer="mixer")
    for name, options in fields:
        rs.steer(model, described, name=name, **options, **more)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, _ in fields:
            for parameter in rs.parameters(model, name):
                parameter.normal_()
    return model


def pair(more=(), **options):
    """Return a model with a field `a` of rank 2 and one `b` of rank 3."""
    return steered([("a", {"rank": 2}), ("b", {"rank": 3, **dict(more)})], 0, **options)


def fields_of(model):
    return dict(model[0].steering_block.fields.items())


weights = st.floats(-3, 3).filter(lambda w: abs(w) > 1e-3 or w == 0)
seeds = st.integers(0, 2**16)
quick = settings(max_examples=40, deadline=None)


def stream(seed):
    return torch.randn(BATCH, LENGTH, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def near(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@given(field_sets(), st.lists(weights, min_size=4, max_size=4), seeds)
@quick
def test_a_mix_moves_the_stream_by_the_weighted_sum_of_its_fields_in_whatever_order(fields, chosen, seed):
    model, z = steered(fields, seed), stream(seed)
    mix = {name: weight for (name, _), weight in zip(fields, chosen, strict=False)}
    rs.use(model, mix)
    expected = 0.5 * z
    for name, weight in mix.items():
        field = fields_of(model)[name]
        moved = closed_form(field, z) if (field.activation, field.up.bias is None) == ("gelu", False) else field(z)
        expected = expected + weight * field.scale * moved
    actual = model(z)
    near(actual, expected)
    rs.use(model, dict(reversed(mix.items())))
    assert torch.equal(model(z), actual)


@given(field_sets(), st.lists(st.integers(-1, 3), min_size=BATCH, max_size=BATCH), seeds)
@quick
def test_every_row_gets_its_own_field(fields, drawn, seed):
    model, z = steered(fields, seed), stream(seed)
    names = [name for name, _ in fields]
    rows = [None if index < 0 else names[index % len(names)] for index in drawn]
    rs.use(model, rows)
    actual = model(z)
    for place, name in enumerate(rows):
        with rs.use(model, name):
            near(actual[place], model(z)[place])
        if name is None:
            assert torch.equal(actual[place], 0.5 * z[place])


@given(field_sets(), seeds)
@quick
def test_none_zero_weights_and_rows_of_none_are_the_identity(fields, seed):
    model, z = steered(fields, seed), stream(seed)
    for mix in (None, {}, {"a": 0}, {"a": -0.0}, [None] * BATCH):
        rs.use(model, mix)
        assert torch.equal(model(z), 0.5 * z)


@pytest.mark.parametrize("shape", [(BATCH, WIDTH), (BATCH, 2, LENGTH, WIDTH), (BATCH, 0, WIDTH)])
def test_streams_of_any_rank_are_routed_by_their_first_dimension(shape):
    model, z = pair({"bias": False}), torch.randn(shape).double()
    rs.use(model, ["a", None, "b", "b"])
    for place, (name, row) in enumerate(zip(["a", None, "b", "b"], model(z), strict=True)):
        near(row, 0.5 * z[place] + (0 if name is None else fields_of(model)[name](z[place])))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_channels_first_streams_are_mixed_too(layout):
    model, last = pair({"activation": "tanh"}, channels=1), pair({"activation": "tanh"})
    z = torch.randn(BATCH, WIDTH, 2, 3).double().to(memory_format=layout)
    for mix in ({"a": 0.5, "b": -2.0}, ["a", "b", None, "b"]):
        rs.use(model, mix)
        rs.use(last, mix)
        actual = model(z)
        assert actual.stride() == z.stride()
        near(actual, last(z.movedim(1, -1)).movedim(-1, 1))


def test_gradients_reach_every_field_of_a_mix_and_only_through_its_rows():
    model, z = steered([("a", {"rank": 2}), ("b", {"rank": 3, "activation": "relu"}), ("c", {"rank": 1})], 0), stream(0)
    rs.use(model, ["a", "b", "b", "a"])
    for name in "abc":
        rs.thaw(model, name)
    (model(z) ** 2).sum().backward()
    routed = {name: [p.grad.clone() for p in rs.parameters(model, name)] for name in "ab"}
    assert all(p.grad is None for p in rs.parameters(model, "c"))
    for name, places in (("a", [0, 3]), ("b", [1, 2])):
        rs.use(model, name)
        model.zero_grad()
        (model(z[places]) ** 2).sum().backward()
        for actual, parameter in zip(routed[name], rs.parameters(model), strict=True):
            near(actual, parameter.grad)


def test_dropout_is_each_fields_own():
    model, z = steered([("a", {"rank": 6, "dropout": 0.9}), ("b", {"rank": 3})], 0), stream(0)
    rs.use(model, ["a", "b", "a", "b"])
    assert torch.equal(model(z), model(z))
    model.train()
    one, other = model(z), model(z)
    assert torch.equal(one[[1, 3]], other[[1, 3]])
    assert not torch.equal(one[0], other[0])


@torch.no_grad()
def test_one_field_on_takes_the_path_of_one_field():
    model, z = pair(), stream(0)
    rs.use(model, "a")
    expected = model(z)
    for mix in ({"a": 1.0}, {"a": 1, "b": 0}, {"a": numpy.float32(1)}, ["a"] * BATCH):
        rs.use(model, mix)
        assert torch.equal(model(z), expected)


def test_rows_that_a_model_flattens_stay_with_their_field():
    model, z = pair(), stream(0)
    rs.use(model, ["a", "b", None, "b"])
    flat, expected = z.repeat_interleave(3, 0), model(z).repeat_interleave(3, 0)

    def flatten(model, args):
        return (flat,)

    handle = model.register_forward_pre_hook(flatten)  # after the rows were checked, as inside a model
    near(model(z), expected)
    handle.remove()

    def generate():
        return model(flat)

    for call in (generate, lambda: model(flat), lambda: model[0](flat)):
        with pytest.raises(rs.SteerError, match=r"has 4 rows, and this batch has 12"):
            call()
    rs.use(model, ["b"])
    with rs.use(model, "b"):
        expected = model(z)
    near(model(z[:1])[0], expected[0])
    with pytest.raises(rs.SteerError, match=r"has 1 rows, and this batch has 4"):
        model(z)


@pytest.mark.parametrize("rows", [["a", "b", None], ["a"] * 3, [None] * 3, ["a", "b"] * 4])
@pytest.mark.parametrize("site", ["block", "input"])
def test_a_list_that_does_not_fit_the_batch_is_an_error_with_both_numbers(rows, site):
    model = pair(site=site)
    rs.use(model, rows)
    with pytest.raises(rs.SteerError, match=rf"has {len(rows)} rows, and this batch has 4\. Give"):
        model(stream(0))


@given(st.integers(1, 9), st.integers(0, 40))
def test_a_row_stands_for_a_whole_number_of_rows(rows, batch):
    if batch % rows == 0:
        assert row_factor(rows, batch) * rows == batch
    else:
        with pytest.raises(rs.SteerError, match=f"{rows} rows, and this batch has {batch}"):
            row_factor(rows, batch)


@pytest.mark.parametrize(
    ("mix", "message"),
    [
        ("e", r"names of fields of this model \(a, b\); received 'e'"),
        (["a", "e"], "received 'e'"),
        ({1: 1.0}, "received 1"),
        (["a", 1], "received 1"),
        ([], "an empty one"),
        (7, "received 7"),
        (b"a", "received b'a'"),
        ({"a", "b"}, "a list with a name or None for every row"),
        ({"a": math.nan}, "`a` is a finite number, .*; received nan"),
        ({"a": math.inf}, "received inf"),
        ({"a": True}, "received True"),
        ({"a": "1"}, "received '1'"),
        ({"a": None}, "received None"),
        ({"a": 1j}, "received 1j"),
    ],
)
def test_use_refuses_what_is_no_mix_and_keeps_what_was_selected(mix, message):
    model, z = pair(), stream(0)
    rs.use(model, {"a": 0.5})
    expected = model(z)
    with pytest.raises(rs.SteerError, match=message):
        rs.use(model, mix)
    assert rs.summary(model).acting == {"a": 0.5}
    assert torch.equal(model(z), expected)


@pytest.mark.parametrize(
    ("mix", "words"),
    [
        (None, "None"),
        ("a", "a"),
        ({"b": 0.5, "a": -1.0}, "{'a': -1.0, 'b': 0.5}"),
        ({}, "{}"),
        (["b", None, "b", "a"], "rows: 1 a, 2 b, 1 None"),
        ([None] * 4, "rows: 4 None"),
    ],
)
def test_a_mix_can_be_asked_for_again_and_says_what_it_is(mix, words):
    parsed = Mix.parse(mix, NAMES)
    assert Mix.parse(parsed.asked(), NAMES) == parsed
    assert parsed.asked() == mix
    assert str(parsed) == words


def test_a_mix_follows_casts_without_losing_its_weights():
    model, z = pair(), stream(0)
    rs.use(model, {"a": 1 / 3, "b": 0.1})
    expected = model(z)
    model.to(torch.bfloat16)
    assert model(z.bfloat16()).dtype == torch.bfloat16
    torch.testing.assert_close(model(z.bfloat16()).double(), expected, rtol=0.05, atol=0.2)
    tables = [block.steering_block.route.some.table for block in model.double()]
    assert torch.equal(tables[0], torch.tensor([[1 / 3, 0.1]], dtype=torch.float64))


def test_a_part_that_gets_no_row_at_all_is_left_alone():
    """As an expert to which no token was sent."""
    model = pair()
    for rows in (["a"], ["a", "b", None]):
        rs.use(model, rows)
        z = stream(0)[: len(rows)]
        part = model[0].register_forward_pre_hook(lambda _, args: (args[0][:0],))
        assert model(z).shape == (0, LENGTH, WIDTH)
        part.remove()
        with pytest.raises(rs.SteerError, match=f"has {len(rows)} rows, and this batch has 0"):
            model(stream(0)[:0])


def test_selections_nest_and_come_back_after_an_exception():
    model = pair()
    rs.use(model, {"a": 0.5, "b": 0.5})

    def fail():
        with rs.use(model, ["a", "b"]):
            assert rs.summary(model).acting == ["a", "b"]
            with rs.use(model, None):
                with rs.use(model, "b"):
                    assert rs.summary(model).acting == "b"
                assert rs.summary(model).acting is None
                raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert rs.summary(model).acting == {"a": 0.5, "b": 0.5}


def test_leaving_a_selection_does_not_bring_back_a_field_that_was_removed():
    model = pair()
    rs.use(model, {"a": 0.5, "b": 0.5})
    with rs.use(model, None):
        rs.unsteer(model, "a")
    assert rs.summary(model).acting is None
