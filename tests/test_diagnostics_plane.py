"""The plane of the stream and displacement fields: fields whose numbers are known, and what dense algebra gives."""

import math

import pytest
import torch
from torch import nn

from cases import randomise
from fields import shake, vit
from planes import CENTRE, SCALES, WIDTH, Toy, case_of, data, register, same, states, toy
from residual_steer import SteerError, baselines, steer, use
from residual_steer.diagnostics.displacement import NEIGHBOURS, displacement
from residual_steer.diagnostics.drift import drift
from residual_steer.diagnostics.landscape import landscape, plane


@pytest.fixture(autouse=True)
def _toy():
    register()


def fields(functions, loader, **more):
    return displacement(
        {name: toy(f).double() for name, f in functions.items()}, loader, reference=Toy(same).double(), **more
    )


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
    assert found.table().rows[1]["direction"] == 2
    bars = [bar.get_height() for bar in found.plot().axes[0].patches]
    assert bars == pytest.approx([100 * share for share in found.explained])
    assert found.table().notes[0].startswith("Of 300 states")


def test_the_plane_is_of_the_frozen_states_and_leaves_out_padding():
    case = case_of("gpt2")
    model = randomise(steer(case.build(), rank=2))
    ids = torch.randint(3, 50, (6, 7))
    mask = torch.ones_like(ids)
    mask[3:, 4:] = 0
    batch = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    found = plane(model, [batch], layer=0)
    with use(model, None), torch.no_grad():
        z = model(**batch, output_hidden_states=True).hidden_states[1][mask.bool()].double()
    torch.testing.assert_close(found.mean, z.mean(0), rtol=1e-6, atol=1e-6)
    assert found.tokens == 33
    assert plane(model, [batch], layer=-2).layer == 0


def test_a_field_that_contracts():
    loader = data()
    one = fields({"pull": lambda z: -0.3 * (z - CENTRE)}, loader, points=200).fields[0]
    for measures in (one.stream, one.plane):
        assert measures.divergence == pytest.approx(-0.3)
        assert measures.contraction == pytest.approx(0.7)
        assert measures.coherence > 0.5 + measures.chance
    pairwise = fields({"pull": lambda z: -0.3 * (z - CENTRE)}, [x for x, _ in loader]).fields[0]
    assert pairwise.stream.contraction == pytest.approx(0.7)
    assert pairwise.plane.contraction == pytest.approx(0.7)


def test_a_field_that_shifts_all_states_alike():
    one = fields({"shift": lambda z: torch.ones_like(z)}, data()).fields[0]
    for measures in (one.stream, one.plane):
        assert (measures.coherence, measures.chance, measures.contraction) == pytest.approx((1, 1, 1))
        assert measures.divergence == pytest.approx(0, abs=1e-9)


def test_a_field_without_order():
    one = fields({"noise": lambda z: 5 * torch.randn_like(z)}, data(rows=100), points=400).fields[0]
    for measures in (one.stream, one.plane):
        assert abs(measures.coherence) < 0.1
        assert abs(measures.chance) < 0.05
        assert measures.contraction > 1.2


def test_a_turn_has_no_divergence():
    turn = torch.zeros(WIDTH, WIDTH).double()
    turn[0, 1], turn[1, 0] = 0.5, -0.5
    one = fields({"turn": lambda z: z @ turn}, data(), points=150).fields[0]
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
    x = states(loader)
    labels = torch.cat([y for _, y in loader]).repeat_interleave(4)
    one = found.fields[0]
    assert (one.stream.coherence, one.stream.chance) == pytest.approx(nearest_cosines(x, torch.sin(x) + 0.3))
    flat, image = found.plane.project(x), (torch.sin(x) + 0.3) @ found.plane.directions.T
    assert (one.plane.coherence, one.plane.chance) == pytest.approx(nearest_cosines(flat, image))
    for measures, before, after in ((one.stream, x, x + torch.sin(x) + 0.3), (one.plane, flat, flat + image)):
        spread = [
            sum(float(((z[labels == c] - z[labels == c].mean(0)) ** 2).sum()) for c in range(3))
            for z in (before, after)
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
    assert other.fields[0].stream.coherence == pytest.approx(one.fields[0].stream.coherence, rel=1e-6)
    assert other.fields[0].stream.divergence == pytest.approx(one.fields[0].stream.divergence, rel=1e-6)
    assert seed.x != one.x


def test_what_cannot_be_said_is_none():
    one = fields({"still": torch.zeros_like}, data()).fields[0]
    assert (one.stream.coherence, one.stream.chance, one.seen, one.size) == (None, None, None, 0.0)
    assert one.stream.contraction == 1.0
    few = fields({"pull": lambda z: -z}, [torch.randn(5, 1, WIDTH).double()]).fields[0]
    assert few.stream.divergence is None  # five states: any field on them is linear
    assert few.stream.coherence is None
    assert few.plane.divergence == pytest.approx(-1)


@pytest.mark.parametrize("token", ["each", "first", "last", "mean"])
@torch.no_grad()
def test_which_states_of_a_row_count(token):
    case = case_of("gpt2")
    model = randomise(steer(case.build(), rank=2))
    ids = torch.randint(3, 50, (12, 7))
    mask = torch.ones_like(ids)
    mask[4:8, :2] = 0
    mask[8:, 5:] = 0
    batch = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    found = displacement({"H-Res": model}, [batch], layer=0, token=token, points=100)
    seen = []
    for asked in (None, "default"):
        with use(model, asked):
            seen.append(model(**batch, output_hidden_states=True).hidden_states[1].double())
    kept = mask.bool()
    pick = {
        "each": lambda z: z[kept],
        "first": lambda z: torch.stack([row[on][0] for row, on in zip(z, kept, strict=True)]),
        "last": lambda z: torch.stack([row[on][-1] for row, on in zip(z, kept, strict=True)]),
        "mean": lambda z: torch.stack([row[on].mean(0) for row, on in zip(z, kept, strict=True)]),
    }[token]
    frozen, adapted = map(pick, seen)
    assert found.states == len(frozen)
    torch.testing.assert_close(found.plane.mean, frozen.mean(0), rtol=1e-5, atol=1e-6)
    size = float(((adapted - frozen).norm(dim=1) / frozen.norm(dim=1)).mean())
    assert found.fields[0].size == pytest.approx(size, rel=1e-4)
    assert found.groups == ()
    assert found.token == token
    said = {"each": "one for every token;", "mean": "the mean of the tokens of every row;"}
    wanted = said.get(token, f"the {token} token of every row;")
    assert f"states behind block 0, {wanted}" in found.table().notes[0]


@pytest.mark.parametrize("name", ["timm-vit", "timm-resnet", "mamba"])
def test_methods_side_by_side(name):
    case = case_of(name)
    one = randomise(steer(case.build(), rank=2))
    lora = (
        baselines.apply(case.build(), "lora", rank=2)
        if name != "timm-resnet"
        else randomise(steer(case.build(), rank=4), 0.1)
    )
    for parameter in lora.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    key, values = next(iter(case.inputs(one).items()))
    values = torch.cat([values, values.flip(1) if values.dim() == 2 else -values] * 2)
    batches = [{**case.inputs(one), key: values}]
    found = displacement({"H-Res": one, "LoRA": lora}, batches, reference=case.build(), points=12)
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
    model, frozen = baselines.apply(case.build(), "vpt-shallow", length=3), case.build()
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.5)
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
    with pytest.raises(SteerError, match="one to four of 0, 1, 2, 3, 4; received all"):
        found.plot()
    with pytest.raises(SteerError, match="received 7"):
        found.plot("7")
    figure = found.plot("0", "4")
    assert len(figure.axes) == 2
    with pytest.raises(SteerError, match="room for one panel, and there are 2"):
        found.plot("0", "4", ax=figure.axes[0])
    colours = dict(zip(found.groups, figure.axes[0].collections[0].get_array().tolist(), strict=True))
    assert len(set(colours.values())) == len(colours) == 3


LOADER = [(torch.randn(9, 1, 8, 8), torch.arange(9) % 5)]


@pytest.mark.parametrize(
    ("run", "match"),
    [
        (lambda m: plane(m, LOADER, layer=3), "from -3 to 2, the index of a block; received 3"),
        (lambda m: plane(m, LOADER, layer=True), "received True"),
        (lambda m: plane(m, [torch.zeros(1, 1, 8, 8)], layer=0), "vary"),
        (lambda m: displacement({}, LOADER), "one adapted model or more"),
        (lambda m: displacement(m, LOADER), "received VisionTransformer"),
        (lambda m: displacement({"a": m}, LOADER, token="cls"), "one of each, first, last, mean; received .cls."),
        (lambda m: displacement({"a": m}, LOADER, points=9), "at least 10; received 9"),
        (lambda m: displacement({"a": m}, LOADER, layer=-4), "received -4"),
        (lambda m: displacement({"a": m, "b": vit(width=16)}, LOADER), "one backbone"),
    ],
)
def test_bad_input_is_refused(run, match):
    model = shake(steer(vit(), rank=4))
    if match == "vary":
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
    with pytest.raises(SteerError, match=match):
        run(model)
