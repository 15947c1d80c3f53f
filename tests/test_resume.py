"""Checkpoints: what they hold, what they refuse, and that a run which was cut off ends as if it had not been."""

import json
import random
import signal
import time

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, WeightedRandomSampler

import residual_steer as rs
from apart import apart, killed
from programs import fit_run, fit_sharded, fit_two
from runs import Stop, classifier, fit, pairs, same, stopping_at, weights


def test_a_checkpoint_holds_only_what_trains(tmp_path):
    model = classifier()
    model[0].requires_grad_(False)
    fit(model, pairs(), save_to=tmp_path)
    (path,) = tmp_path.glob("checkpoint-*")
    stored = safetensors.torch.load_file(path / "shared.safetensors")
    trained = model[3].weight.numel() + model[3].bias.numel()
    assert sum(tensor.numel() for tensor in stored.values()) == 3 * trained + 2  # values, two moments, two step counts
    assert {file.suffix for file in path.iterdir()} == {".safetensors", ".json"}


def test_resume_refuses_what_does_not_belong(tmp_path):
    run = tmp_path / "run"
    fit(classifier(), pairs(), save_to=run)
    with pytest.raises(rs.SteerError, match="holds a run already, at step 6"):
        fit(classifier(), pairs(), save_to=run)
    with pytest.raises(rs.SteerError, match=r"changed are lr 0.001 → 0.5"):
        fit(classifier(), pairs(), save_to=run, resume=True, lr=0.5)
    other = nn.Linear(4, 3)
    before = weights(other)
    with pytest.raises(rs.SteerError, match="trains other tensors"):
        fit(other, pairs(), save_to=run, resume=True)
    assert same(weights(other), before)
    for file in ("shared.safetensors", "process-0.json"):
        whole = (run / "checkpoint-6" / file).read_bytes()
        (run / "checkpoint-6" / file).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(rs.SteerError, match="could not resume"):
            fit(classifier(), pairs(), save_to=run, resume=True)
        (run / "checkpoint-6" / file).write_bytes(whole)


def test_a_finished_run_is_returned_as_it_was(tmp_path):
    model = classifier()
    history = fit(model, pairs(), pairs(), save_to=tmp_path)
    again = classifier(seed=9)
    assert fit(again, pairs(), pairs(), save_to=tmp_path, resume=True) == history
    assert same(weights(model), weights(again))


def in_the_way_of_a_folder(path):
    path.write_text("in the way")


def in_the_way_of_a_file(path):
    path.unlink(missing_ok=True)
    path.mkdir()


@pytest.mark.parametrize(
    ("name", "block", "message"),
    [
        ("", in_the_way_of_a_folder, "could not make the folder"),
        (".checkpoint-4.partial", in_the_way_of_a_folder, "could not make the folder .*partial"),
        ("checkpoint-4", in_the_way_of_a_folder, "could not put the checkpoint .*checkpoint-4 in place"),
        ("metrics.jsonl", in_the_way_of_a_file, "could not write .*metrics.jsonl"),
    ],
)
def test_what_cannot_be_written_is_a_clear_error_and_leaves_the_last_checkpoint(tmp_path, name, block, message):
    folder, calls = tmp_path / "run", []

    def loss(model, batch):
        calls.append(1)
        if len(calls) == 4:
            block(folder / name)
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    if not name:
        block(folder)
    with pytest.raises(rs.SteerError, match=message):
        fit(classifier(), pairs(), loss=loss, save_to=folder, checkpoint_every=2, log_every=1)
    if name:
        kept = [path for path in folder.glob("checkpoint-*") if path.is_dir()]
        assert [path.name for path in kept] == ["checkpoint-2"]
        assert safetensors.torch.load_file(kept[0] / "shared.safetensors")
        assert not any(path.is_dir() for path in folder.glob(".checkpoint-*"))


class Cluttered(torch.optim.SGD):
    """An optimizer with a state that no file holds."""

    def step(self, closure=None):
        super().step(closure)
        self.state[self.param_groups[0]["params"][0]]["clutter"] = object()


def test_a_state_that_no_file_holds_is_a_clear_error(tmp_path):
    model = classifier()
    with pytest.raises(rs.SteerError, match=r"holds tensors, numbers and text.*object"):
        fit(model, pairs(), optimizer=Cluttered(model.parameters(), lr=0.1), save_to=tmp_path)


def test_a_line_that_was_being_written_and_those_of_later_steps_are_forgotten(tmp_path):
    whole = fit(classifier(), pairs(), pairs(), save_to=tmp_path, log_every=1)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 9, "loss": 1.0}\n{"kind": "train", "st')
    assert fit(classifier(), pairs(), pairs(), save_to=tmp_path, log_every=1, resume=True) == whole
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 7


def test_a_loader_with_another_number_of_generators_is_refused(tmp_path):
    fit(classifier(), pairs(), save_to=tmp_path, steps=4, checkpoint_every=2)
    other = DataLoader(pairs().dataset, 8, sampler=range(24))
    with pytest.raises(rs.SteerError, match="started with 1 generators in its loader, this loader has 0"):
        fit(classifier(), other, save_to=tmp_path, steps=4, checkpoint_every=2, resume=True)


def wait(moment):
    deadline = time.monotonic() + 60
    while not moment() and time.monotonic() < deadline:
        time.sleep(0.0005)


def test_killed_at_any_moment_and_resumed_it_ends_with_the_same_bits(tmp_path):
    """By processes of another interpreter than the whole run, which hashes otherwise."""
    steps, whole, broken = 40, tmp_path / "whole", tmp_path / "broken"
    fit_run.main(whole, steps)
    aims = random.Random(3)
    moments = [  # in a step, while a checkpoint is filled, when one has just been put in place
        lambda: any(broken.glob("checkpoint-*")) and time.sleep(aims.uniform(0, 0.05)) is None,
        lambda: any(path.name not in seen for path in broken.glob(".checkpoint-*.partial")),
        lambda: any(path.name not in seen for path in broken.glob("checkpoint-*")),
    ]
    reached = [0]
    for moment in moments:
        seen = {path.name for path in broken.glob("*checkpoint-*")}
        assert killed(fit_run.apart, broken, steps, when=lambda moment=moment: wait(moment)) == -signal.SIGKILL
        names = [path.name for path in broken.glob("checkpoint-*")]
        reached.append(max((int(name.split("-")[1]) for name in names), default=0))
    assert reached == sorted(reached)
    assert 0 < reached[-1] < steps
    apart(fit_run.apart, broken, steps)
    files = [folder / "final" / "steering.safetensors" for folder in (whole, broken)]
    assert files[0].read_bytes() == files[1].read_bytes()
    journals = []
    for folder in (whole, broken):
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        journals.append([(line["kind"], line["step"], line["loss"]) for line in lines])
    assert journals[0] == journals[1]


def test_two_processes_make_the_losses_of_one(tmp_path):
    """Means of means: with unequal counts of labels, a process without any, a last batch of one row, on real gloo."""
    fit_two.main(tmp_path / "1")
    apart(fit_two.two, tmp_path / "2")
    one, two = (
        [json.loads(line) for line in (tmp_path / folder / "metrics.jsonl").read_text().splitlines()]
        for folder in ("1", "2")
    )
    assert len(list((tmp_path / "2" / "checkpoint-8").glob("process-*.json"))) == 2
    assert [(r["kind"], r["step"]) for r in one] == [(r["kind"], r["step"]) for r in two]
    for a, b in zip(one, two, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a.get("grad_norm", 0.0) == pytest.approx(b.get("grad_norm", 0.0), rel=1e-4)


def test_references_that_fsdp2_replaced_are_not_held_on_to(tmp_path):
    """A GPT-2, a ViT and a Mamba, sharded: cleared, clipped, measured, saved and resumed as the whole model is."""
    apart(fit_sharded.every, tmp_path)
    whole, *sharded = (json.loads((tmp_path / name / "found.json").read_text()) for name in ("whole", "1", "2"))
    for name, records in whole.items():
        assert len(records) == 7
        assert min(norm for _, _, norm in records[:-1]) > 0.05  # so that every step is clipped
        for other in sharded:
            for one, two in zip(records, other[name], strict=True):
                assert two == pytest.approx(one, rel=1e-4)


def test_references_are_taken_once_prepare_has_replaced_the_parameters(monkeypatch):
    """As accelerate's `prepare` does under FSDP2, which takes a GPU."""
    expected, model = classifier(), classifier()
    history = fit(expected, pairs(), clip=0.3, log_every=1)

    def prepare(processes, model, optimizer):
        replaced = {}
        for module in model.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                replaced[parameter] = nn.Parameter(parameter.detach().clone())
                setattr(module, name, replaced[parameter])
        for group in optimizer.param_groups:
            group["params"] = [replaced[parameter] for parameter in group["params"]]
        return model

    monkeypatch.setattr("residual_steer.training.processes.Processes.prepare", prepare)
    again = fit(model, pairs(), clip=0.3, log_every=1)
    assert [r["grad_norm"] for r in again.train] == [r["grad_norm"] for r in history.train]
    assert same(weights(model), weights(expected))


def test_resume_with_another_optimizer_is_refused(tmp_path):
    fit(classifier(), pairs(), save_to=tmp_path)
    model = classifier()
    before = weights(model)
    with pytest.raises(rs.SteerError, match=r"optimizer 'AdamW' → 'SGD'"):
        fit(model, pairs(), save_to=tmp_path, resume=True, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    halves = [{"params": model[0].parameters()}, {"params": model[3].parameters()}]
    with pytest.raises(rs.SteerError, match="does not fit this optimizer"):
        fit(model, pairs(), save_to=tmp_path, resume=True, optimizer=torch.optim.AdamW(halves))
    assert same(weights(model), before)


class Odd(torch.utils.data.Sampler):
    """A sampler that keeps its generator under a name of its own."""

    def __init__(self):
        self.rng = torch.Generator().manual_seed(11)

    def __iter__(self):
        yield from torch.randperm(24, generator=self.rng).tolist()

    def __len__(self):
        return 24


class Augmented(TensorDataset):
    """Rows with noise of every generator."""

    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        return x + torch.randn(4) + random.random() + float(np.random.rand()), y


@pytest.mark.parametrize("kind", ["no seed", "own sampler", "own generator", "weighted sampler"])
def test_the_order_of_data_is_resumed_whoever_shuffles(tmp_path, kind):
    def loader():
        data = Augmented(*pairs().dataset.tensors)
        if kind == "own sampler":
            return DataLoader(data, 8, sampler=Odd())
        if kind == "weighted sampler":
            return DataLoader(data, 8, sampler=WeightedRandomSampler(torch.arange(1.0, 25.0), 24))
        generator = torch.Generator().manual_seed(4) if kind == "own generator" else None
        return DataLoader(data, 8, shuffle=True, generator=generator)

    options = {"steps": 10, "seed": None if kind == "no seed" else 0, "checkpoint_every": 1}
    whole, broken, resumed = classifier(), classifier(), classifier()
    torch.manual_seed(7)
    fit(whole, loader(), save_to=tmp_path / "whole", **options)
    stopping_at(broken[0], 6)
    torch.manual_seed(7)
    with pytest.raises(Stop):
        fit(broken, loader(), save_to=tmp_path / "broken", **options)
    torch.manual_seed(123)  # another process, in another state
    fit(resumed, loader(), save_to=tmp_path / "broken", resume=True, **options)
    assert same(weights(whole), weights(resumed))
