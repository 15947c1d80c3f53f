"""Looking at a model while it runs: what is seen is what the blocks were given and gave, and nothing stays behind."""

import pytest
import torch
from torch import nn

from residual_steer import Backbone, SteerError, find_backbone, steer
from residual_steer.passes import Batch, Streams, batches, has_two_stacks, reading, require_finite, tokens_of
from streams import Block, InPlace, Model


def test_the_stream_that_leaves_a_block_enters_the_next():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=3, n_head=2, vocab_size=32, n_positions=16))
    steer(model, rank=2)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2) if parameter.requires_grad else None
    ids = torch.randint(32, (2, 5))
    backbone = find_backbone(model)
    hooks = [len(block._forward_hooks) + len(block._forward_pre_hooks) for block in backbone.blocks]
    with reading(model), Streams(backbone) as streams:
        seen = model(ids, output_hidden_states=True).hidden_states
    for index in (0, 1, 2):
        assert torch.equal(streams.entering[index], seen[index])
    for index in (0, 1):
        assert torch.equal(streams.leaving[index], streams.entering[index + 1])
    assert hooks == [len(block._forward_hooks) + len(block._forward_pre_hooks) for block in backbone.blocks]


def test_reading_gives_modes_randomness_and_gradients_back():
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(2, 2))
    model[1].eval()
    state = torch.get_rng_state()
    with reading(model):
        assert not model.training
        assert not torch.is_grad_enabled()
        torch.rand(3)
    assert model.training
    assert model[0].training
    assert not model[1].training
    assert torch.is_grad_enabled()
    assert torch.equal(state, torch.get_rng_state())


def test_a_batch_knows_its_labels_its_padding_and_how_it_is_run():
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    ids = torch.arange(6).view(2, 3)
    batch = Batch({"input_ids": ids, "attention_mask": mask, "labels": ids}, 2)
    assert torch.equal(batch.labels, ids)
    assert torch.equal(batch.mask, mask.bool())
    assert tokens_of(torch.zeros(2, 3, 4), batch=batch).shape == (3, 4)
    assert tokens_of(torch.zeros(2, 5, 4), batch=batch).shape == (10, 4)
    pair = Batch((torch.ones(2, 3), torch.zeros(2)), 2)
    assert torch.equal(pair.run(nn.Identity()), torch.ones(2, 3))
    assert torch.equal(pair.labels, torch.zeros(2))
    assert Batch(ids, 2).labels is None
    assert Batch(ids, 2).mask is None
    assert torch.equal(Batch(ids, 2).run(nn.Identity()), ids)


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


@pytest.mark.parametrize("loader", [[], 3, "text", {"input_ids": torch.ones(1)}, torch.ones(2, 2)])
def test_what_is_no_loader_or_gives_nothing_is_refused(loader):
    with pytest.raises(SteerError, match="loader"):
        list(batches(nn.Linear(2, 2), loader))


@pytest.mark.parametrize("batch", [("a", "b"), 3, {}])
def test_a_batch_without_tensors_is_refused(batch):
    with pytest.raises(SteerError, match="a batch is"):
        list(batches(nn.Linear(2, 2), [batch]))


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
        with reading(one), Streams(backbone, indices) as streams:
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
