"""What goes wrong most easily with models of text: which hidden state is whose, norms behind sums, shared blocks."""

import pytest
import torch

import residual_steer as rs
from cases import CASES, RANK, randomise

TABLE = {case.name: case for case in CASES}
DECODERS = ["gpt2", "gpt-neox", "falcon", "gemma3", "qwen2-moe", "opt", "jamba", "recurrent-gemma"]


def streams(case, model):
    """Return what enters and what leaves every block, behind all hooks, in the order of the calls."""
    entered, left, handles = [], [], []
    for block in case.modules(model, "block"):
        handles.append(
            block.register_forward_pre_hook(
                lambda _, args, kwargs: entered.append(case.enter(args, kwargs)), with_kwargs=True
            )
        )
        handles.append(block.register_forward_hook(lambda _, args, output: left.append(case.leave(output))))
    case.run(model)
    for handle in handles:
        handle.remove()
    return entered, left


@pytest.mark.parametrize("name", ["bert", "albert", "deberta-v2", "distilbert", "modernbert", "gemma3", "opt", "bart"])
@torch.no_grad()
def test_what_leaves_a_steered_block_is_what_the_next_one_reads(name):
    """In post-norm blocks too, whose norm stands behind the sum; DeBERTa has a convolution behind its first block."""
    case = TABLE[name]
    model = randomise(rs.steer(case.build(), rank=RANK))
    entered, left = streams(case, model)
    pairs = list(zip(left, entered[1:], strict=False))
    if name == "bart":
        pairs.pop(1)  # from the encoder to the decoder
    same = [torch.equal(out, into) for out, into in pairs]
    assert same == [name != "deberta-v2"] * len(pairs)


@pytest.mark.parametrize("name", DECODERS)
@torch.no_grad()
def test_a_field_on_a_block_moves_the_hidden_states_behind_it_alone(name):
    """Hidden state 0 is the embedding's, and i + 1 what leaves block i; the last one is behind the final norm."""
    case = TABLE[name]
    frozen = case.build()(**case.inputs(case.build()), output_hidden_states=True).hidden_states
    model = case.build()
    model(**case.inputs(model), output_hidden_states=True)  # installs hooks of transformers before ours
    randomise(rs.steer(model, rank=RANK, layers=[1]))
    steered = model(**case.inputs(model), output_hidden_states=True).hidden_states
    assert [torch.equal(a, b) for a, b in zip(steered, frozen, strict=True)] == [True, True, False]
    rs.unsteer(model)
    randomise(rs.steer(model, rank=RANK, layers=[0]))
    steered = model(**case.inputs(model), output_hidden_states=True).hidden_states
    assert [torch.equal(a, b) for a, b in zip(steered, frozen, strict=True)] == [True, False, False]


@torch.no_grad()
def test_alberts_shared_block_is_steered_whenever_it_is_used():
    case = TABLE["albert"]
    model = randomise(rs.steer(case.build(), rank=RANK, layers=[0]))
    frozen = case.build()
    block, twin = case.modules(model, "block")[0], case.modules(frozen, "block")[0]
    field = block.steering_block.fields["default"]
    calls = []
    block.register_forward_hook(lambda _, args, output: calls.append((args, output)))
    case.run(model)
    assert len(calls) == 2
    for args, output in calls:
        torch.testing.assert_close(output, twin(*args) + field(args[0]), rtol=0, atol=1e-5)
    assert len(rs.parameters(model)) == 4, "one field, however often it runs"


def test_alberts_field_learns_from_every_use():
    case = TABLE["albert"]
    model = randomise(rs.steer(case.build(), rank=RANK, layers=[0]))
    outputs = []
    block = case.modules(model, "block")[0]
    block.register_forward_hook(lambda _, args, output: outputs.append(output) or output.retain_grad())
    case.loss(model).backward()
    bias = block.steering_block.fields["default"].up.bias
    expected = sum(output.grad.sum((0, 1)) for output in outputs)
    torch.testing.assert_close(bias.grad, expected, rtol=1e-4, atol=1e-7)


def test_experts_are_one_feed_forward():
    backbone = rs.find_backbone(TABLE["deepseek-v3"].build())
    assert [type(backbone.point(i, "mlp")).__name__ for i in range(2)] == ["DeepseekV3MLP", "DeepseekV3MoE"]


@pytest.mark.parametrize("name", ["opt", "bert", "bart"])
def test_a_feed_forward_that_is_no_module_is_no_site(name):
    with pytest.raises(rs.SteerError, match="has the sites block, mixer, input; received 'mlp'"):
        rs.steer(TABLE[name].build(), site="mlp")


@torch.no_grad()
def test_left_padding_changes_nothing_for_the_tokens_that_are_there():
    case = TABLE["gemma3"]
    model = randomise(rs.steer(case.build(), rank=RANK))
    ids = case.inputs(model)["input_ids"]
    padded = torch.cat([torch.zeros_like(ids[:, :2]), ids], 1)
    mask = torch.cat([torch.zeros_like(ids[:, :2]), torch.ones_like(ids)], 1)
    expected = model(ids).logits
    actual = model(padded, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits[:, 2:]
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
