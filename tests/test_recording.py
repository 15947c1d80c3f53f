"""Looking at a model while it runs: what is seen is what the blocks were given and gave, and nothing stays behind."""

import random

import numpy as np
import pytest
import torch
from torch import nn

from cases import TABLE
from residual_steer import Backbone, SteerError, find_backbone, steer
from residual_steer._batches import Batch, batches, has_two_stacks, require_finite, tokens_of
from residual_steer.recording import changed, record, undisturbed, watch
from sharp import steered
from streams import Block, InPlace, Model


def test_the_stream_that_leaves_a_block_enters_the_next():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=3, n_head=2, vocab_size=32, n_positions=16))
    steer(model, rank=2)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2) if parameter.requires_grad else None
    ids = torch.randint(32, (2, 5))
    backbone = find_backbone(model)
    model(ids, output_hidden_states=True)  # for which transformers leaves a hook of its own on every block
    hooks = [len(block._forward_hooks) + len(block._forward_pre_hooks) for block in backbone.blocks]
    with undisturbed(model), record(backbone) as streams:
        seen = model(ids, output_hidden_states=True).hidden_states
    for index in (0, 1, 2):
        assert torch.equal(streams.entering[index], seen[index])
    for index in (0, 1):
        assert torch.equal(streams.leaving[index], streams.entering[index + 1])
    assert hooks == [len(block._forward_hooks) + len(block._forward_pre_hooks) for block in backbone.blocks]


def test_undisturbed_gives_modes_randomness_and_gradients_back_also_after_an_error():
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(2, 2))
    model[1].eval()
    state = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()

    def fail():
        assert not model.training
        assert not torch.is_grad_enabled()
        torch.rand(3), random.random(), np.random.rand(700)
        raise KeyError

    with pytest.raises(KeyError), undisturbed(model):
        fail()
    assert [module.training for module in model.modules()] == [True, True, False]
    assert torch.is_grad_enabled()
    assert torch.equal(state[0], torch.get_rng_state())
    assert state[1:] == (random.getstate(), np.random.get_state()[1].tolist())


def field_of(model, site):
    state = model._residual_steering
    return state.backbone.point(0, site), state.fields("default")[site, 0]


@pytest.mark.parametrize("site", ["block", "mixer", "mlp", "input", "after", "mlp.c_fc"])
@torch.no_grad()
def test_what_a_field_reads_and_what_its_module_gives_alone(site):
    case = TABLE["gpt2"]
    model = steered(case.build(), site=site, layers=[0])
    host, field = field_of(model, site)
    calls = []
    host.register_forward_hook(lambda _, args, output: calls.append((args[0], output)))
    with record(model, [0], site=site) as seen, record(model, [0], site=site, alone=True) as alone:
        case.run(model)
    (args, output), z = calls[0], seen.entering[0]
    args = alone.leaving[0] if site == "after" else args
    left = output[0] if isinstance(output, tuple) else output
    assert torch.equal(seen.leaving[0], left)
    assert torch.equal(alone.entering[0], z)
    if site == "input":
        torch.testing.assert_close(args, z + field(z))  # what the module received
        assert torch.equal(alone.leaving[0], left)
    else:
        assert torch.equal(args, z)
        torch.testing.assert_close(left, alone.leaving[0] + field(z))


def test_modules_are_recorded_call_by_call_in_the_order_of_their_last():
    one, other = nn.Linear(2, 2), nn.Linear(2, 2)
    with record({"one": one, "other": other}) as seen:
        first = one(torch.ones(2))
        other(first)
        second = one(2 * torch.ones(2))
    one(torch.zeros(2))
    assert list(seen.calls) == ["other", "one"]
    assert [call.left.tolist() for call in seen.calls["one"]] == [first.tolist(), second.tolist()]
    assert torch.equal(seen.entering["one"], 2 * torch.ones(2))
    assert not seen.leaving["other"].requires_grad
    assert not (one._forward_hooks)
    assert not (one._forward_pre_hooks)


@pytest.mark.parametrize(("name", "site", "blocks"), [("jamba", "mlp", [0, 1]), ("nemotron-h", "mixer", [0, 2])])
def test_blocks_without_the_part_are_passed_over(name, site, blocks):
    model = TABLE[name].build()
    with record(model, site=site) as seen:
        TABLE[name].run(model)
    assert sorted(seen.calls) == blocks


def test_watching_can_replace_and_changes_are_taken_back():
    linear = nn.Linear(2, 2)
    x = torch.ones(2)
    with watch([linear], lambda _, args, kwargs: ((0 * args[0],), kwargs), lambda *call: call[-1] + 1):
        assert torch.equal(linear(x), linear.bias + 1)
    assert torch.equal(linear(x), linear.weight.sum(1) + linear.bias)
    with pytest.raises(KeyError, match="7"), changed([linear], "in_features", 7):
        raise KeyError(linear.in_features)
    assert linear.in_features == 2


def test_a_batch_knows_its_labels_its_padding_and_how_it_is_run():
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    ids = torch.arange(6).view(2, 3)
    batch = Batch({"input_ids": ids, "attention_mask": mask, "labels": ids})
    assert torch.equal(batch.labels, ids)
    assert torch.equal(batch.mask, mask.bool())
    assert tokens_of(torch.zeros(2, 3, 4), batch=batch).shape == (3, 4)
    with pytest.warns(UserWarning, match=r"\(2, 3\) tokens.*\(2, 5\): all of them count"):
        assert tokens_of(torch.zeros(2, 5, 4), batch=batch).shape == (10, 4)
    whole = Batch({"input_ids": ids, "attention_mask": torch.ones(2, 3)})
    assert tokens_of(torch.zeros(2, 5, 4), batch=whole).shape == (10, 4)
    pair = Batch((torch.ones(2, 3), torch.zeros(2)))
    assert torch.equal(pair.run(nn.Identity()), torch.ones(2, 3))
    assert torch.equal(pair.labels, torch.zeros(2))
    assert Batch(ids).labels is None
    assert Batch(ids).mask is None
    assert torch.equal(Batch(ids).run(nn.Identity()), ids)


def test_the_mask_of_an_encoder_is_not_that_of_its_decoder():
    from transformers import BartConfig, BartForConditionalGeneration

    sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8}
    heads = {"encoder_attention_heads": 1, "decoder_attention_heads": 1}
    both = BartForConditionalGeneration(BartConfig(vocab_size=8, d_model=8, **sizes, **heads))
    encoder = both.get_encoder()
    assert encoder.config.is_encoder_decoder
    content = {"input_ids": torch.ones(2, 3).long(), "attention_mask": torch.tensor([[1, 1, 0], [1, 0, 0]])}
    for model, two in ((both, True), (nn.Sequential(both), True), (encoder, False), (nn.Linear(2, 2), False)):
        assert has_two_stacks(model) == two
        (batch,) = batches(model, [content])
        assert (batch.mask is None) == two


def test_tokens_of_a_convnet_are_its_pixels():
    z = torch.arange(2 * 3 * 2 * 2.0).view(2, 3, 2, 2)
    assert torch.equal(tokens_of(z, channels=1)[1], z[0, :, 0, 1])


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        *((loader, "loader") for loader in ([], 3, "text", {"input_ids": torch.ones(1)}, torch.ones(2, 2))),
        *(([batch], "a batch is") for batch in (("a", "b"), 3, {})),
    ],
)
def test_what_is_no_loader_of_batches_or_gives_nothing_is_refused(loader, message):
    with pytest.raises(SteerError, match=message):
        list(batches(nn.Linear(2, 2), loader))


def out_of_place(model):
    """The model of `InPlace` blocks with blocks that leave their input alone."""
    plain = Model(Block)
    for block in plain.body:
        block.norm = nn.Identity()
    plain.load_state_dict({key: value for key, value in model.state_dict().items() if "norm" not in key})
    return plain


@pytest.mark.parametrize("indices", [None, [1]])
def test_blocks_that_work_in_place_are_seen_before_they_do_and_before_the_next_one_does(indices):
    model = Model(InPlace)
    ids = torch.randint(4, (2, 3))
    seen = []
    for one, inplace in ((model, True), (out_of_place(model), False)):
        backbone = Backbone(blocks=one.body, width=8, inplace=inplace)
        with undisturbed(one), record(backbone, indices) as streams:
            one(ids)
        seen.append(streams)
    found, expected = seen
    assert list(found.leaving) == list(found.entering) == (indices or [0, 1, 2])
    for index in found.leaving:
        assert torch.equal(found.entering[index], expected.entering[index])
        assert torch.equal(found.leaving[index], expected.leaving[index])


def test_nan_is_refused():
    require_finite("x", torch.ones(3))
    with pytest.raises(SteerError, match="2 values of 3"):
        require_finite("x", torch.tensor([1.0, float("nan"), float("inf")]))
