"""The loss over the plane of the stream: a quadratic for a linear model, and what the blocks behind make of it."""

import pytest
import torch
from torch import nn

from cases import randomise
from fields import IMAGES, shake, vit
from planes import WIDTH, Toy, data, register, same
from residual_steer import SteerError, steer, use
from residual_steer.diagnostics import landscape
from sharp import case_of, rows_for


@pytest.fixture(autouse=True)
def _toy():
    register()


def squared(model, batch):
    x, y = batch
    return (model(x) - y).square().mean()


def moved(z, over, point):
    return z + (torch.tensor(point).double() - over.project(z)) @ over.directions


@torch.no_grad()
def test_the_landscape_of_a_linear_model_is_its_quadratic():
    adapted = Toy(same, lambda z: 1.2 * z + 0.5, lambda z: z - 1).double()
    frozen = Toy(same, same, lambda z: z - 1).double()
    frozen.head.load_state_dict(adapted.head.state_dict())
    x = torch.cat([x for x, _ in data(rows=12)])
    y = torch.randn(12, 2).double()
    loader = [(x[:5], y[:5]), (x[5:], y[5:])]
    found = landscape(adapted, loader, layer=1, reference=frozen, size=5, span=1.5, loss=squared)
    over = found.plane

    def loss_at(*point):
        return float((adapted.head((moved(1.2 * x + 0.5, over, point) - 1).mean(1)) - y).square().mean())

    grid = torch.tensor(found.losses, dtype=torch.float64)
    expected = [loss_at(a, b) for b in found.up for a in found.across]
    assert grid.flatten().tolist() == pytest.approx(expected)
    assert max(grid.diff(n=3, dim=dim).abs().max() for dim in (0, 1)) < 1e-9 * grid.max()
    step = found.across[1] - found.across[0]
    assert (grid.diff(n=2, dim=1) / step**2)[0, 0] == pytest.approx(
        float((adapted.head.weight @ over.directions[0]).square().mean() * 2)
    )
    flat = x.reshape(-1, WIDTH)
    for path, after in ((found.frozen, flat), (found.adapted, 1.2 * flat + 0.5)):
        ends = torch.stack([over.project(flat.mean(0)), over.project(after.mean(0))])
        assert [path.x, path.y] == [pytest.approx(ends[:, k].tolist(), abs=1e-9) for k in (0, 1)]
        assert path.loss_there == pytest.approx(loss_at(path.x[-1], path.y[-1]))
    assert found.frozen.loss == pytest.approx(float(squared(frozen, (x, y))))
    assert found.adapted.loss == pytest.approx(float(squared(adapted, (x, y))))
    assert found.lowest[2] == pytest.approx(float(grid.min()))
    column, line = found.across.index(found.lowest[0]), found.up.index(found.lowest[1])
    assert found.losses[line][column] == found.lowest[2]
    reach = [1.5 * d for d in over.deviations]
    assert found.across[0] == pytest.approx(min(-reach[0], *found.adapted.x))
    assert found.up[-1] == pytest.approx(max(reach[1], *found.adapted.y))


def test_the_grid_covers_the_ways():
    adapted, frozen = Toy(lambda z: z - 30, lambda z: z + 60).double(), Toy(same, same).double()
    found = landscape(
        adapted, data(rows=10), reference=frozen, size=3, span=0.5, loss=lambda m, b: m(b[0]).square().mean()
    )
    for places, name, deviation in zip((found.across, found.up), "xy", found.plane.deviations, strict=True):
        way = getattr(found.adapted, name)
        assert min(way) < -0.5 * deviation
        assert max(way) > 0.5 * deviation
        assert places == pytest.approx((min(way), (min(way) + max(way)) / 2, max(way)), abs=1e-6)


@torch.no_grad()
def test_the_blocks_behind_run_as_they_are():
    model = shake(steer(vit(), rank=4, train="head"))
    x, y = torch.randn(9, 1, 8, 8), torch.arange(9) % 5
    found = landscape(model, [(x[:4], y[:4]), (x[4:], y[4:])], layer=1, size=3)
    together = landscape(model, [(x, y)], layer=1, size=3, together=True)
    seen = []
    handle = model.blocks[1].register_forward_hook(lambda m, a, out: seen.append(out.double()))
    model.eval()(x)
    handle.remove()

    def loss_of(z):
        logits = model.forward_head(model.norm(model.blocks[2](z.float())))
        return pytest.approx(float(nn.functional.cross_entropy(logits, y)), rel=1e-4)

    assert found.losses[0][2] == loss_of(moved(seen[0], found.plane, (found.across[2], found.up[0])))
    way = torch.tensor([together.across[2] - together.adapted.x[-1], together.up[0] - together.adapted.y[-1]])
    assert together.losses[0][2] == loss_of(seen[0] + way.double() @ together.plane.directions)
    assert found.adapted.loss == pytest.approx(float(nn.functional.cross_entropy(model(x), y)), rel=1e-5)
    assert together.adapted.loss_there == pytest.approx(found.adapted.loss, rel=1e-5)
    with use(model, None):
        assert found.frozen.loss == pytest.approx(float(nn.functional.cross_entropy(model(x), y)), rel=1e-5)
    assert together.table().notes != found.table().notes
    axes = found.plot().axes[0]
    assert [line.get_label() for line in axes.lines] == ["frozen", "adapted"]
    assert axes.lines[1].get_xdata().tolist() == list(found.adapted.x)
    assert axes.collections[0].get_clim()[0] <= found.lowest[2]
    assert [row["loss"] for row in found.table().rows] == [found.frozen.loss, found.adapted.loss, None]


@pytest.mark.parametrize("name", ["timm-resnet", "gpt2"])
def test_a_landscape_of_maps_and_of_tuples(name):
    case = case_of(name)
    model = randomise(steer(case.build(), rank=2))
    loader = [rows_for(case, model, 3, labels="own")]
    for together in (False, True):
        assert torch.tensor(landscape(model, loader, size=3, span=1, together=together).losses).std() > 0


def test_a_loader_without_labels_is_refused():
    with pytest.raises(SteerError, match="a batch is a dict or a pair"):
        landscape(shake(steer(vit(), rank=4)), [IMAGES])
