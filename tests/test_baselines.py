"""Every method on every backbone: what it trains, that it trains, and that nothing else moves."""

import copy
import functools
from dataclasses import dataclass

import pytest
import torch
from torch.utils.data import DataLoader

import residual_steer as rs
from held import HELD
from residual_steer.errors import UnsuitableError

OPTIONS = {  # a ReLU with few units may be silent for the one token that a classifier reads
    "hres": {"rank": 4},
    "adaptformer": {"rank": 8},
    "parallel-adapter": {"rank": 8},
    "lora": {"rank": 2},
    "prompt": {"length": 3},
    "prefix": {"length": 3},
    "vpt-shallow": {"length": 3},
    "vpt-deep": {"length": 3},
}
BY_NAME = {case.name: case for case in HELD}
TEXT = ("gpt2", "mamba", "falcon")
SSM = ("mamba", "falcon")
HEADLESS = ("hf-dinov2", "hf-clip")


def reason(method, case):
    """Return what the error of a method that makes no sense on a case says, None for all others."""
    gpt2, ssm = case.name.startswith("gpt2"), case.name.startswith(SSM)
    if method == "adaptformer" and "mlp" not in case.points:
        return r"beside the mlp .* 'parallel-adapter'"
    if method == "prompt" and not case.name.startswith(TEXT):
        return r"'vpt-shallow'"
    if method == "prefix" and ssm:
        return r"no keys and values .* 'prompt'"
    if method == "prefix" and not gpt2:
        return r"'vpt-deep'"
    if method.startswith("vpt") and gpt2:
        return r"'prompt' .* 'prefix'"
    if method == "linear" and case.name in HEADLESS:
        return "has none"
    return None


GRID = [(method, case) for method in rs.baselines.methods() for case in HELD]
MAKES_SENSE = [pytest.param(m, c, id=f"{m}-{c.name}") for m, c in GRID if reason(m, c) is None]
MAKES_NONE = [pytest.param(m, c, id=f"{m}-{c.name}") for m, c in GRID if reason(m, c) is not None]
FROZEN_BASE = ("hres", "adaptformer", "parallel-adapter", "lora", "prompt", "prefix", "vpt-shallow", "vpt-deep", "ssf")
CHANGED = ("prompt", "prefix", "vpt-shallow", "vpt-deep")  # what a fresh one computes is not what the frozen model does

every_sense = pytest.mark.parametrize(("method", "case"), MAKES_SENSE)


def applied(method, case, **more):
    torch.manual_seed(4)
    return rs.baselines.apply(case.build().requires_grad_(True), method, **OPTIONS.get(method, {}), **more)


def trained(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def base_of(model, names):
    """Return the base's tensors by the names they had before a method: PEFT renames those of the layers it adapts."""
    found = {name.replace(".base_layer", ""): tensor for name, tensor in model.state_dict().items()}
    return {name: found[name] for name in names}


@functools.cache
def reached(name):
    """The parameters that plain autograd reaches when everything trains."""
    case = BY_NAME[name]
    model = case.build().train().requires_grad_(True)
    case.loss(model).backward()
    named = model.named_parameters(remove_duplicate=False)  # tied embeddings under both names
    return {name for name, p in named if p.grad is not None and p.grad.abs().max() > 1e-9}


def rows(case):
    """Return four rows of the case's batches, for a loader."""
    torch.manual_seed(5)
    batches = [case.batch() for _ in range(2)]
    keys = [key for key, value in batches[0].items() if isinstance(value, torch.Tensor)]
    return [{key: batch[key][row] for key in keys} for batch in batches for row in range(2)]


def loss_of(model, batch):
    output = model(**batch)
    for name in ("logits", "last_hidden_state"):
        output = getattr(output, name, output)
    return (output.float() * torch.linspace(-1, 1, output.numel()).view(output.shape)).mean()


@dataclass(frozen=True)
class Run:
    """What two steps of `fit` did; tests copy the model before they change it.

    Attributes:
        model: the model, in evaluation mode.
        before: the base's tensors at the start.
        idle: trained tensors without a gradient at the end. Zero-initialised halves need two steps to get one.
    """

    model: torch.nn.Module
    before: dict
    idle: set


@functools.cache
def run_of(method, name):
    case = BY_NAME[name]
    model = applied(method, case)
    before = {key: value.clone() for key, value in base_of(model, case.build().state_dict()).items()}
    rs.fit(model, DataLoader(rows(case), 2), steps=2, lr=3e-3, loss=loss_of, progress=False)
    case.loss(model.train()).backward()
    silent = {key for key, p in trained(model).items() if p.grad is None or p.grad.abs().max() <= 1e-9}
    model.eval().zero_grad()
    return Run(model, before, silent)


@pytest.mark.parametrize(("method", "case"), MAKES_NONE)
def test_a_method_that_makes_no_sense_says_why_and_changes_nothing(method, case):
    model = case.build().requires_grad_(True)
    keys, hooks = list(model.state_dict()), count_hooks(model)
    with pytest.raises(UnsuitableError, match=f"(?s){reason(method, case)}"):
        rs.baselines.apply(model, method, **OPTIONS.get(method, {}))
    assert list(model.state_dict()) == keys
    assert count_hooks(model) == hooks
    assert all(p.requires_grad for p in model.parameters())
    rs.steer(model, rank=2)


def count_hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@every_sense
def test_it_starts_where_the_frozen_model_is(method, case):
    frozen = case.build()
    expected = case.run(frozen)
    model = applied(method, case)
    assert isinstance(model, type(frozen))
    actual = case.run(model)
    assert actual.shape == expected.shape
    if method == "full":  # PyTorch picks another matrix product where a weight requires a gradient
        torch.testing.assert_close(actual, expected)
    else:
        assert torch.equal(actual, expected) is (method not in CHANGED)


@every_sense
def test_fit_trains_what_it_names_and_moves_nothing_else(method, case):
    run = run_of(method, case.name)
    names = {name for name, p in run.model.named_parameters(remove_duplicate=False) if p.requires_grad}
    assert names
    if method in FROZEN_BASE:
        assert not run.idle
        assert not names & set(run.before)
    else:
        assert names - run.idle == names & reached(case.name)
    after = base_of(run.model, run.before)
    moved = {name for name in after if not torch.equal(after[name], run.before[name])}
    assert (names - run.idle) & set(run.before) <= moved <= names


@every_sense
def test_a_copy_and_a_saved_state_compute_the_same(method, case):
    model = run_of(method, case.name).model
    expected = case.run(model)
    twin = copy.deepcopy(model)
    assert torch.equal(case.run(twin), expected)
    with torch.no_grad():
        for p in trained(twin).values():
            p.add_(torch.randn_like(p))  # adding one to every feature would be nothing to a norm
    assert not torch.equal(case.run(twin), expected)
    assert torch.equal(case.run(model), expected)
    saved = {name: p.detach() for name, p in trained(model).items()}
    fresh = applied(method, case)
    missing, unexpected = fresh.load_state_dict(saved, strict=False)
    assert not unexpected
    assert not set(missing) & set(saved)
    assert torch.equal(case.run(fresh), expected)
