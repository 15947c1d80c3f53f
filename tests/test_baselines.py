"""Every method on every backbone: what it trains, that it trains, and that nothing else moves."""

import copy
import functools
from dataclasses import dataclass

import pytest
import torch
from torch.utils.data import DataLoader

import residual_steer as rs
from baseline_models import MODELS, applied, snapshot, trained
from residual_steer.errors import UnsuitableError


def reason(method, name):
    """Return what the error of a method that makes no sense on a model says, None for all others."""
    gpt2, ssm = name.startswith("gpt2"), name.startswith(("mamba", "falcon"))
    refusals = {
        "adaptformer": ("mlp" not in MODELS[name].points, "beside the mlp .* 'parallel-adapter'"),
        "prompt": (not (gpt2 or ssm), "'vpt-shallow'"),
        "prefix": (not gpt2, "no keys and values .* 'prompt'" if ssm else "'vpt-deep'"),
        "vpt-shallow": (gpt2, "'prompt' .* 'prefix'"),
        "vpt-deep": (gpt2, "'prompt' .* 'prefix'"),
        "linear": (name in ("hf-dinov2", "hf-clip"), "has none"),
    }
    refused, words = refusals.get(method, (False, None))
    return words if refused else None


LIKE_OTHERS = (
    "hf-deit",
    "hf-dinov2",
    "falcon-mamba",
)  # here as hf-vit, hf-clip, mamba; tokens and LoRA are tried on them
GRID = [(method, name) for method in rs.baselines.methods() for name in MODELS if name not in LIKE_OTHERS]
OF_THE_BASE = ("bitfit", "linear", "full")
CHANGED = ("prompt", "prefix", "vpt-shallow", "vpt-deep")  # what a fresh one computes is not what the frozen model does

every_sense = pytest.mark.parametrize(("method", "name"), [pair for pair in GRID if reason(*pair) is None])


def base_of(model, names):
    """Return the base's tensors by the names they had before a method: PEFT renames those of the layers it adapts."""
    found = {name.replace(".base_layer", ""): tensor for name, tensor in model.state_dict().items()}
    return {name: found[name] for name in names}


@functools.cache
def reached(name):
    """The parameters that plain autograd reaches when everything trains."""
    model = MODELS[name].build().train().requires_grad_(True)
    MODELS[name].loss(model).backward()
    named = model.named_parameters(remove_duplicate=False)  # tied embeddings under both names
    return {name for name, p in named if p.grad is not None and p.grad.abs().max() > 1e-9}


def rows(case):
    """Return four rows of the case's batches, for a loader."""
    torch.manual_seed(5)
    batches = [{k: v for k, v in case.batch().items() if isinstance(v, torch.Tensor)} for _ in range(2)]
    return [{key: value[row] for key, value in batch.items()} for batch in batches for row in range(2)]


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
    case = MODELS[name]
    model = applied(case.build().requires_grad_(True), method)
    before = {key: value.clone() for key, value in base_of(model, case.build().state_dict()).items()}
    rs.fit(model, DataLoader(rows(case), 2), steps=2, lr=3e-3, loss=loss_of, progress=False)
    case.loss(model.train()).backward()
    idle = {key for key, p in trained(model).items() if p.grad is None or p.grad.abs().max() <= 1e-9}
    model.eval().zero_grad()
    return Run(model, before, idle)


@pytest.mark.parametrize(("method", "name"), [pair for pair in GRID if reason(*pair) is not None])
def test_a_method_that_makes_no_sense_says_why_and_changes_nothing(method, name):
    model = MODELS[name].build().requires_grad_(True)
    before = snapshot(model)
    with pytest.raises(UnsuitableError, match=f"(?s){reason(method, name)}"):
        applied(model, method)
    assert snapshot(model) == before
    rs.steer(model, rank=2)


@every_sense
def test_it_starts_where_the_frozen_model_is(method, name):
    frozen = MODELS[name].build()
    expected = MODELS[name].run(frozen)
    model = applied(copy.deepcopy(frozen).requires_grad_(True), method)
    assert isinstance(model, type(frozen))
    actual = MODELS[name].run(model)
    assert actual.shape == expected.shape
    if method == "full":  # PyTorch picks another matrix product where a weight requires a gradient
        torch.testing.assert_close(actual, expected)
    else:
        assert torch.equal(actual, expected) is (method not in CHANGED)


@pytest.mark.filterwarnings("ignore:.*got no gradient in the first step")  # a bias behind what the loss reads
@every_sense
def test_fit_trains_what_it_names_and_moves_nothing_else(method, name):
    run = run_of(method, name)
    names = {key for key, p in run.model.named_parameters(remove_duplicate=False) if p.requires_grad}
    assert names
    if method in OF_THE_BASE:
        assert names - run.idle == names & reached(name)
    else:
        assert not run.idle
        assert not names & set(run.before)
    after = base_of(run.model, run.before)
    moved = {key for key in after if not torch.equal(after[key], run.before[key])}
    assert (names - run.idle) & set(run.before) <= moved <= names


@pytest.mark.filterwarnings("ignore:.*got no gradient in the first step")
@every_sense
def test_a_copy_and_a_saved_state_compute_the_same(method, name):
    case, model = MODELS[name], run_of(method, name).model
    expected = case.run(model)
    twin = copy.deepcopy(model)
    assert torch.equal(case.run(twin), expected)
    with torch.no_grad():
        for p in trained(twin).values():
            p.add_(torch.randn_like(p))  # adding one to every feature would be nothing to a norm
    assert not torch.equal(case.run(twin), expected)
    assert torch.equal(case.run(model), expected)
    saved = {key: p.detach() for key, p in trained(model).items()}
    fresh = applied(name, method)
    missing, unexpected = fresh.load_state_dict(saved, strict=False)
    assert not unexpected
    assert not set(missing) & set(saved)
    assert torch.equal(case.run(fresh), expected)
