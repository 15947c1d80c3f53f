"""What every diagnostic promises, whichever it is: no trace, the same for any cut of the data, a table and a figure."""

import copy
import dataclasses
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

import residual_steer as rs
from residual_steer import diagnostics as d
from residual_steer._controller import steering_of
from sharp import Broken, break_at, case_of, cut, rows_for, sharp, steered, traces


@dataclasses.dataclass(frozen=True)
class Row:
    """A diagnostic, on a model that suits it.

    Attributes:
        measure: the function.
        name: of the case.
        labels: which labels its data have.
        compares: whether it compares the model with its frozen self.
        once: whether it reads its loader once.
        options: more arguments.
    """

    measure: Callable[..., Any]
    name: str
    labels: str | None = None
    compares: bool = True
    once: bool = True
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    def build(self):
        case = case_of(self.name)
        model = sharp(case, 6)
        return case, steered(model), rows_for(case, model, labels=self.labels)

    def __call__(self, model, loader, **more):
        models = {"H-Res": model} if self.measure is d.displacement else model
        return self.measure(models, loader, **self.options, **more)

    def __str__(self):
        return f"{self.measure.__name__}-{self.name}"


ROWS = [
    *(Row(d.attention_entropy, name) for name in ("hf-vit", "timm-vit", "gpt2", "falcon", "deberta-v2", "jamba")),
    *(Row(d.stream_energy, name) for name in ("hf-clip", "timm-vit", "bert", "falcon")),
    *(Row(d.memory_length, name) for name in ("mamba", "mamba2", "mamba_ssm-1", "mamba_ssm-2", "jamba")),
    *(Row(d.drift, name) for name in ("gpt2", "mamba_ssm-1", "timm-resnet")),
    *(Row(d.plane, name) for name in ("gpt2", "timm-vit")),
    *(Row(d.displacement, name, options={"points": 12}) for name in ("gpt2", "timm-vit")),
    *(Row(d.landscape, name, "own", once=False, options={"size": 2}) for name in ("gpt2", "timm-vit")),
    *(Row(d.control_effort, name, compares=False) for name in ("gpt2", "mamba", "timm-resnet")),
    *(Row(d.neural_collapse, name, "class", False, False) for name in ("gpt2-classifier", "timm-vit")),
]
ONE_EACH = list({row.measure: row for row in reversed(ROWS)}.values())
every = pytest.mark.parametrize("row", ROWS, ids=str)
one_of_each = pytest.mark.parametrize("row", ONE_EACH, ids=str)


def same(a, b, rel=1e-4, at=""):
    """Compare two results, whatever they are made of; the sign of a direction is its own."""
    if dataclasses.is_dataclass(a):
        for one in dataclasses.fields(a):
            same(getattr(a, one.name), getattr(b, one.name), rel, f"{at}.{one.name}")
    elif torch.is_tensor(a):
        torch.testing.assert_close(a, b, rtol=rel, atol=1e-5, equal_nan=True, msg=lambda text: f"{at}: {text}")
    elif isinstance(a, tuple):
        assert len(a) == len(b), at
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            same(x, y, rel, f"{at}[{i}]")
    elif isinstance(a, float):
        assert a == pytest.approx(b, rel=rel, abs=1e-5), at
    else:
        assert a == b, at


def everything(model):
    """All that a diagnostic leaves alone."""
    mix, trains = steering_of(model)[1].mix, [p.requires_grad for p in model.parameters()]
    numpy = np.random.get_state()[1].tolist(), np.random.get_state()[2:]
    return traces(model), mix, trains, torch.get_rng_state().tolist(), numpy, random.getstate()


class Noisy:
    """A loader that draws from every generator, and may fail in the middle."""

    def __init__(self, batches, fails=False):
        self.batches, self.fails = batches, fails

    def __iter__(self):
        for batch in self.batches:
            torch.rand(1), np.random.rand(), random.random()
            yield batch
            if self.fails:
                raise Broken


@every
def test_it_leaves_no_trace_also_after_an_error(row):
    case, model, rows = row.build()
    last = case.modules(model, "block")[-1]
    loader = cut(rows, 6, 6)
    output = case.run(model)  # a first call, after which the points trust their hosts
    model.train()
    last.eval()
    before = everything(model)
    row(model, Noisy(loader))
    assert everything(model) == before
    with pytest.raises(Broken):
        row(model, Noisy(loader, fails=True))
    assert everything(model) == before
    handle = break_at(last)
    with pytest.raises(Broken):
        row(model, loader)
    handle.remove()
    assert everything(model) == before
    assert torch.equal(case.run(model.eval()), output)


@every
def test_batches_of_any_size_give_what_all_rows_at_once_give(row):
    _, model, rows = row.build()
    whole, parts = row(model, [rows]), cut(rows, 1, 7, 4)
    same(row(model, iter(parts) if row.once else parts), whole)


@pytest.mark.parametrize("row", [row for row in ROWS if row.compares], ids=str)
def test_the_frozen_model_is_the_same_one_switched_off_or_a_copy(row):
    case, model, rows = row.build()
    same(row(model, [rows], reference=sharp(case, 6)), row(model, [rows]))
    with pytest.raises(rs.SteerError, match="itself"):
        row(model, [rows], reference=model)
    rs.use(model, None)
    with pytest.raises(rs.SteerError, match="no field acts"):
        row(model, [rows])
    with pytest.raises(rs.SteerError, match="not steered"):
        row(rs.unsteer(model), [rows])


@pytest.mark.parametrize("row", [row for row in ROWS if row.name in {"gpt2", "bert", "mamba", "mamba2"}], ids=str)
def test_padding_counts_for_nothing(row):
    _, model, rows = row.build()
    other = {**rows, "input_ids": torch.where(rows["attention_mask"].bool(), rows["input_ids"], 11)}
    if row.measure is d.landscape:
        rows, other = (
            {**each, "labels": rows["labels"].masked_fill(rows["labels"] == 0, -100)} for each in (rows, other)
        )
    same(row(model, [other]), row(model, [rows]))


@every
def test_it_has_a_table_and_a_figure(row):
    _, model, rows = row.build()
    found = row(model, [rows])
    table, figure = found.table(), found.plot()
    assert table.rows
    assert all(each.keys() <= table.columns.keys() for each in table.rows)
    assert str(table).startswith(f"{table.title}\n")
    assert all(head in str(table) for head in table.columns.values())
    assert isinstance(figure, Figure)
    figure.canvas.draw()
    axes = Figure().subplots(1, 2)
    assert found.plot(ax=axes[1]) is axes[1].figure
    assert axes[1].has_data()
    assert not axes[0].has_data()
    with pytest.raises(rs.SteerError, match=r"`ax`.*received str"):
        found.plot(ax="axes")


@one_of_each
def test_bad_input_is_refused(row):
    _, model, rows = row.build()
    for loader, word in (([], "no batch"), (3, "received int"), ("text", "received str"), ([3], "a batch is")):
        with pytest.raises(rs.SteerError, match=word):
            row(model, loader)
    with pytest.raises(rs.SteerError, match=r"torch\.nn\.Module|not steered"):
        row("model", [rows])
    if not row.once:
        with pytest.raises(rs.SteerError, match="iterator"):
            row(model, iter([rows]))
    with torch.no_grad():
        next(parameter for parameter in model.parameters() if parameter.dim() > 1).fill_(torch.nan)
    with pytest.raises(rs.SteerError, match="NaN"):
        row(model, [rows])


@one_of_each
def test_what_is_compiled_is_looked_into(row):
    _, model, rows = row.build()
    expected = row(model, [rows])
    twin = copy.deepcopy(model)
    twin.compile(backend="eager")
    with torch.no_grad():
        twin(**rows) if isinstance(rows, dict) else twin(rows[0])
    same(row(twin, [rows]), expected)
    same(row(torch.compile(model, backend="eager"), [rows]), expected)
