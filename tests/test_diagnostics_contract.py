"""What every diagnostic promises, whichever it is: no trace, the same for any cut of the data, a table and a figure."""

import copy
import dataclasses
import doctest
import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from torch import nn

import residual_steer as rs
from residual_steer import diagnostics as d
from residual_steer._controller import steering_of
from residual_steer.diagnostics import _results
from sharp import Broken, alone, break_at, case_of, cut, method, padding_first, rows_for, sharp, steered, traces
from streams import Block, InPlace, Model


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
        return self.measure(models, loader, **{**self.options, **more})

    def __str__(self):
        return "-".join((self.measure.__name__, self.name, *map(str, self.options.values())))


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
ONE_EACH = {row.measure: row for row in reversed(ROWS)}
every = pytest.mark.parametrize("row", ROWS, ids=str)
# what is traced in the least time, of each
TRACED = {**ONE_EACH, **{row.measure: row for row in ROWS if row.name in {"timm-vit", "mamba_ssm-1"}}}
one_of_each = pytest.mark.parametrize("row", ONE_EACH.values(), ids=str)


def same(a, b, at="", rel=1e-4):
    """Compare two results, whatever they are made of; the sign of a direction is its own."""
    if dataclasses.is_dataclass(a):
        for one in dataclasses.fields(a):
            same(getattr(a, one.name), getattr(b, one.name), f"{at}.{one.name}", rel)
    elif torch.is_tensor(a):
        torch.testing.assert_close(a, b, rtol=rel, atol=1e-5, equal_nan=True, msg=lambda text: f"{at}: {text}")
    elif isinstance(a, tuple):
        assert len(a) == len(b), at
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            same(x, y, f"{at}[{i}]", rel)
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


TEXTS = [
    *(row for row in ROWS if row.name in {"gpt2", "bert", "mamba", "mamba2"}),
    *(Row(d.attention_entropy, "bert", options={"query": query}) for query in ("first", "last")),
    *(Row(d.displacement, "gpt2", options={"points": 10, "token": token}) for token in ("first", "last", "mean")),
]


def unlabelled(rows):
    """Let neither padding have a label, nor the first token, which follows padding where that stands on the left."""
    if "labels" in rows:
        rows["labels"].masked_fill_((rows["labels"] == 0) | (torch.arange(7) == 0), -100)


@pytest.mark.parametrize("row", TEXTS, ids=str)
def test_padding_counts_for_nothing(row):
    """Not what stands there, nor on which side, nor whether there is any at all."""
    _, model, rows = row.build()
    unlabelled(rows)
    expected = row(model, alone(rows))
    filled = {**rows, "input_ids": torch.where(rows["attention_mask"].bool(), rows["input_ids"], 11)}
    same(row(model, [filled]), expected)
    left = row(model, [padding_first(filled, positions=row.name in {"gpt2", "bert"})])
    if row.measure is d.attention_entropy:  # whose places in the batch are others
        left = dataclasses.replace(left, **{key: getattr(expected, key) for key in vars(left) if "position" in key})
    same(left, expected)


@pytest.mark.parametrize("row", [row for row in TEXTS if row.compares and row.name in {"gpt2", "mamba2"}], ids=str)
def test_a_prompt_behind_padding_is_left_out(row):
    case = case_of(row.name)
    frozen = sharp(case, 6)
    model, rows = method("prompt", frozen, length=3), rows_for(case, frozen, labels=row.labels)
    unlabelled(rows)
    expected = row(model, alone(rows), reference=frozen)
    left = row(model, [padding_first(rows, positions=row.name == "gpt2")], reference=frozen)
    if row.measure is d.attention_entropy:
        left = dataclasses.replace(left, **{key: getattr(expected, key) for key in vars(left) if "position" in key})
    same(left, expected)


def drawn(axes):
    """Return the heights of bars, the first components of arrows, or else the first line."""
    if axes.patches:
        return [bar.get_height() for bar in axes.patches]
    arrows = next((one.U.tolist() for one in axes.collections if hasattr(one, "U")), None)
    return axes.lines[0].get_ydata().tolist() if arrows is None else arrows


# A column of each table and what has to stand in it, and what has to be drawn.
SHOWN = {
    d.attention_entropy: ("adapted", lambda f: f.adapted.mean(1).tolist(), lambda f: f.frozen.mean(1).tolist()),
    d.stream_energy: ("adapted_spread", lambda f: f.adapted_spread.tolist(), lambda f: f.frozen.mean(1).tolist()),
    d.memory_length: (
        "adapted_middle", lambda f: f.adapted.quantile(0.5, 1).tolist(), lambda f: f.frozen.median(1).values.tolist()
    ),
    d.drift: ("task", lambda f: list(f.task), lambda f: list(f.task)),
    d.plane: ("deviation", lambda f: list(f.deviations), lambda f: [100 * share for share in f.explained]),
    d.displacement: ("plane_chance", lambda f: [f.fields[0].plane.chance], lambda f: list(f.fields[0].dx)),
    d.landscape: (
        "there", lambda f: [f.frozen.loss_there, f.adapted.loss_there, f.lowest[2]], lambda f: list(f.frozen.y)
    ),
    d.control_effort: (
        "share", lambda f: [100 * one.share for one in f.layers], lambda f: [one.effort for one in f.layers]
    ),
    d.neural_collapse: ("value", *[lambda f: list(dataclasses.astuple(f)[:9])] * 2),
}  # fmt: skip


@every
def test_it_has_a_table_and_a_figure(row):
    _, model, rows = row.build()
    found = row(model, [rows])
    table, figure = found.table(), found.plot()
    key, values, lines = SHOWN[row.measure]
    assert [each[key] for each in table.rows] == values(found)
    assert all(each.keys() == table.columns.keys() for each in table.rows)
    assert str(table).startswith(f"{table.title}\n")
    assert all(head in str(table) for head in table.columns.values())
    assert all(f"\n- {note}" in str(table) for note in table.notes)
    assert isinstance(figure, Figure)
    assert drawn(figure.axes[0]) == pytest.approx(lines(found))
    figure.canvas.draw()
    axes = Figure().subplots(1, 2)
    assert found.plot(ax=axes[1]) is axes[1].figure
    assert axes[1].has_data()
    assert not axes[0].has_data()
    with pytest.raises(rs.SteerError, match=r"`ax`.*received str"):
        found.plot(ax="axes")


def test_a_table_prints_as_its_example_does():
    done = doctest.testmod(_results)
    assert done.attempted > 0
    assert done.failed == 0


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


@pytest.mark.parametrize(
    ("measure", "options", "match"),
    [
        (d.attention_entropy, {"query": "cls"}, "auto, first, last, all; received 'cls'"),
        (d.stream_energy, {"beta": 0}, "`beta` is a number above 0"),
        (d.stream_energy, {"beta": "1"}, "received '1'"),
        (d.plane, {"layer": 2}, "from -2 to 1, .*received 2"),
        (d.plane, {"layer": True}, "received True"),
        (d.displacement, {"layer": -3}, "received -3"),
        (d.displacement, {"token": "cls"}, "each, first, last, mean; received 'cls'"),
        (d.displacement, {"points": 9}, "at least 10; received 9"),
        (d.landscape, {"size": 1}, "at least 2; received 1"),
        (d.landscape, {"span": 0}, "standard deviations; received 0"),
        (d.landscape, {"span": math.inf}, "received inf"),
        (d.landscape, {"loss": lambda model, batch: model(**batch).logits.sum() / 0}, "over the plane has .* NaN"),
        (d.control_effort, {"name": "law"}, "received 'law'"),
        *((d.neural_collapse, {"head": head}, r"nn.Linear, such as \['score'\]; received") for head in ("no", 3, "")),
    ],
)  # fmt: skip
def test_bad_options_are_refused(measure, options, match):
    _, model, rows = ONE_EACH[measure].build()
    before = traces(model)
    with pytest.raises(rs.SteerError, match=match):
        ONE_EACH[measure](model, [rows], **options)
    assert traces(model) == before


@pytest.mark.parametrize(
    "row", [Row(d.attention_entropy, "bert"), Row(d.stream_energy, "bert"), Row(d.memory_length, "mamba")], ids=str
)
def test_padding_alone_is_refused(row):
    _, model, rows = row.build()
    with pytest.raises(rs.SteerError, match="every one is padding"):
        row(model, [{**rows, "attention_mask": torch.zeros_like(rows["attention_mask"])}])


LOOKS = [(d.attention_entropy, "hf-vit"), (d.attention_entropy, "timm-vit"), (d.attention_entropy, "gpt2"),
         (d.memory_length, "mamba")]  # fmt: skip


@pytest.mark.parametrize(("layers", "site", "untouched"), [([0], "block", 1), ([1], "block", 2), ([0], "input", 0)])
@pytest.mark.parametrize(("measure", "name"), LOOKS)
def test_lemma_2_holds_up_to_the_first_steered_block(measure, name, layers, site, untouched):
    case = case_of(name)
    model = steered(sharp(case), layers=layers, site=site)
    found = measure(model, [case.inputs(model)])
    assert found.untouched == untouched
    assert found.equal == tuple(layer < untouched for layer in range(2))
    assert [row["equal"] for row in found.table().rows] == ["yes" if equal else "no" for equal in found.equal]
    assert f"first {untouched} of 2" in found.table().notes[-1]
    unchanged = 0 if measure is d.attention_entropy else 1
    assert (found.change[:untouched] == unchanged).all()
    assert (found.adapted[untouched:] != found.frozen[untouched:]).any(1).all()


@pytest.mark.parametrize(("measure", "name"), LOOKS[2:])
@torch.no_grad()
def test_layers_are_equal_only_if_they_are_in_every_batch(measure, name):
    frozen = sharp(case_of(name))
    model = copy.deepcopy(frozen)
    model.get_input_embeddings().weight[9] += 1
    with_it, without = torch.tensor([[9, 4, 5]]), torch.tensor([[4, 5, 6]])
    assert measure(model, [without], reference=frozen).untouched == 2
    for loader in ([with_it, without], [without, with_it]):
        assert measure(model, loader, reference=frozen).equal == (False, False)


class Skipped(Model):
    def forward(self, ids):
        return self.head(self.body[0](self.embedding(ids)))


@pytest.mark.parametrize(
    ("measure", "match"), [(d.drift, "without calling block 1"), (d.control_effort, r"1 \(block\), 2 \(block\)")]
)
def test_blocks_that_are_not_called_or_work_in_place(measure, match):
    ids, models = torch.randint(4, (2, 3)), (Skipped(), Model(InPlace), Model(Block))
    skipped, inplace, plain = models
    for block in plain.body:
        block.norm = nn.Identity()
    plain.load_state_dict({key: value for key, value in inplace.state_dict().items() if "norm" not in key})
    for model in models:
        torch.manual_seed(0)
        steered(model, arch=rs.Backbone(blocks=model.body, width=8, inplace=model is inplace))
    same(measure(inplace, [ids]), measure(plain, [ids]))
    with pytest.raises(rs.SteerError, match=match):
        measure(skipped, [ids])


@pytest.mark.parametrize("measure", [d.drift, d.control_effort, d.plane])
def test_the_mask_of_an_encoder_does_not_hide_tokens_of_its_decoder(measure):
    model, ids = steered(case_of("t5").build()), torch.randint(3, 50, (1, 4))
    mask = torch.tensor([[1, 0, 0, 0]])
    found = measure(model, [{"input_ids": ids, "attention_mask": mask, "decoder_input_ids": ids, "use_cache": False}])
    tokens = [one.tokens for one in found.layers] if measure is d.control_effort else found.tokens
    assert set([tokens] if isinstance(tokens, int) else tokens) == {4}


@pytest.mark.parametrize("row", TRACED.values(), ids=str)
def test_what_is_compiled_is_looked_into(row):
    _, model, rows = row.build()
    expected = row(model, [rows])
    twin = copy.deepcopy(model)
    twin.compile(backend="eager")
    with torch.no_grad():
        twin(**rows) if isinstance(rows, dict) else twin(rows[0])
    same(row(twin, [rows]), expected)
    same(row(torch.compile(model, backend="eager"), [rows]), expected)
