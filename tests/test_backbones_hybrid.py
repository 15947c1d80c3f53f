"""Hybrids, whose blocks have different parts, and recurrences, which carry a state from step to step."""

import pytest
import torch

import residual_steer as rs
from cases import CASES, LENGTH, RANK, randomise
from residual_steer._caches import cache_of, cache_parameter

TABLE = {case.name: case for case in CASES}


def test_zambas_entries_have_fields_of_their_own_around_shared_weights():
    case = TABLE["zamba2"]
    model = rs.steer(case.build(), rank=RANK)
    first, second = case.modules(model, "block")
    ties = zip(first.shared_transformer.parameters(), second.shared_transformer.parameters(), strict=True)
    assert all(a is b for a, b in ties)
    fields = [block.steering_block.fields["default"] for block in (first, second)]
    assert fields[0] is not fields[1]
    assert not any("steering" in name for name, _ in first.shared_transformer.named_modules())


def test_zambas_entries_learn_apart():
    case = TABLE["zamba2"]
    model = randomise(rs.steer(case.build(), rank=RANK))
    case.loss(model).backward()
    first, second = (block.steering_block.fields["default"].up.weight.grad for block in case.modules(model, "block"))
    assert first.abs().max() > 0
    assert second.abs().max() > 0
    assert not torch.allclose(first, second)


def test_a_block_without_the_part_is_named_and_left_out():
    model = TABLE["nemotron-h"].build()
    with pytest.raises(rs.SteerError, match=r"'mixer' .* block 1 \(NemotronHBlock\), only in layers=\[0, 2\]"):
        rs.steer(model, site="mixer", rank=RANK)
    with pytest.raises(rs.SteerError, match=r"site 'mlp' is not there in block 0 .*, only in layers=\[1\]"):
        rs.steer(model, site="mlp", rank=RANK)
    assert rs.summary(rs.steer(model, site="mixer", layers=[0, 2], rank=RANK)).trainable > 0


def test_where_two_mixers_run_side_by_side_the_state_space_model_is_steered():
    model = rs.steer(TABLE["falcon-h1"].build(), site="mixer", rank=RANK)
    names = [name for name, module in model.named_modules() if isinstance(module, rs.HRes)]
    assert [name.split(".")[3] for name in names] == ["mamba", "mamba"]


@pytest.mark.parametrize("site", ["block", "mixer", "mlp", "input"])
@torch.no_grad()
def test_rwkv_generates_with_its_state_what_it_does_without(site):
    """Row by row: in transformers 5.23 the step of one token mixes the rows of a batch, in the frozen model too."""
    case = TABLE["rwkv"]
    model = randomise(rs.steer(case.build(), rank=RANK, site=site))
    prompt = case.inputs(model)["input_ids"][:1, :4]
    settings = {"do_sample": False, "min_new_tokens": 5, "max_new_tokens": 5}
    settings |= {"output_logits": True, "return_dict_in_generate": True}
    cached, plain = (model.generate(prompt, use_cache=use_cache, **settings) for use_cache in (True, False))
    assert torch.equal(cached.sequences, plain.sequences)
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(plain.logits), rtol=0, atol=1e-5)


def test_an_rwkv_that_halves_its_stream_in_evaluation_mode_is_refused():
    model = TABLE["rwkv"].build()
    model.config.rescale_every = 1
    with pytest.raises(rs.SteerError, match=r"halves its stream after every 1 blocks.*model.config.rescale_every = 0"):
        rs.steer(model, rank=RANK)
    model.config.rescale_every = 2  # which halves it behind the last block alone
    rs.steer(model, rank=RANK)


@pytest.mark.parametrize("name", ["jamba", "zamba2", "nemotron-h", "falcon-h1", "qwen3-next", "lfm2"])
@torch.no_grad()
def test_a_prompt_and_then_single_tokens_give_what_the_whole_sequence_gives(name):
    case = TABLE[name]
    model = randomise(rs.steer(case.build(), rank=RANK))
    ids = case.inputs(model)["input_ids"]
    state = model(ids[:, :4], use_cache=True)
    parts = [state.logits]
    for position in range(4, LENGTH):
        state = model(ids[:, position : position + 1], use_cache=True, **{cache_parameter(model): cache_of(state)})
        parts.append(state.logits)
    torch.testing.assert_close(torch.cat(parts, 1), case.run(model), rtol=0, atol=2e-5)
