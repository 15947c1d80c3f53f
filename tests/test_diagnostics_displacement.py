"""The plane of the stream and displacement fields: fields whose numbers are known, and what dense algebra gives."""

import math

import pytest
import torch

from cases import randomise
from fields import shake, vit
from planes import CENTRE, SCALES, WIDTH, Toy, data, register, same, states, toy
from residual_steer import SteerError, steer, use
from residual_steer.diagnostics import displacement, drift, landscape, plane
from residual_steer.diagnostics.displacement import NEIGHBOURS
from sharp import case_of, cut, method, rows_for


@pytest.fixture(autouse=True)
def _toy():
    register()


def fields(functions, loader, **more):
    return displacement(
        {name: toy(f).double() for name, f in functions.items()}, loader, reference=Toy(same).double(), **more
    )


def one_of(function, loader, **more):
    return fields({"one": function}, loader, **more).fields[0]


def test_the_plane_is_that_of_a_dense_decomposition():
    loader = data()
    found = plane(toy(same).double(), loader, reference=Toy(same).double())
    x = states(loader)
    _, values, directions = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    torch.testing.assert_close(found.mean, x.mean(0))
    assert found.deviations == pytest.approx((values[:2] / math.sqrt(len(x))).tolist(), rel=1e-9)
    assert found.explained == pytest.approx((values[:2] ** 2 / (values**2).sum()).tolist(), rel=1e-9)
    torch.testing.assert_close((found.directions @ directions[:2].T).abs(), torch.eye(2).double())
    assert all(row[row.abs().argmax()] > 0 for row in found.directions)
    torch.testing.assert_close(found.project(x), (x - x.mean(0)) @ found.directions.T)
    assert found.tokens == 300
    again = plane(toy(same).double(), loader[::-1], reference=Toy(same).double())
    torch.testing.assert_close(again.directions, found.directions)
    assert [row["direction"] for row in found.table().rows] == [1, 2]
    assert found.table().notes[0].startswith("Of 300 states")


def test_the_plane_is_of_the_frozen_states():
    case = case_of("gpt2")
    model = randomise(steer(case.build(), rank=2))
    batch = rows_for(case, model, labels=None)
    found = plane(model, [batch], layer=0)
    with use(model, None), torch.no_grad():
        z = model(**batch, output_hidden_states=True).hidden_states[1][batch["attention_mask"].bool()].double()
    torch.testing.assert_close(found.mean, z.mean(0), rtol=1e-6, atol=1e-6)
    assert found.tokens == len(z) < 12 * 7
    assert plane(model, [batch], layer=-2).layer == 0


def pull(z):
    return -0.3 * (z - CENTRE)


TURN = torch.zeros(WIDTH, WIDTH).double()
TURN[0, 1], TURN[1, 0] = 0.5, -0.5


def test_fields_whose_measures_are_known():
    one = one_of(pull, data(), points=200)
    for measures in (one.stream, one.plane):
        assert measures.divergence == pytest.approx(-0.3)
        assert measures.contraction == pytest.approx(0.7)
        assert measures.coherence > 0.5 + measures.chance
    one = one_of(pull, [x for x, _ in data()])  # without classes, of pairs
    assert (one.stream.contraction, one.plane.contraction) == pytest.approx((0.7, 0.7))
    one = one_of(torch.ones_like, data())
    for measures in (one.stream, one.plane):
        assert (measures.coherence, measures.chance, measures.contraction) == pytest.approx((1, 1, 1))
        assert measures.divergence == pytest.approx(0, abs=1e-9)
    one = one_of(lambda z: 5 * torch.randn_like(z), data(rows=100), points=400)
    for measures in (one.stream, one.plane):
        assert abs(measures.coherence) < 0.1
        assert abs(measures.chance) < 0.05
        assert measures.contraction > 1.2
    one = one_of(lambda z: z @ TURN, data(), points=150)
    assert one.stream.divergence == pytest.approx(0, abs=1e-9)
    assert one.stream.coherence > 0.5


def test_divergence_is_that_of_the_least_squares_fit():
    loader = data()
    x = states(loader)
    found = fields({"bent": lambda z: torch.sin(z) * z - 0.2 * z.roll(1, -1)}, loader)
    shift = torch.sin(x) * x - 0.2 * x.roll(1, -1)
    one = found.fields[0]
    jacobian = torch.linalg.lstsq(x - x.mean(0), shift - shift.mean(0)).solution.T
    assert one.stream.divergence == pytest.approx(float(jacobian.trace()) / WIDTH, rel=1e-8)
    flat, image = found.plane.project(x), shift @ found.plane.directions.T
    inside = torch.linalg.lstsq(flat, image - image.mean(0)).solution.T
    assert one.plane.divergence == pytest.approx(float(inside.trace()) / 2, rel=1e-8)
    assert one.size == pytest.approx(float((shift.norm(dim=1) / x.norm(dim=1)).mean()))
    assert one.seen == pytest.approx(float((image**2).sum() / (shift**2).sum()))


def nearest_cosines(start, shift):
    """Coherence and chance, point by point."""
    unit = [row / row.norm() for row in shift]
    near, every = [], []
    for i in range(len(start)):
        others = sorted((j for j in range(len(start)) if j != i), key=lambda j: float((start[j] - start[i]).norm()))
        near += [float(unit[i] @ unit[j]) for j in others[:NEIGHBOURS]]
        every += [float(unit[i] @ unit[j]) for j in others]
    return sum(near) / len(near), sum(every) / len(every)


def test_coherence_and_contraction_by_brute_force():
    loader = data(rows=10, tokens=4, batch=5)
    found = fields({"bent": lambda z: torch.sin(z) + 0.3}, loader, points=40)
    x, one = states(loader), found.fields[0]
    shift, labels = torch.sin(x) + 0.3, torch.cat([y for _, y in loader]).repeat_interleave(4)
    flat, image = found.plane.project(x), shift @ found.plane.directions.T
    for measures, before, moved in ((one.stream, x, shift), (one.plane, flat, image)):
        assert (measures.coherence, measures.chance) == pytest.approx(nearest_cosines(before, moved))
        spread = [
            sum(float(((z[labels == c] - z[labels == c].mean(0)) ** 2).sum()) for c in range(3))
            for z in (before, before + moved)
        ]
        assert measures.contraction == pytest.approx(math.sqrt(spread[1] / spread[0]))
    order = [
        next(i for i in range(40) if flat[i].tolist() == pytest.approx(point))
        for point in zip(found.x, found.y, strict=True)
    ]
    assert sorted(order) == list(range(40))
    assert found.groups == tuple(str(int(labels[i])) for i in order)
    assert found.groups == tuple(sorted(found.groups))
    assert one.dx == pytest.approx(image[order, 0].tolist())
    assert one.dy == pytest.approx(image[order, 1].tolist())


def test_the_same_points_are_drawn_however_batches_are_cut():
    x = torch.randn(30, 5, WIDTH).double() * SCALES
    one, other, seed = (
        fields({"bent": torch.sin}, iter(x.split(rows)), points=50, seed=seed)
        for rows, seed in ((30, 0), (7, 0), (30, 1))
    )
    assert len(one.x) == 50
    assert other.x == pytest.approx(one.x, rel=1e-6)
    for name in ("coherence", "divergence"):
        assert getattr(other.fields[0].stream, name) == pytest.approx(getattr(one.fields[0].stream, name), rel=1e-6)
    assert seed.x != one.x
    some = [(x[:10], torch.zeros(10).long()), x[10:]]
    for loader in (some, some[::-1]):
        assert fields({"bent": torch.sin}, loader, points=50).groups == (), "classes of a part of the states"


def test_what_is_not_defined_is_none():
    one = one_of(torch.zeros_like, data())
    assert (one.stream.coherence, one.stream.chance, one.seen, one.size) == (None, None, None, 0.0)
    assert one.stream.contraction == 1.0
    few = one_of(lambda z: -z, [torch.randn(5, 1, WIDTH).double()])
    assert few.stream.divergence is None  # five states: any field on them is linear
    assert few.stream.coherence is None
    assert few.plane.divergence == pytest.approx(-1)


PICK = {
    "each": (lambda row: row, "one for every token;"),
    "first": (lambda row: row[:1], "the first token of every row;"),
    "last": (lambda row: row[-1:], "the last token of every row;"),
    "mean": (lambda row: row.mean(0, keepdim=True), "the mean of the tokens of every row;"),
}


@pytest.mark.parametrize("token", PICK)
@torch.no_grad()
def test_which_states_of_a_row_count(token):
    case, (pick, words) = case_of("gpt2"), PICK[token]
    model = randomise(steer(case.build(), rank=2))
    batch, seen = rows_for(case, model, labels=None), []
    batch["attention_mask"][4:8, :2] = 0
    found = displacement({"H-Res": model}, [batch], layer=0, token=token, points=100)
    for wanted in (None, "default"):
        with use(model, wanted):
            z = model(**batch, output_hidden_states=True).hidden_states[1].double()
        seen.append(torch.cat([pick(row[on]) for row, on in zip(z, batch["attention_mask"].bool(), strict=True)]))
    frozen, adapted = seen
    assert found.states == len(frozen)
    torch.testing.assert_close(found.plane.mean, frozen.mean(0), rtol=1e-5, atol=1e-6)
    size = float(((adapted - frozen).norm(dim=1) / frozen.norm(dim=1)).mean())
    assert found.fields[0].size == pytest.approx(size, rel=1e-4)
    assert (found.groups, found.token) == ((), token)
    assert f"states behind block 0, {words}" in found.table().notes[0]


@pytest.mark.parametrize("name", ["timm-vit", "timm-resnet", "mamba"])
def test_methods_side_by_side(name):
    case = case_of(name)
    one = randomise(steer(case.build(), rank=2))
    if name == "timm-resnet":
        other = randomise(steer(case.build(), rank=4), 0.1)
    else:
        other = method("lora", case.build(), rank=2)
    batches = cut(rows_for(case, one, labels=None), 6, 6)
    found = displacement({"H-Res": one, "LoRA": other}, batches, reference=case.build(), points=12)
    alone = displacement({"H-Res": one}, batches, points=12)
    assert alone.fields[0].dx == pytest.approx(found.fields[0].dx, rel=1e-3, abs=1e-5)
    assert found.fields[1].size > 0.001
    assert found.fields[0].stream.coherence != pytest.approx(found.fields[1].stream.coherence)
    table = found.table()
    assert [row["method"] for row in table.rows] == ["H-Res", "LoRA"]
    assert table.rows[1]["plane_chance"] == found.fields[1].plane.chance
    assert [axes.get_title().partition(":")[0] for axes in found.plot().axes] == ["H-Res", "LoRA"]
    (axes,) = found.plot("LoRA").axes
    assert axes.collections[0].U.tolist() == list(found.fields[1].dx)


def test_tokens_of_a_method_have_no_displacement():
    case = case_of("timm-vit")
    frozen = case.build()
    model = method("vpt-shallow", frozen, length=3)
    x, y = torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 2, 0])
    moved = drift(model, [x], reference=frozen).task
    for layer in (0, 1):
        found = displacement({"VPT": model}, [(x, y)], reference=frozen, layer=layer)
        assert found.fields[0].size == pytest.approx(moved[layer])
        assert found.states == 20
    found = landscape(model, [(x, y)], layer=0, reference=frozen, size=2, together=True)
    assert found.adapted.loss_there == pytest.approx(found.adapted.loss)


def test_a_plot_has_room_for_four():
    found = fields({str(k): torch.sin for k in range(5)}, data())
    for methods, match in (((), "one to four of 0, 1, 2, 3, 4; received all"), (("7",), "received 7")):
        with pytest.raises(SteerError, match=match):
            found.plot(*methods)
    figure = found.plot("0", "4")
    assert len(figure.axes) == 2
    with pytest.raises(SteerError, match="room for one panel, and there are 2"):
        found.plot("0", "4", ax=figure.axes[0])
    colours = dict(zip(found.groups, figure.axes[0].collections[0].get_array().tolist(), strict=True))
    assert len(set(colours.values())) == len(colours) == 3


LOADER = [(torch.randn(9, 1, 8, 8), torch.arange(9) % 5)]


@pytest.mark.parametrize(
    ("models", "match"),
    [
        (lambda model: {}, "one adapted model or more"),
        (lambda model: model, "received VisionTransformer"),
        (lambda model: {"a": model, "b": vit(width=16)}, "one backbone"),
    ],
)
def test_bad_models_are_refused(models, match):
    with pytest.raises(SteerError, match=match):
        displacement(models(shake(steer(vit(), rank=4))), LOADER)


def test_states_that_do_not_vary_are_refused():
    model = shake(steer(vit(), rank=4))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    with pytest.raises(SteerError, match="vary in two directions"):
        plane(model, LOADER, layer=0)
