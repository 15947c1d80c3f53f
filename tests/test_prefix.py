"""The frozen prefix computed once: the same losses, and a refusal with a reason where they would not be the same."""

import os
import signal

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

import residual_steer as rs
from apart import killed
from cases import LENGTH, RANK, TABLE, VOCABULARY
from residual_steer.training import next_token_loss
from runs import Stop, fit, same, stopping_at, weights

GPT2, VIT = TABLE["gpt2"], TABLE["timm-vit"]
STEPS = 12  # of four batches an epoch
STREAMS = 16 * LENGTH * 16 * 4  # bytes of what leaves one block of GPT-2 for all rows


class Texts(Dataset):
    """Sixteen windows of tokens; with noise another one in every reading, or drifting on from the second epoch."""

    def __init__(self, rows=16, noise=False, drift=False):
        self.ids = torch.randint(3, VOCABULARY, (rows, LENGTH), generator=torch.Generator().manual_seed(5))
        self.noise, self.drift, self.reads = noise, drift, 0

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        self.reads += 1
        ids = self.ids[index]
        ids = torch.where(torch.rand(LENGTH) < 0.3, 4, ids) if self.noise else ids
        ids = (ids + max(0, self.reads - 17) // 16) % VOCABULARY if self.drift else ids
        return {"input_ids": ids, "labels": ids}


class Images(Dataset):
    def __init__(self):
        self.x = torch.randn(16, 3, 16, 16, generator=torch.Generator().manual_seed(5))

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return self.x[index], index % 3


def loader(case=GPT2):
    return DataLoader(Images() if "vit" in case.name else Texts(), batch_size=4, shuffle=True)


def steered(case=GPT2, change=None, **more):
    model = case.build()
    torch.manual_seed(0)
    rs.steer(model, **{"rank": 4, "layers": [1], **more})
    if change is not None:
        change(model)
    return model


def with_frozen(weight, **where):
    """A frozen field of some strength, and one beside the upper block that trains."""
    model = steered(name="frozen", **where)
    with torch.no_grad():
        for parameter in rs.parameters(model):
            parameter.copy_(torch.linspace(-0.5, 0.5, parameter.numel()).view_as(parameter))
    torch.manual_seed(0)
    rs.steer(model, rank=4, layers=[1], name="learning")
    rs.use(model, {"frozen": weight, "learning": 1.0})
    rs.thaw(model, "learning")
    return model


def training(part, case=GPT2):
    """A model without a field, of which a part trains."""
    model = case.build()
    model.get_submodule(part).requires_grad_(True)
    return model


def train(model, case=GPT2, data=None, **options):
    loss = next_token_loss if case.name.startswith("mamba_ssm") else None
    return fit(
        model,
        loader(case) if data is None else data,
        **{"steps": STEPS, "lr": 0.03, "log_every": 1, "loss": loss, **options},
    )


def losses(history):
    return torch.tensor([record["loss"] for record in history.train])


def compare(make, case=GPT2, cache_prefix=True, rtol=1e-4, **options):
    """Train a model with a cache and one without, which has to make no difference; return what the cache did."""
    expected = train(make(), case, **options)
    found = train(make(), case, cache_prefix=cache_prefix, **options)
    torch.testing.assert_close(losses(found), losses(expected), rtol=rtol, atol=rtol / 10)
    assert expected.cache is None
    return found.cache


@pytest.mark.parametrize(
    ("name", "place"),
    [(name, "memory") for name in ("timm-vit", "hf-vit", "gpt2", "mamba", "mamba2", "mamba_ssm-1", "mamba_ssm-2")]
    + [("gpt2", "disk"), ("mamba_ssm-2", "disk")],
)
def test_losses_are_those_without_a_cache(name, place, tmp_path):
    case, models, runs = TABLE[name], [], []

    def make():
        models.append(steered(case))
        runs.clear()
        for mixer in case.modules(models[-1], "mixer"):
            mixer.register_forward_pre_hook(lambda *_, mixer=mixer: runs.append(mixer))
        return models[-1]

    cache = compare(make, case, cache_prefix=True if place == "memory" else tmp_path / "streams")
    assert (cache["blocks"], cache["rows"], cache["hits"], cache["misses"]) == (1, 16, 8, 4)
    frozen, upper = case.modules(models[1], "mixer")
    assert runs.count(frozen) == 4 + 2 + 1  # an epoch, the two runs of the check, the proof
    assert runs.count(upper) == runs.count(frozen)  # only the field beside it runs again
    assert "forward" not in vars(case.modules(models[1], "block")[1])


def leaning(block):
    """Let what a block's feed-forward computes for a row lean a little on the other rows of its batch."""
    block.mlp.register_forward_hook(lambda _, args, out: out + 0.1 * out.mean(0, keepdim=True))


def drop_path(block, rate=0.01):
    from timm.layers import DropPath

    block.drop_path1 = DropPath(rate)  # with so small a rate, two runs over four rows mostly agree


ABOVE = {  # why what the first steered block computes is no constant, or is not kept
    "a field inside it": (GPT2, lambda: steered(site="mixer"), {}),
    "a field before it": (GPT2, lambda: steered(site="input"), {}),
    "a part of it that trains": (GPT2, lambda: steered(train=["transformer.h.1.ln_1"]), {}),
    "dropout in it": (GPT2, lambda: steered(change=lambda m: setattr(m.transformer.h[1].mlp.dropout, "p", 0.5)), {}),
    "a rare drop of its path": (VIT, lambda: steered(VIT, lambda m: drop_path(m.blocks[1])), {"seed": 2}),
    "rows that lean on their batch": (GPT2, lambda: steered(change=lambda m: leaning(m.transformer.h[1])), {}),
    "no room": (GPT2, steered, {"cache_limit": STREAMS * 1.5 / 2**30}),
}


@pytest.mark.parametrize("why", ABOVE)
def test_the_first_steered_block_is_computed_where_it_is_no_constant(why):
    case, make, options = ABOVE[why]
    runs = []

    def counted():
        model = make()
        runs.clear()
        case.modules(model, "mixer")[1].register_forward_pre_hook(lambda *_: runs.append(1))
        return model

    cache = compare(counted, case, **options)
    assert cache["hits"] == 8
    assert len(runs) >= STEPS
    if why != "rows that lean on their batch":  # which is found out when they are read again
        assert cache["bytes"] == (STREAMS if case is GPT2 else 16 * 5 * 16 * 4)


def test_a_loss_that_looks_into_the_first_steered_block_computes_it():
    def peeking(model, batch):
        seen.clear()
        return model(**batch).loss + seen[0].abs().mean()

    def make():
        model = steered()
        model.transformer.h[1].mlp.register_forward_hook(lambda _, args, out: seen.append(out))
        return model

    seen = []
    assert compare(make, loss=peeking)["hits"] == 8


class Adding(nn.Module):
    """A block that works in place: x += mlp(x)."""

    def __init__(self):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(8, 8), nn.Tanh())

    def forward(self, x):
        x += self.mlp(x)
        return x


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Adding() for _ in range(3))
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = x * 1.0
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


def test_what_enters_a_block_that_works_in_place_is_kept_as_it_entered():
    def make():
        torch.manual_seed(0)
        found = Stack()
        rs.steer(found, rs.Backbone(blocks=list(found.blocks), width=8, inplace=True), rank=4, layers=[1])
        with torch.no_grad():
            for index, parameter in enumerate(rs.parameters(found)):
                parameter.copy_(torch.linspace(-1, 1, parameter.numel()).view_as(parameter).roll(index))
        return found

    rows = torch.randn(16, 4, 8, generator=torch.Generator().manual_seed(1))
    data = [(rows[i : i + 4], torch.arange(4) % 3) for i in range(0, 16, 4)]
    assert compare(make, data=data, rtol=1e-5, lr=0.1)["hits"] == 8


def test_data_that_do_not_tell_their_number_keep_what_leaves_the_frozen_blocks_alone():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter([Texts()[i] for i in range(16)])

    cache = compare(steered, data=DataLoader(Stream(), 4))
    assert (cache["hits"], cache["bytes"]) == (8, STREAMS)


def test_a_head_alone_needs_no_block_at_all():
    assert compare(lambda: training("head", VIT), VIT)["blocks"] == 2


def test_mixed_precision_keeps_its_streams():
    assert compare(steered, precision="bf16", rtol=2e-2)["hits"] == 8


def test_running_statistics_of_what_trains_are_not_disturbed_by_the_checks():
    models = []

    def make():
        model = VIT.build()
        torch.manual_seed(0)
        model.head = nn.Sequential(nn.BatchNorm1d(16), nn.Linear(16, 3))
        models.append(rs.steer(model, rank=4, layers=[1], train="head"))
        return model

    compare(make, VIT)
    plain, cached = models
    assert cached.head[0].num_batches_tracked == plain.head[0].num_batches_tracked == STEPS
    torch.testing.assert_close(cached.head[0].running_mean, plain.head[0].running_mean, rtol=1e-4, atol=1e-5)


def nudge(model):
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight[0, 0] += 1e-3


def activate(act):
    """Nothing but its code differs, of which no tensor and no configuration tells."""
    return lambda model: setattr(model.blocks[1].mlp, "act", act())


OTHERS = {  # pairs of runs of which the second one may not read what the first one kept
    "weights": (GPT2, [(steered, {}), (lambda: steered(change=nudge), {})]),
    "depth": (GPT2, [(steered, {}), (lambda: training("transformer.ln_f"), {})]),
    "precision": (GPT2, [(steered, {"precision": "bf16", "rtol": 2e-2}), (steered, {})]),
    "a frozen field's strength": (GPT2, [(lambda w=w: with_frozen(w, layers=[0]), {}) for w in (1.0, -1.0)]),
    "the code above": (VIT, [(lambda a=a: steered(VIT, activate(a)), {}) for a in (nn.GELU, nn.ReLU)]),
}


@pytest.mark.parametrize("what", OTHERS)
def test_another_backbone_never_reads_a_stale_cache(what, tmp_path):
    case, runs = OTHERS[what]
    for make, options in runs:
        assert compare(make, case, cache_prefix=tmp_path, **options)["misses"] == 4
    assert len(list(tmp_path.iterdir())) == 2


def test_a_precision_that_accelerate_was_told_is_another_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    train(steered(), cache_prefix=tmp_path)
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
    assert compare(steered, cache_prefix=tmp_path)["misses"] == 4


def test_a_frozen_field_inside_the_first_steered_block_is_no_constant_of_the_weights(tmp_path):
    """Its strength is in no tensor; so the block is computed, and a folder serves every strength."""
    for weight in (1.0, -1.0):
        cache = compare(lambda weight=weight: with_frozen(weight, site="mixer"), cache_prefix=tmp_path)
    assert (cache["bytes"], cache["misses"]) == (STREAMS, 0)


def test_a_run_reads_what_an_earlier_one_left_on_disk(tmp_path):
    first = train(steered(), cache_prefix=tmp_path).cache
    again = compare(steered, cache_prefix=str(tmp_path), seed=3)
    assert (again["hits"], again["misses"]) == (STEPS, 0)
    assert len(list(tmp_path.iterdir())) == 1
    assert first["bytes"] == again["bytes"] == 2 * STREAMS  # what leaves the frozen block, and the next one's own


def test_new_rows_are_computed_and_kept(tmp_path):
    train(steered(), data=DataLoader(Texts(8), 4), cache_prefix=tmp_path)
    assert compare(steered, data=DataLoader(Texts(16), 4), cache_prefix=tmp_path)["rows"] == 16


def dropping(model):
    model.transformer.h[0].mlp.dropout.p = 0.2


def compiling(model):
    model.transformer.h[1] = torch.compile(model.transformer.h[1], backend="eager")


def twice(model, batch):
    return model(**batch).loss + model(**batch).loss


REFUSED = [
    (lambda: steered(layers=None), {}, "here the first block trains"),
    (lambda: steered(train="lm_head"), {}, r"lm_head.weight|transformer.wte.weight trains, and the frozen"),
    (lambda: steered(change=dropping), {}, r"is random.*below block 1 \(transformer.h.0.mlp.dropout\)"),
    (lambda: steered(change=lambda m: leaning(m.transformer.h[0])), {}, "Rows depend on each other"),
    (lambda: steered(change=compiling), {}, "a compiled model does not ask"),
    (lambda: steered(change=lambda m: m.transformer.h[0].compile(backend="eager")), {}, "a compiled model does not"),
    (lambda: nn.Linear(3, 3), {}, "no known backbone"),
    (steered, {"data": DataLoader(Texts(noise=True), 4)}, "are augmented"),
    (steered, {"data": [{**Texts()[0], "use_cache": False}]}, r"in its first dimension, here 7; this batch has False"),
    (steered, {"cache_limit": 1e-6}, r"16 rows, 448 bytes each, would take .*`cache_limit` is 1e-06"),
    (steered, {"loss": twice}, "this one called it, or the model its frozen blocks, 2 times"),
    (steered, {"loss": lambda model, batch: rs.parameters(model)[0].sum()}, "did not reach its blocks"),
    *((steered, {"cache_prefix": value}, f"False or a folder; received {value!r}") for value in (3, "", None)),
]


@pytest.mark.parametrize(("make", "options", "message"), REFUSED, ids=[message[:30] for _, _, message in REFUSED])
def test_a_refusal_names_its_reason_and_changes_nothing(make, options, message):
    model = make()
    before, seams = weights(model), {"forward", "_compiled_call_impl"}
    own = [seams & set(vars(module)) for module in model.modules()]
    with pytest.raises(rs.SteerError, match=message):
        train(model, **{"cache_prefix": True, **options})
    assert own == [seams & set(vars(module)) for module in model.modules()]
    if "depend on each other" not in message:  # which is found out in the second epoch
        assert same(weights(model), before)


@pytest.mark.parametrize("seed", range(3))
def test_a_rare_drop_of_a_path_is_noticed(seed):
    with pytest.raises(rs.SteerError, match="is random"):
        train(steered(VIT, lambda model: drop_path(model.blocks[0])), VIT, seed=seed, cache_prefix=True)


def test_a_model_that_looks_into_its_lower_blocks_is_refused():
    """Its loss reads what block 0 computes inside, which is not there when the block is handed through."""
    model, seen = steered(), []
    model.transformer.h[0].mlp.register_forward_hook(lambda _, args, out: seen.append(out.detach().abs().mean()))

    def peeking(model, batch):
        seen.append(torch.zeros(()))
        return model(**batch).loss + 100 * seen[-1].abs()

    with pytest.raises(rs.SteerError, match="with its frozen blocks handed through"):
        train(model, loss=peeking, cache_prefix=True)


def test_data_that_change_between_epochs_are_noticed():
    with pytest.warns(UserWarning, match="no batch of the second epoch"):
        train(steered(), data=DataLoader(Texts(drift=True), 4), steps=9, cache_prefix=True)


def cut_off(folder):
    """Train, and be killed in the seventh step."""
    model, steps = steered(), []

    def die(*_):
        steps.append(1)
        if len(steps) == 7:
            os.kill(os.getpid(), signal.SIGKILL)

    model.lm_head.register_forward_hook(die)
    train(model, cache_prefix=folder)


def test_a_killed_run_leaves_a_cache_that_can_be_read(tmp_path):
    assert killed(cut_off, tmp_path) == -signal.SIGKILL
    compare(steered, cache_prefix=tmp_path)


def test_resuming_with_a_cache(tmp_path):
    expected = losses(train(steered()))
    options = {"save_to": tmp_path, "checkpoint_every": 2, "cache_prefix": True}
    with pytest.raises(Stop):
        train(steered(change=lambda model: stopping_at(model.lm_head, 9)), **options)
    history = train(steered(), resume=True, **options)
    torch.testing.assert_close(losses(history), expected, rtol=1e-4, atol=1e-5)


def train_ends(case, layers, calls, **options):
    """Train a steered model for three epochs over two batches; count the calls of its blocks."""
    torch.manual_seed(4)
    batches = [{key: value for key, value in case.batch().items() if torch.is_tensor(value)} for _ in range(2)]
    model = case.build()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5)  # so that what a decoder reads from its encoder matters
    torch.manual_seed(5)
    rs.steer(model, rank=RANK, layers=layers)
    for block in case.modules(model, "block"):
        block.register_forward_hook(lambda block, *_: calls.append(block))

    def loss(model, batch):
        output = model(**batch, use_cache=False) if "decoder_input_ids" in batch else model(**batch)
        output = getattr(output, "logits", output).float()
        return (output / output.detach().abs().max()).square().mean()

    return fit(model, batches, steps=6, lr=1e-2, loss=loss, log_every=1, **options), model


ENDS = [  # which blocks are steered, and the bytes that are kept of four rows: of one run of blocks, and of two
    *(("bart", [2, 3], 4 * 64 * (7 + 5)), ("timm-swin", [1, 2], 12288), ("timm-resnet", [1], 22528)),
    *(("bart", [3], 4 * 64 * (7 + 5 + 5)), ("whisper", [3], 4 * 64 * (10 + 5 + 5))),
    *(("timm-swin", [2], 16384), ("hf-convnext", [2], 57344)),
]


@pytest.mark.parametrize(("name", "layers", "size", "on_disk"), [*((*end, False) for end in ENDS), (*ENDS[0], True)])
def test_what_another_thing_than_the_next_block_reads_is_kept_too(name, layers, size, on_disk, tmp_path):
    """A change of width, or a decoder behind its encoder."""
    case, counted = TABLE[name], []
    plain, _ = train_ends(case, layers, [])
    cached, model = train_ends(case, layers, counted, cache_prefix=tmp_path if on_disk else True)
    torch.testing.assert_close(losses(cached), losses(plain), rtol=1e-4, atol=0)
    assert (cached.cache["hits"], cached.cache["bytes"]) == (4, size)
    first, *_, last = case.modules(model, "block")
    assert counted.count(last) == 6 + 2  # one batch is computed twice more, as a proof
    assert counted.count(first) == 2 + 2 + 1  # an epoch, the two runs of the check, the proof


def test_a_block_that_is_used_twice_is_refused():
    with pytest.raises(rs.SteerError, match="or the model its frozen blocks, 2 times"):
        train_ends(TABLE["albert"], [1], [], cache_prefix=True)
