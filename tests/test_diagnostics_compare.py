"""What a diagnostic compares: a model with its fields on and off, or with a reference; everything comes back."""

import copy

import pytest
import torch
from torch import nn

import residual_steer as rs
from cases import randomise
from residual_steer._controller import steering_of
from residual_steer.diagnostics.compare import SIDES, compare


@pytest.fixture
def frozen():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=32, n_positions=16)).eval()


IDS = torch.arange(12).view(3, 4)


def test_a_steered_model_is_its_own_reference(frozen):
    expected = frozen(IDS).logits
    model = randomise(rs.steer(frozen, rank=2)).train()
    with compare(model) as pair:
        for batch in pair.batches([IDS]):
            seen = {}
            for side in SIDES:
                with pair.on(side) as one:
                    seen[side] = batch.run(one).logits
    assert torch.equal(seen["frozen"], expected)
    assert not torch.equal(seen["adapted"], expected)
    assert seen["adapted"].requires_grad is False
    assert model.training
    assert pair.models["frozen"] is pair.models["adapted"]


def test_a_reference_is_run_as_it_is(frozen):
    model = rs.baselines.apply(copy.deepcopy(frozen), "prompt", length=2)
    with compare(model, frozen) as pair:
        for batch in pair.batches(iter([IDS])):
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


def test_what_cannot_be_compared_is_refused(frozen):
    def begin(model, reference=None):
        with compare(model, reference) as pair:
            pair.backbones["frozen"]

    with pytest.raises(rs.SteerError, match="not steered has no frozen self"):
        begin(frozen)
    with pytest.raises(rs.SteerError, match="received str"):
        begin("gpt2")
    with pytest.raises(rs.SteerError, match="received int"):
        begin(frozen, 3)
    with pytest.raises(rs.SteerError, match="is the model itself"):
        begin(frozen, frozen)
    with pytest.raises(rs.SteerError, match="on meta"):
        begin(frozen, copy.deepcopy(frozen).to("meta"))
    short = copy.deepcopy(frozen)
    short.transformer.h = nn.ModuleList(short.transformer.h[:1])
    with pytest.raises(rs.SteerError, match="it has 2, and the reference 1"):
        begin(frozen, short)
    rs.use(rs.steer(frozen, rank=2), None)
    with pytest.raises(rs.SteerError, match="no field acts"):
        begin(frozen)
