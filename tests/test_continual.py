"""Null spaces of steered models: what old tasks compute stays, observing leaves no trace, and what is refused."""

import contextlib
import copy
import gc
import weakref

import numpy as np
import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

import residual_steer as rs
from cases import CASES
from fields import assert_as, shake, snapshot
from pooled import pooled_vit
from residual_steer._controller import steering_of
from residual_steer.continual import NullSpace
from streams import InPlace, Model

MODELS = {case.name: case for case in CASES}
ROWS = {"gpt2": (2, 3), "mamba": (2, 3)}  # few enough for their features to leave room


def steered(name="gpt2", rank=15, **options):
    case = MODELS[name]
    return shake(rs.steer(case.build(), rank=rank, **options))


def batch_of(name, seed):
    torch.manual_seed(seed)
    if name in ROWS:
        return {"input_ids": torch.randint(3, 50, ROWS[name]), "use_cache": False}
    return {"x": torch.randn(2, 3, 16, 16)}


def outputs(model, batch):
    model.eval()
    with torch.no_grad():
        out = model(**batch)
    return getattr(out, "logits", out)


def train(model, batch, steps, space=None):
    """Learn other outputs on another task; return the loss at the beginning and at the end."""
    target = outputs(model, batch)
    target = target + 0.3 * torch.randn(target.shape, generator=torch.Generator().manual_seed(5))
    optimizer = torch.optim.AdamW(rs.parameters(model), lr=5e-3, weight_decay=0.1)
    losses = []
    with contextlib.nullcontext() if space is None else space.protect(optimizer):
        for _ in range(steps):
            model.train()
            optimizer.zero_grad()
            out = model(**batch)
            loss = (getattr(out, "logits", out) - target).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    return losses[0], losses[-1]


def small():
    return shake(rs.steer(pooled_vit(), rank=15))


def pixels(size):
    return {"pixel_values": torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(1))}


SEVERAL = ["input", "mlp.c_fc", "after"]
KEPT = {  # how a model is made, batches of the old and the new task, and dimensions that the old one may take
    "gpt2": (steered, batch_of("gpt2", 1), batch_of("gpt2", 2), 6),
    "mamba": (lambda: steered("mamba"), batch_of("mamba", 1), batch_of("mamba", 2), 6),
    "pooled-vit": (small, batch_of("pooled-vit", 1), batch_of("pooled-vit", 2), 8),
    "mixer": (lambda: steered(site="mixer", scale=0.5, activation="silu"), batch_of("gpt2", 1), batch_of("gpt2", 2), 6),
    "mlp": (lambda: steered(site="mlp", scale=0.5, activation="silu"), batch_of("gpt2", 1), batch_of("gpt2", 2), 6),
    "input": (lambda: steered(site="input", scale=0.5, activation="silu"), batch_of("gpt2", 1), batch_of("gpt2", 2), 6),
    "several": (
        lambda: steered(site=SEVERAL, rank=dict.fromkeys(SEVERAL, 15)),
        *(batch_of("gpt2", n) for n in (1, 2)),
        6,
    ),
    "convnet": (lambda: steered("hf-convnext", rank=8, bias=False), pixels(4), pixels(6), 4),  # 4 pixels, then 1 and 1
}


@pytest.mark.parametrize("name", KEPT)
def test_the_old_task_stays_as_it_was(name):
    make, old, new, tokens = KEPT[name]
    model = make()
    before, free, left = outputs(model, old), copy.deepcopy(model), NullSpace(model).left
    space = NullSpace(model, energy=1.0)
    space.observe([old])
    assert all(1 <= left[key] - one <= tokens for key, one in space.left.items())
    long = name in {"gpt2", "mamba", "pooled-vit"}
    assert name != "convnet" or list(space.left.values()) == [8 - 4, 8 - 4, 12 - 1, 8 - 1, 12 - 1, 8 - 1]
    first, last = train(model, new, 300 if long else 60, space)
    assert (outputs(model, old) - before).abs().max() < 1e-5
    assert last < (0.95 if long else 1) * first
    if long:
        train(free, new, 50)
        assert (outputs(free, old) - before).abs().max() > 1e-2


def test_what_is_streamed_is_what_enters():
    """A dense reference: every stream and hidden unit of every batch at once, and its singular values."""
    model = steered(rank=4)
    batches = [batch_of("gpt2", seed) for seed in range(4)]
    space = NullSpace(model, energy=0.9)
    space.observe(batches)
    _, state = steering_of(model)
    entered = {0: [], 1: []}
    hooks = [
        block.register_forward_pre_hook(lambda _, args, index=index: entered[index].append(args[0].reshape(-1, 16)))
        for index, block in enumerate(state.backbone.blocks)
    ]
    for batch in batches:
        outputs(model, batch)
    for hook in hooks:
        hook.remove()
    for (_, index), field in state.fields("default").items():
        z = torch.cat(entered[index])
        for side, x in (("down", z), ("up", field.hidden(z).detach())):
            x = np.concatenate([x.double().numpy(), np.ones((24, 1))], axis=1)
            _, s, v = np.linalg.svd(x)
            wanted = int(np.searchsorted(np.cumsum(s**2) / (s**2).sum(), 0.9) + 1)
            basis = space.state_dict()["points"][f"blocks.{index}.{side}"]["basis"].numpy()
            assert basis.shape[1] == wanted
            np.testing.assert_allclose(basis @ basis.T, v[:wanted].T @ v[:wanted], atol=1e-5)


def test_padding_is_left_out_unless_it_is_asked_for():
    model = steered()
    batch = batch_of("gpt2", 1)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    alone = [{"input_ids": batch["input_ids"][:1, :2]}, {"input_ids": batch["input_ids"][1:, :1]}]
    padded = {**batch, "attention_mask": mask}
    spaces = [NullSpace(model, 1.0) for _ in range(3)]
    spaces[0].observe([padded])
    spaces[1].observe(alone)
    spaces[2].observe([padded], padding=True)
    assert spaces[0].left == spaces[1].left == {key: 17 - 1 - key.endswith("up") - 2 for key in spaces[0].left}
    assert all(spaces[2].left[key] < left for key, left in spaces[0].left.items())
    bases = [space.state_dict()["points"]["blocks.1.down"]["basis"] for space in spaces[:2]]
    torch.testing.assert_close(bases[0] @ bases[0].t(), bases[1] @ bases[1].t(), rtol=0, atol=1e-4)


def test_the_mask_of_an_encoder_does_not_hide_tokens_of_its_decoder():
    model = steered("t5", rank=8)
    torch.manual_seed(1)
    ids = torch.randint(3, 50, (1, 4))
    mask = torch.tensor([[1, 0, 0, 0]])
    batch = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": ids, "use_cache": False}
    spaces = [NullSpace(model, 1.0) for _ in range(2)]
    spaces[0].observe([batch])
    spaces[1].observe([batch], padding=True)
    assert spaces[0].left == spaces[1].left


def test_it_sees_what_evaluation_sees_and_leaves_the_model_as_it_was():
    model = steered("timm-vit", dropout=0.5, train="head")
    outputs(model, batch_of("timm-vit", 1))  # a first call, after which the points trust their hosts
    spaces = [NullSpace(model, 1.0) for _ in range(2)]
    before, state = snapshot(model), torch.get_rng_state()
    for space, mode in zip(spaces, (True, False), strict=True):
        model.train(mode)
        space.observe([IMAGES])
        assert model.training == mode
    assert torch.equal(torch.get_rng_state(), state)
    assert_as(model, before)
    points, others = (space.state_dict()["points"] for space in spaces)
    assert all(torch.equal(points[key]["basis"], others[key]["basis"]) for key in points)


class Live(TorchDispatchMode):
    """Bytes of the storages that operators have made and that are still there."""

    def __init__(self):
        super().__init__()
        self.known, self.peak = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.known[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.known = {key: entry for key, entry in self.known.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.known.values()))
        return out


def test_no_features_are_kept():
    model = steered(rank=4)
    peaks = []
    for count in (2, 40):
        space = NullSpace(model)
        with Live() as live:
            space.observe(batch_of("gpt2", seed) for seed in range(count))
        peaks.append(live.peak)
    features = 2 * 6 * (16 + 4) * 8  # bytes of one batch at two points in fp64
    assert peaks[0] > 0
    assert abs(peaks[1] - peaks[0]) < 3 * features, "38 more batches leave no more than their directions"
    assert sum(t.numel() for p in space.state_dict()["points"].values() for t in (p["basis"],)) <= 2 * (17**2 + 5**2)


def test_blocks_that_work_in_place_and_fields_side_by_side():
    torch.manual_seed(0)
    model = Model(InPlace)
    backbone = rs.Backbone(blocks=model.body, width=8, inplace=True)
    shake(rs.steer(model, backbone, rank=7, name="law"))
    shake(rs.steer(model, backbone, rank=7, name="new"))
    rs.use(model, {"law": 0.5, "new": 1.0})
    rs.thaw(model, "new")
    ids = torch.tensor([[0, 1, 2]])
    with torch.no_grad():
        before = model(ids)
    space = NullSpace(model, 1.0, name="new")
    space.observe([ids])
    optimizer = torch.optim.AdamW(rs.parameters(model, "new"), lr=1e-2)
    with space.protect(optimizer):
        for _ in range(50):
            optimizer.zero_grad()
            model(torch.tensor([[3, 3, 1]])).square().sum().backward()
            optimizer.step()
    with torch.no_grad():
        assert (model(ids) - before).abs().max() < 1e-5
        assert (model(torch.tensor([[3, 3, 1]]))).isfinite().all()


def test_a_compiled_model_is_looked_into():
    model = steered("timm-vit")
    batch = batch_of("timm-vit", 1)["x"]
    plain = NullSpace(model, 1.0)
    plain.observe([batch])
    model.compile(backend="eager", fullgraph=True)
    model(batch)
    compiled = NullSpace(model, 1.0)
    compiled.observe([batch])
    assert compiled.left == plain.left


class Broken:
    """A loader that gives a batch and then fails, or gives one that is not finite."""

    def __init__(self, then):
        self.then = then

    def __iter__(self):
        yield {"x": torch.randn(2, 3, 16, 16)}
        if isinstance(self.then, Exception):
            raise self.then
        yield self.then


IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))
NAN = {"x": torch.full((2, 3, 16, 16), float("nan"))}


@pytest.mark.parametrize(
    ("loader", "error", "match"),
    [
        ([], rs.SteerError, "gave no batch"),
        (3, rs.SteerError, "is a DataLoader, or a list of batches"),
        (Broken(NAN), rs.SteerError, r"what enters blocks\.0\.down has .* NaN"),
        (Broken(RuntimeError("disk")), RuntimeError, "disk"),
        (Broken({"x": "text"}), rs.SteerError, "a batch is"),
    ],
)
def test_what_fails_takes_nothing_in(loader, error, match):
    model = steered("timm-vit")
    space = NullSpace(model)
    space.observe([batch_of("timm-vit", 1)])
    before, left = space.state_dict(), space.left
    with pytest.raises(error, match=match):
        space.observe(loader)
    assert (space.left, space.tasks) == (left, 1)
    after = space.state_dict()["points"]
    assert all(torch.equal(before["points"][key]["basis"], point["basis"]) for key, point in after.items())


def test_wrong_requests_are_refused():
    model = steered("timm-vit")
    for energy in (0, 1.5, float("nan"), "all", True):
        with pytest.raises(rs.SteerError, match="`energy` is a number above 0"):
            NullSpace(model, energy)
    with pytest.raises(rs.SteerError, match="is not steered"):
        NullSpace(MODELS["gpt2"].build())
    with pytest.raises(rs.SteerError, match="one of the fields default"):
        NullSpace(model, name="law")
    space, batch = NullSpace(model), batch_of("timm-vit", 1)
    for mix in (None, ["default", None]):
        with rs.use(model, mix), pytest.raises(rs.SteerError, match="where it acts on every row"):
            space.observe([batch])
    masked = NullSpace(steered())
    with pytest.raises(rs.SteerError, match="no token of this task entered"):
        masked.observe([{**batch_of("gpt2", 1), "attention_mask": torch.zeros(2, 3, dtype=torch.long)}])
    rs.unsteer(model)
    with pytest.raises(rs.SteerError, match="is not steered"):
        space.observe([batch])
    rs.steer(model, rank=3)
    with pytest.raises(rs.SteerError, match="not the one that this NullSpace was made for"):
        space.observe([batch])


def test_optimizers_that_cannot_be_protected_are_refused():
    model = steered("timm-vit")
    space = NullSpace(model)
    one = rs.parameters(model)[0]
    with pytest.raises(rs.SteerError, match=r"one of blocks\.0\.down without the other"):
        space.protect(torch.optim.SGD([one], lr=0.1))
    with pytest.raises(rs.SteerError, match="has no parameter of field 'default'"):
        space.protect(torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1))
    with pytest.raises(rs.SteerError, match=r"received list"):
        space.protect(rs.parameters(model))
    optimizer = torch.optim.SGD(rs.parameters(model), lr=0.1)
    handle = space.protect(optimizer)
    with pytest.raises(rs.SteerError, match="protects from this optimizer already"):
        space.protect(optimizer)
    handle.remove()
    with space.protect(optimizer):
        assert len(optimizer._optimizer_step_post_hooks) == 1
    assert not optimizer._optimizer_step_post_hooks
    protected = space.protect(optimizer)
    space.protect(copy.copy(optimizer)).remove()  # a copy is another one
    gone = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert gone() is None, "a space keeps no optimizer alive"
    protected.remove()


def test_one_projection_alone_can_train():
    model = steered("timm-vit")
    space, batch = NullSpace(model, 1.0), batch_of("timm-vit", 1)
    space.observe([batch])
    before = outputs(model, batch)
    ups = [p for field in steering_of(model)[1].fields("default").values() for p in field.up.parameters()]
    optimizer = torch.optim.AdamW(ups, lr=0.1)
    with space.protect(optimizer):
        for _ in range(20):
            optimizer.zero_grad()
            model(**batch_of("timm-vit", 2)).square().sum().backward()
            optimizer.step()
    assert (outputs(model, batch) - before).abs().max() < 1e-5


def test_what_is_observed_under_protection_is_protected_from_then_on():
    model, batch = steered("timm-vit"), batch_of("timm-vit", 1)
    space, optimizer = NullSpace(model, 1.0), torch.optim.SGD(rs.parameters(model), lr=0.1)
    with space.protect(optimizer):
        space.observe([batch])
        before = outputs(model, batch)
        model(**batch_of("timm-vit", 2)).square().sum().backward()
        optimizer.step()
    assert (outputs(model, batch) - before).abs().max() < 1e-5


def test_it_warns_where_no_room_is_left_and_where_the_field_was_changed():
    model = steered("timm-vit", rank=2)
    space = NullSpace(model, 1.0)
    with pytest.warns(UserWarning, match=r"no room is left .* blocks\.0\.up, blocks\.1\.up of field 'default'"):
        space.observe([batch_of("timm-vit", 1)])
    optimizer = torch.optim.SGD(rs.parameters(model), lr=0.1)
    with pytest.warns(UserWarning, match="no room is left"):
        space.protect(optimizer).remove()
    roomy = steered("timm-vit")
    space = NullSpace(roomy, 1.0)
    space.observe([batch_of("timm-vit", 1)])
    shake(roomy)
    optimizer = torch.optim.SGD(rs.parameters(roomy), lr=0.1)
    batch = batch_of("timm-vit", 1)
    before = outputs(roomy, batch)
    with space.protect(optimizer):
        with pytest.warns(
            UserWarning, match=r"were changed in protected directions .* at blocks\.0\.down, blocks\.0\.up"
        ):
            optimizer.step()  # there is no gradient: only what would be pulled back could move
        optimizer.step()
        assert torch.allclose(outputs(roomy, batch), before, atol=1e-5)
        torch.manual_seed(7)
        shake(roomy)
        with pytest.warns(UserWarning, match="were changed in protected directions"):
            optimizer.step()


def test_the_report():
    model = steered("timm-vit", train="head")
    space = NullSpace(model, 0.99)
    assert space.report().rows[0] == {"point": "blocks.0.down", "inputs": 17, "held": 0, "left": 17, "share": None}
    space.observe([batch_of("timm-vit", 1)])
    row = space.report().rows[0]
    assert row["held"] + row["left"] == 17
    assert 0.99 <= row["share"] < 1
    assert row["left"] == space.left["blocks.0.down"]
    text = str(space)
    assert "after 1 task, energy 0.99" in text
    assert "blocks.1.up" in text
    assert "Not protected, since it trains along with the field: head.weight, head.bias" in text
    assert not NullSpace(steered("timm-vit", bias=False)).report().notes
    assert repr(space).startswith("<NullSpace of 'default': tasks 1, ")
