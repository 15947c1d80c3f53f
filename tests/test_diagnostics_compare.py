"""What a diagnostic compares: a model with its fields on and off, or with a reference; everything comes back."""

import copy

import pytest
import torch
from torch import nn

import residual_steer as rs
from cases import randomise
from residual_steer._controller import steering_of
from residual_steer.diagnostics.compare import SIDES, beside, compare

IDS = torch.arange(12).view(3, 4)


@pytest.fixture
def frozen():
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=32, n_positions=16)).eval()


def test_a_steered_model_is_its_own_reference(frozen):
    expected = frozen(IDS).logits
    model, seen = randomise(rs.steer(frozen, rank=2)).train(), {}
    with compare(model) as pair:
        (batch,) = pair.batches([IDS])
        for side in SIDES:
            with pair.on(side) as one:
                seen[side] = batch.run(one).logits
    assert torch.equal(seen["frozen"], expected)
    assert not torch.equal(seen["adapted"], expected)
    assert not seen["adapted"].requires_grad
    assert model.training
    assert pair.models["frozen"] is pair.models["adapted"]


def test_a_reference_is_run_as_it_is(frozen):
    model = rs.baselines.apply(copy.deepcopy(frozen), "prompt", length=2)
    with compare(model, frozen) as pair:
        (batch,) = pair.batches(iter([IDS]))
        with pair.on("frozen") as one:
            assert one is frozen
            assert torch.equal(batch.run(one).logits, frozen(IDS).logits)
        with pair.on("adapted") as one:
            assert one is model
    assert pair.backbones["frozen"].blocks is frozen.transformer.h
    assert pair.backbones["adapted"].blocks is model.transformer.h
    assert pair.inner is frozen.transformer


def test_a_failure_in_the_middle_leaves_the_selection_as_it_was(frozen):
    model = randomise(rs.steer(frozen, rank=2))
    expected, mix = model(IDS).logits, steering_of(model)[1].mix
    learn = [p for p in model.parameters() if p.requires_grad]
    with pytest.raises(KeyboardInterrupt), compare(model) as pair, pair.on("frozen"):
        raise KeyboardInterrupt
    assert steering_of(model)[1].mix == mix
    assert all(p.requires_grad for p in learn)
    assert torch.equal(model(IDS).logits, expected)


def short(model):
    model = copy.deepcopy(model)
    model.transformer.h = nn.ModuleList(model.transformer.h[:1])
    return model


@pytest.mark.parametrize(
    ("pair", "match"),
    [
        (lambda frozen: (frozen,), "not steered has no frozen self"),
        (lambda frozen: ("gpt2",), "received str"),
        (lambda frozen: (frozen, 3), "received int"),
        (lambda frozen: (frozen, frozen), "is the model itself"),
        (lambda frozen: (frozen, copy.deepcopy(frozen).to("meta")), "on meta"),
        (lambda frozen: (frozen, short(frozen)), "it has 2, and the reference 1"),
        (lambda frozen: (off(frozen),), "no field acts"),
    ],
)
def test_what_cannot_be_compared_is_refused(frozen, pair, match):
    with pytest.raises(rs.SteerError, match=match), compare(*pair(frozen)):
        pass


def off(frozen):
    rs.use(rs.steer(frozen, rank=2), None)
    return frozen


def test_new_tokens_stand_behind_the_prefix():
    z = torch.randn(5, 6, 4)
    for prefix in (0, 1, 3):
        longer = torch.cat([z[:, :prefix], torch.randn(5, 2, 4), z[:, prefix:]], 1)
        assert torch.equal(beside(longer, z, prefix), z)
    assert torch.equal(beside(z, z, 1), z)
    for other, word in ((z[:, 1:], "5 tokens where .* 6"), (z[1:], "backbone"), (z[..., 1:], "backbone")):
        with pytest.raises(rs.SteerError, match=word):
            beside(other, z, 1)
