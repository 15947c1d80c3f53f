"""The frozen prefix computed once: the same losses, and a refusal with a reason where they would not be the same."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import residual_steer as rs
from cases import CASES, LENGTH, VOCABULARY
from residual_steer.training import next_token_loss
from runs import fit

TABLE = {case.name: case for case in CASES}
STEPS = 12  # of four batches an epoch


class Texts(Dataset):
    """Sixteen windows of tokens."""

    def __init__(self, rows=16, noise=False):
        self.ids = torch.randint(3, VOCABULARY, (rows, LENGTH), generator=torch.Generator().manual_seed(5))
        self.noise = noise

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        ids = self.ids[index]
        ids = torch.where(torch.rand(LENGTH) < 0.3, 4, ids) if self.noise else ids
        return {"input_ids": ids, "labels": ids}


class Images(Dataset):
    def __init__(self, rows=16):
        self.x = torch.randn(rows, 3, 16, 16, generator=torch.Generator().manual_seed(5))

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return self.x[index], index % 3


def loader(case, **more):
    return DataLoader(Images() if "vit" in case.name else Texts(), batch_size=4, shuffle=True, **more)


def steered(case, **more):
    model = case.build()
    torch.manual_seed(0)
    return rs.steer(model, **{"rank": 4, "layers": [1], **more})


def with_frozen(case, weight, **where):
    """A frozen field of some strength, and one beside the upper block that trains."""
    model = steered(case, name="frozen", **where)
    with torch.no_grad():
        for parameter in rs.parameters(model):
            parameter.copy_(torch.linspace(-0.5, 0.5, parameter.numel()).view_as(parameter))
    torch.manual_seed(0)
    rs.steer(model, rank=4, layers=[1], name="learning")
    rs.use(model, {"frozen": weight, "learning": 1.0})
    rs.thaw(model, "learning")
    return model


def train(case, model=None, data=None, **options):
    loss = next_token_loss if case.name.startswith("mamba_ssm") else None
    return fit(model or steered(case), data or loader(case), steps=STEPS, lr=0.03, log_every=1, loss=loss, **options)


def losses(history):
    return torch.tensor([record["loss"] for record in history.train])


@pytest.mark.parametrize("name", ["timm-vit", "hf-vit", "gpt2", "mamba", "mamba2", "mamba_ssm-1", "mamba_ssm-2"])
@pytest.mark.parametrize("place", ["memory", "disk"])
def test_losses_are_those_without_a_cache(name, place, tmp_path):
    case = TABLE[name]
    expected = losses(train(case))
    assert expected[-4:].mean() < expected[:4].mean()
    runs = []
    for mixer in case.modules(model := steered(case), "mixer"):
        mixer.register_forward_pre_hook(lambda *_, mixer=mixer: runs.append(mixer))
    history = train(case, model, cache_prefix=True if place == "memory" else tmp_path / "streams")
    torch.testing.assert_close(losses(history), expected, rtol=1e-4, atol=1e-5)
    cache = history.cache
    assert (cache["blocks"], cache["rows"], cache["hits"], cache["misses"]) == (1, 16, 8, 4)
    frozen, upper = case.modules(model, "mixer")
    assert runs.count(frozen) == 4 + 2 + 1  # an epoch, the two runs of the check, the proof
    assert runs.count(upper) == runs.count(frozen)  # only the field beside it runs again
    assert "forward" not in case.modules(model, "block")[0].__dict__


OTHERWISE = {
    "a field inside it": {"site": "mixer"},
    "a field before it": {"site": "input"},
    "a part of it that trains": {"train": ["transformer.h.1.ln_1"]},
}


@pytest.mark.parametrize("why", [*OTHERWISE, "dropout in it", "no room"])
def test_the_first_steered_block_is_computed_where_it_is_no_constant(why):
    case = TABLE["gpt2"]

    def model():
        found = steered(case, **OTHERWISE.get(why, {}))
        if why == "dropout in it":
            found.transformer.h[1].mlp.dropout.p = 0.5
        return found

    row = LENGTH * 16 * 4
    limit = {"cache_limit": 16 * row * 1.5 / 2**30} if why == "no room" else {}
    expected = losses(train(case, model()))
    runs = []
    cached = model()
    cached.transformer.h[1].attn.register_forward_pre_hook(lambda *_: runs.append(1))
    history = train(case, cached, cache_prefix=True, **limit)
    torch.testing.assert_close(losses(history), expected, rtol=1e-4, atol=1e-5)
    assert history.cache["hits"] == 8
    assert history.cache["bytes"] == 16 * row
    assert len(runs) >= STEPS


class Adding(nn.Module):
    """A block that works in place: x += mlp(x)."""

    def __init__(self, width):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.Tanh())

    def forward(self, x):
        x += self.mlp(x)
        return x


class Stack(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.blocks = nn.ModuleList(Adding(width) for _ in range(3))
        self.head = nn.Linear(width, 3)

    def forward(self, x):
        x = x * 1.0
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


def test_what_enters_a_block_that_works_in_place_is_kept_as_it_entered():
    def model():
        torch.manual_seed(0)
        found = Stack()
        backbone = rs.Backbone(blocks=list(found.blocks), width=8, inplace=True)
        rs.steer(found, backbone, rank=4, layers=[1])
        with torch.no_grad():
            for index, parameter in enumerate(rs.parameters(found)):
                parameter.copy_(torch.linspace(-1, 1, parameter.numel()).view_as(parameter).roll(index))
        return found

    rows = torch.randn(16, 4, 8, generator=torch.Generator().manual_seed(1))
    data = [(rows[i : i + 4], torch.arange(4) % 3) for i in range(0, 16, 4)]
    runs = [fit(model(), data, steps=12, lr=0.1, log_every=1, cache_prefix=cache) for cache in (False, True)]
    torch.testing.assert_close(*map(losses, runs), rtol=1e-5, atol=1e-6)
    assert runs[1].cache["hits"] == 8


@pytest.mark.parametrize("seed", range(3))
def test_a_rare_drop_of_a_path_is_noticed(seed):
    """With a rate of 0.01, two runs over four rows mostly agree."""
    from timm.layers import DropPath

    case = TABLE["timm-vit"]

    def model(block):
        found = steered(case)
        found.blocks[block].drop_path1 = DropPath(0.01)
        return found

    refused(case, "is random", model(0))
    runs = [train(case, model(1), seed=seed, cache_prefix=cache) for cache in (False, True)]
    torch.testing.assert_close(*map(losses, runs), rtol=1e-4, atol=1e-5)
    assert runs[0].cache is None
    assert runs[1].cache["hits"] == 8
    assert runs[1].cache["bytes"] == 16 * 5 * 16 * 4  # what leaves the frozen block: five tokens


def leaning(block):
    """Let what a block's feed-forward computes for a row lean a little on the other rows of its batch."""
    block.mlp.register_forward_hook(lambda _, args, out: out + 0.1 * out.mean(0, keepdim=True))


def test_rows_that_lean_on_their_batch_are_noticed_where_the_loss_hardly_tells():
    case = TABLE["gpt2"]
    below = steered(case)
    leaning(below.transformer.h[0])
    with pytest.raises(rs.SteerError, match="Rows depend on each other"):
        train(case, below, cache_prefix=True)
    runs, calls = [], []
    for cache in (False, True):
        model = steered(case)
        leaning(model.transformer.h[1])
        model.transformer.h[1].mlp.register_forward_hook(lambda *_: calls.append(1))
        runs.append(train(case, model, cache_prefix=cache))
    torch.testing.assert_close(*map(losses, runs), rtol=1e-6, atol=1e-6)
    assert runs[1].cache["hits"] == 8
    assert len(calls) >= 2 * STEPS


def test_a_loss_that_looks_into_the_first_steered_block_computes_it():
    case = TABLE["gpt2"]

    def run(**options):
        model, seen = steered(case), []
        model.transformer.h[1].mlp.register_forward_hook(lambda _, args, out: seen.append(out))

        def peeking(model, batch):
            seen.clear()
            return model(**batch).loss + seen[0].abs().mean()

        return fit(model, loader(case), steps=STEPS, lr=0.03, log_every=1, loss=peeking, **options)

    history = run(cache_prefix=True)
    torch.testing.assert_close(losses(history), losses(run()), rtol=1e-4, atol=1e-5)
    assert history.cache["hits"] == 8


def test_data_that_do_not_tell_their_number_keep_what_leaves_the_frozen_blocks_alone():
    case = TABLE["gpt2"]

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter([Texts()[i] for i in range(16)])

    history = fit(steered(case), DataLoader(Stream(), 4), steps=STEPS, lr=0.03, cache_prefix=True)
    assert history.cache["hits"] == 8
    assert history.cache["bytes"] == 16 * LENGTH * 16 * 4


def test_another_first_steered_block_never_reads_a_stale_cache(tmp_path):
    """Nothing but its code differs, of which no tensor and no configuration tells."""
    case = TABLE["timm-vit"]

    def run(act, **options):
        model = steered(case)
        model.blocks[1].mlp.act = act()
        return train(case, model, **options)

    for act in (nn.GELU, nn.ReLU):
        history = run(act, cache_prefix=tmp_path)
        assert history.cache["misses"] == 4
        torch.testing.assert_close(losses(history), losses(run(act)), rtol=1e-4, atol=1e-5)


def test_a_frozen_field_inside_the_first_steered_block_is_no_constant_of_the_weights(tmp_path):
    """Its strength is in no tensor; so the block is computed, and a folder serves every strength."""
    case = TABLE["gpt2"]

    def run(weight, **options):
        return train(case, with_frozen(case, weight, site="mixer"), **options)

    for weight in (1.0, -1.0):
        history = run(weight, cache_prefix=tmp_path)
        torch.testing.assert_close(losses(history), losses(run(weight)), rtol=1e-4, atol=1e-5)
    assert history.cache["bytes"] == 16 * LENGTH * 16 * 4


def test_a_head_alone_needs_no_block_at_all():
    case = TABLE["timm-vit"]

    def probe():
        model = case.build()
        model.head.requires_grad_(True)
        return model

    expected = losses(train(case, probe()))
    history = train(case, probe(), cache_prefix=True)
    torch.testing.assert_close(losses(history), expected, rtol=1e-4, atol=1e-5)
    assert history.cache["blocks"] == 2


def test_a_run_reads_what_an_earlier_one_left_on_disk(tmp_path):
    case = TABLE["gpt2"]
    first = train(case, cache_prefix=tmp_path)
    again = train(case, cache_prefix=str(tmp_path), seed=3)
    assert (again.cache["hits"], again.cache["misses"]) == (STEPS, 0)
    assert len(list(tmp_path.iterdir())) == 1
    torch.testing.assert_close(losses(again), losses(train(case, seed=3)), rtol=1e-4, atol=1e-5)
    assert (
        first.cache["bytes"] == again.cache["bytes"] == 16 * LENGTH * 16 * 4 * 2
    )  # what leaves the frozen block, and the next one's own


@pytest.mark.parametrize("change", ["weights", "depth", "precision"])
def test_another_backbone_never_reads_a_stale_cache(change, tmp_path):
    case = TABLE["gpt2"]
    train(case, cache_prefix=tmp_path)
    if change == "weights":
        model = steered(case)
        with torch.no_grad():
            model.transformer.h[0].mlp.c_fc.weight[0, 0] += 1e-3
        history = train(case, model, cache_prefix=tmp_path)
    elif change == "depth":
        model = case.build()
        model.transformer.ln_f.requires_grad_(True)
        history = train(case, model, cache_prefix=tmp_path)
    else:
        history = train(case, cache_prefix=tmp_path, precision="bf16")
    assert history.cache["misses"] == 4
    assert len(list(tmp_path.iterdir())) == 2


def test_a_precision_that_accelerate_was_told_is_another_cache(tmp_path, monkeypatch):
    case = TABLE["gpt2"]
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    train(case, cache_prefix=tmp_path)
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
    history = train(case, cache_prefix=tmp_path)
    assert history.cache["misses"] == 4
    torch.testing.assert_close(losses(history), losses(train(case)), rtol=1e-4, atol=1e-5)


def test_new_rows_are_computed_and_kept(tmp_path):
    case = TABLE["gpt2"]
    train(case, data=DataLoader(Texts(8), 4), cache_prefix=tmp_path)
    history = train(case, data=DataLoader(Texts(16), 4), cache_prefix=tmp_path)
    torch.testing.assert_close(losses(history), losses(train(case, data=DataLoader(Texts(16), 4))))
    assert history.cache["rows"] == 16


def test_mixed_precision_keeps_its_streams():
    case = TABLE["gpt2"]
    expected = losses(train(case, precision="bf16"))
    history = train(case, precision="bf16", cache_prefix=True)
    torch.testing.assert_close(losses(history), expected, rtol=2e-2, atol=2e-2)
    assert history.cache["hits"] == 8


def test_dropout_above_stays_what_it_was():
    case = TABLE["gpt2"]

    def model():
        found = steered(case, dropout=0.5)
        found.transformer.h[1].mlp.dropout.p = 0.5
        return found

    expected = losses(train(case, model()))
    torch.testing.assert_close(losses(train(case, model(), cache_prefix=True)), expected, rtol=1e-4, atol=1e-5)


def test_running_statistics_of_what_trains_are_not_disturbed_by_the_checks():
    case = TABLE["timm-vit"]

    def model():
        found = case.build()
        torch.manual_seed(0)
        found.head = nn.Sequential(nn.BatchNorm1d(16), nn.Linear(16, 3))
        return rs.steer(found, rank=4, layers=[1], train="head")

    plain, cached = model(), model()
    train(case, plain)
    train(case, cached, cache_prefix=True)
    assert cached.head[0].num_batches_tracked == plain.head[0].num_batches_tracked == STEPS
    torch.testing.assert_close(cached.head[0].running_mean, plain.head[0].running_mean, rtol=1e-4, atol=1e-5)


def refused(case, message, model=None, data=None, **options):
    model = model or steered(case)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    own = [name for name, module in model.named_modules() if "forward" in module.__dict__]
    with pytest.raises(rs.SteerError, match=message):
        train(case, model, data, **{"cache_prefix": True, **options})
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert [name for name, module in model.named_modules() if "forward" in module.__dict__] == own


def test_refusals_name_their_reason():
    gpt2 = TABLE["gpt2"]
    refused(gpt2, "here the first block trains", steered(gpt2, layers=None))
    refused(gpt2, r"lm_head.weight|transformer.wte.weight trains, and the frozen", steered(gpt2, train="lm_head"))
    dropping = steered(gpt2)
    dropping.transformer.h[0].mlp.dropout.p = 0.2
    refused(gpt2, r"is random.*below block 1 \(transformer.h.0.mlp.dropout\)", dropping)
    refused(gpt2, "are augmented", data=DataLoader(Texts(noise=True), 4))
    refused(gpt2, r"16 rows, 448 bytes each, would take .*`cache_limit` is 1e-06", cache_limit=1e-6)
    compiled = steered(gpt2)
    compiled.transformer.h[1] = torch.compile(compiled.transformer.h[1], backend="eager")
    refused(gpt2, "a compiled model does not ask", compiled)
    refused(gpt2, "no known backbone", nn.Linear(3, 3))
    for value in (3, "", None):
        refused(gpt2, f"`cache_prefix` is True, False or a folder; received {value!r}", cache_prefix=value)
    refused(gpt2, "`cache_limit` is a number", cache_limit=-1)


def test_a_loss_that_calls_the_model_twice_is_refused():
    case = TABLE["gpt2"]

    def twice(model, batch):
        return model(**batch).loss + model(**batch).loss

    with pytest.raises(rs.SteerError, match="this one called it, or the model its frozen blocks, 2 times"):
        fit(steered(case), loader(case), steps=2, loss=twice, cache_prefix=True)


def test_a_batch_whose_rows_cannot_be_told_apart_is_refused():
    case = TABLE["gpt2"]
    batch = {"input_ids": Texts().ids[:4], "labels": Texts().ids[:4], "use_cache": False}
    with pytest.raises(rs.SteerError, match=r"in its first dimension, here 4; this batch has False"):
        fit(steered(case), [batch], steps=2, cache_prefix=True)


def test_a_model_that_looks_into_its_lower_blocks_is_refused():
    """Its loss reads what block 0 computes inside, which is not there when the block is handed through."""
    case = TABLE["gpt2"]
    model, seen = steered(case), []
    model.transformer.h[0].mlp.register_forward_hook(lambda _, args, out: seen.append(out.detach().abs().mean()))

    def peeking(model, batch):
        seen.append(torch.zeros(()))
        return model(**batch).loss + 100 * seen[-1].abs()

    with pytest.raises(rs.SteerError, match="with its frozen blocks handed through"):
        fit(model, loader(case), steps=STEPS, loss=peeking, cache_prefix=True)


class Drifting(Texts):
    """Data that stay the same while they are checked and in the first epoch, and then change."""

    reads = 0

    def __getitem__(self, index):
        self.reads += 1
        row = super().__getitem__(index)
        return {key: (ids + max(0, self.reads - 17) // 16) % VOCABULARY for key, ids in row.items()}


def test_data_that_change_between_epochs_are_noticed():
    with pytest.warns(UserWarning, match="no batch of the second epoch"):
        fit(steered(TABLE["gpt2"]), DataLoader(Drifting(), 4), steps=9, cache_prefix=True)


KILLED = """
import os, sys
sys.path.insert(0, {tests!r})
from test_prefix import TABLE, train, steered, loader
import residual_steer as rs
case = TABLE["gpt2"]
model = steered(case)
steps = []
def die(*_):
    steps.append(1)
    if len(steps) == 7:
        os.kill(os.getpid(), 9)
model.lm_head.register_forward_hook(die)
train(case, model, cache_prefix={folder!r})
"""


def test_a_killed_run_leaves_a_cache_that_can_be_read(tmp_path):
    code = KILLED.format(tests=str(Path(__file__).parent), folder=str(tmp_path))
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert finished.returncode == -9
    case = TABLE["gpt2"]
    history = train(case, cache_prefix=tmp_path)
    torch.testing.assert_close(losses(history), losses(train(case)), rtol=1e-4, atol=1e-5)


def test_resuming_with_a_cache(tmp_path):
    case = TABLE["gpt2"]
    expected = losses(train(case))

    class Stop(Exception):
        pass

    model, steps = steered(case), []

    def stop(*_):
        steps.append(1)
        if len(steps) == 9:
            raise Stop

    handle = model.lm_head.register_forward_hook(stop)
    with pytest.raises(Stop):
        train(case, model, save_to=tmp_path, checkpoint_every=2, cache_prefix=True)
    handle.remove()
    history = train(case, steered(case), save_to=tmp_path, resume=True, cache_prefix=True)
    torch.testing.assert_close(losses(history), expected, rtol=1e-4, atol=1e-5)
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])["step"] == STEPS


def test_a_frozen_field_below_is_part_of_what_is_kept(tmp_path):
    """Another strength of it is another stream, which is not read from the folder of the first."""
    case = TABLE["gpt2"]

    def run(weight, **options):
        return train(case, with_frozen(case, weight, layers=[0]), **options)

    for weight in (1.0, -1.0):
        history = run(weight, cache_prefix=tmp_path)
        assert history.cache["misses"] == 4
        torch.testing.assert_close(losses(history), losses(run(weight)), rtol=1e-4, atol=1e-5)
    assert len(list(tmp_path.iterdir())) == 2
