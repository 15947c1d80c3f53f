"""Fields that meet their own rows alone: as each row by itself, in one graph, and whatever else stands in the model."""

import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter

import residual_steer as rs
from residual_steer import _row_by_row, injector, routing
from residual_steer.routing import SIDE_BY_SIDE
from test_mix import BATCH, LENGTH, WIDTH, field_sets, fields_of, near, pair, quick, seeds, steered, stream


@pytest.fixture
def apart(monkeypatch):
    """Every batch is computed row by row, however small it is."""
    monkeypatch.setattr(_row_by_row, "_PRODUCT", -1)


@pytest.fixture(params=["_in_place", "_gathered", "_one_by_one"])
def way(request, apart, monkeypatch):
    """One of the ways in which rows meet their own field, which counts how often it was gone."""
    real, calls = getattr(_row_by_row, request.param), []

    def go(y, z, runs, units, fields, dtype):
        calls.append(request.param)
        given = fields if request.param == "_one_by_one" else _row_by_row._alike(runs, fields)
        return real(y, z, runs, units, given, *([] if request.param == "_in_place" else [dtype]))

    for module in (injector, routing):
        monkeypatch.setattr(module, "add_runs", go)
    return calls


ROWS = [["a", "b", None, "b"], [None, "a", "a", "b"], ["b", None, None, None], ["a", "b", "a", None]]


@pytest.mark.parametrize("rows", ROWS, ids=str)
@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_rows_are_as_each_by_itself_in_every_way(way, rows, bias):
    model, z = steered([("a", {"rank": 2, "scale": -0.7}), ("b", {"rank": 2})], 0, bias=bias), stream(0)
    alone = {}
    for name in ("a", "b", None):
        rs.use(model, name)
        alone[name] = model(z)
    rs.use(model, rows)
    mixed, doubled = model(z), model[0](z.repeat_interleave(1, 0))
    assert len(way) == 2
    near(doubled, mixed)
    for place, name in enumerate(rows):
        near(mixed[place], alone[name][place])
        if name is None:
            assert torch.equal(mixed[place], 0.5 * z[place])


@pytest.mark.usefixtures("apart")
@pytest.mark.parametrize("channels", [-1, 1])
@given(field_sets(), st.lists(st.integers(-1, 3), min_size=BATCH, max_size=BATCH), seeds, st.booleans(), st.booleans())
@quick
def test_any_fields_meet_their_own_rows(channels, fields, drawn, seed, grad, flat):
    model, z = steered(fields, seed, channels=channels), stream(seed)
    z = z.movedim(-1, 1) if channels == 1 else z[:, 0] if flat else z
    names = [name for name, _ in fields]
    rows = [None if index < 0 else names[index % len(names)] for index in drawn]
    rs.use(model, rows)
    with torch.set_grad_enabled(grad):
        actual = model(z)
    for place, name in enumerate(rows):
        with rs.use(model, name):
            near(actual[place], model(z)[place])


@pytest.mark.usefixtures("apart")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@torch.no_grad()
def test_a_stream_of_another_type_keeps_it(dtype):
    model, z = pair().to(dtype), stream(0)
    rs.use(model, ["a", "b", None, "b"])
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
        actual = model(z.float())
        assert actual.dtype == torch.float32
        for place, name in enumerate(["a", "b", None, "b"]):
            rs.use(model, name)
            torch.testing.assert_close(actual[place], model(z.float())[place], rtol=0.02, atol=0.02)


@pytest.mark.parametrize("way", ["_gathered", "_one_by_one"], indirect=True)
def test_gradients_reach_each_field_from_its_own_rows_alone(way):
    model, z = pair({"rank": 2}), stream(0)
    rows = ["b", "a", "a", None]

    def gradients(mix, places):
        rs.use(model, mix)
        for name in "ab":
            rs.thaw(model, name)
        model.zero_grad()
        (model(z)[places] ** 2).sum().backward()
        return {name: [p.grad for p in rs.parameters(model, name)] for name in "ab"}

    mixed = gradients(rows, slice(None))
    assert len(way) == 1
    for name, places in (("a", [1, 2]), ("b", [0])):
        for actual, expected in zip(mixed[name], gradients({name: 1.0}, places)[name], strict=True):
            near(actual, expected)


@pytest.mark.usefixtures("apart")
@torch.no_grad()
def test_a_field_that_is_broken_spoils_its_own_rows_alone():
    model, z = pair(), stream(0)
    rs.use(model, ["a", "b", None, "b"])
    fields_of(model)["b"].up.weight.fill_(torch.nan)
    finite = model(z).isfinite().flatten(1).all(1)
    assert finite.tolist() == [True, False, True, False]


@pytest.mark.usefixtures("apart")
@torch.no_grad()
def test_weights_are_read_when_they_are_used():
    model, z = pair(), stream(0)
    rs.use(model, ["a", "b", None, "b"])
    before = model(z)
    fields_of(model)["a"].up.weight.data.mul_(2)
    assert not torch.equal(model(z)[0], before[0])


@torch.no_grad()
def test_what_is_less_work_is_done(monkeypatch):
    """Side by side where there is little to multiply, row by row where there is much."""
    done = []
    real = _row_by_row._in_place
    monkeypatch.setattr(_row_by_row, "_in_place", lambda *given: done.append(len(given[2])) or real(*given))
    model = pair({"rank": 2})
    for length, expected in ((LENGTH, []), (2**15, [3])):
        rs.use(model, ["a", "b", None, "b"])
        model(torch.ones(BATCH, length, WIDTH, dtype=torch.float64))
        assert done == expected


def many():
    """Return a model with more fields than a compiled graph has in it, and a stream of two rows."""
    torch._dynamo.reset()
    return steered([(f"f{index}", {"rank": 2}) for index in range(SIDE_BY_SIDE + 2)], 0), stream(0)[:2]


@torch.no_grad()
def test_many_fields_are_one_graph_whatever_is_selected():
    model, z = many()
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    mixes = [["f0", "f1"], ["f17", None], [None, None], ["f3", "f3"], {"f4": 0.5, "f5": -1.0}, {}]
    for mix in mixes:
        rs.use(model, mix)
        assert torch.equal(compiled(z), model(z))
    assert counter.frame_count == 1
    rs.use(model, ["f0", "f1"])
    before = compiled(z)
    for parameter in rs.parameters(model, "f0"):
        parameter.data.mul_(2)
    after = compiled(z)
    assert not torch.equal(after[0], before[0])
    assert torch.equal(after[1], before[1])


@torch.no_grad()
def test_a_copy_of_many_fields_computes_with_its_own():
    model, z = many()
    rs.use(model, ["f0", "f1"])
    expected = torch.compile(model, fullgraph=True, backend="eager")(z)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for parameter in rs.parameters(other, "f0"):
            parameter.mul_(3)
        torch._dynamo.reset()
        actual = torch.compile(other, fullgraph=True, backend="eager")(z)
        assert torch.equal(actual, other(z))
        assert torch.equal(actual[1], expected[1])
        assert not torch.equal(actual[0], expected[0])


@torch.no_grad()
def test_a_program_of_many_fields_has_those_that_act_in_it():
    model, z = many()
    rs.use(model, ["f0", "f1"])
    expected = model(z)
    program = torch.export.export(model, (z,), strict=False)
    assert "residual_steer" not in str(program.graph)
    rs.use(model, None)
    torch.testing.assert_close(program.module()(z), expected, rtol=0, atol=1e-9)


def test_compiled_rows_of_many_fields_train():
    model, z = many()
    rs.use(model, ["f0", "f1"])
    rs.thaw(model, "f1")

    def gradients(call):
        model.zero_grad()
        (call(z) ** 2).sum().backward()
        return [p.grad.clone() for p in rs.parameters(model, "f1")]

    for actual, expected in zip(
        gradients(torch.compile(model, fullgraph=True, backend="aot_eager")), gradients(model), strict=True
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
