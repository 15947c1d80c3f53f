"""Prompts, prefixes and VPT: held against sequences put together by hand, and against themselves without a cache."""

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

import residual_steer as rs
from cases import VOCABULARY, WIDTH
from held import HELD
from residual_steer._caches import cache_of, cache_parameter
from residual_steer.baselines.vpt import behind_padding, insert, take_out

BY_NAME = {case.name: case for case in HELD}
TEXTS = [name for name, case in BY_NAME.items() if case.generates]
SSMS = [name for name in TEXTS if name != "gpt2"]
P = 3


def ready(name, method, seed=0, random=True, length=P):
    """Return a model with a method whose tokens are random."""
    model = BY_NAME[name].build()
    torch.manual_seed(seed)
    rs.baselines.apply(model, method, length=length)
    with torch.no_grad():
        for p in tokens(model) if random else ():
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(3)) * 0.5)
    return model


def tokens(model):
    return [p for p in model.parameters() if p.requires_grad]


def words(length=6, rows=2):
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(1))


def close(actual, expected):
    """Compare to a share of the largest entry: some models' logits are small at the start."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-5 * expected.abs().max().item())


@settings(deadline=None, max_examples=60)
@given(
    rows=st.lists(st.integers(0, 5), min_size=1, max_size=4),
    count=st.integers(1, 4),
    extra=st.sampled_from([(), (2,)]),
)
def test_tokens_go_behind_the_padding_and_come_out_again(rows, count, extra):
    mask = torch.tensor([[0] * pads + [1] * (5 - pads) for pads in rows])
    x = torch.arange(len(rows) * 5.0).view(len(rows), 5, *[1] * len(extra)).expand(-1, -1, *extra)
    new = -1 - torch.arange(count * 1.0).view(count, *[1] * len(extra)).expand(-1, *extra)
    place = behind_padding(mask)
    assert place.tolist() == rows
    longer = insert(x, new, place)
    for row, pads in enumerate(rows):
        assert torch.equal(longer[row], torch.cat([x[row, :pads], new, x[row, pads:]]))
        assert torch.equal(insert(x, new, pads)[row], longer[row])
        assert torch.equal(take_out(insert(x, new, pads), count, pads), x)
    assert torch.equal(take_out(longer, count, place), x)


@pytest.mark.parametrize("name", TEXTS)
@torch.no_grad()
def test_a_fresh_prompt_is_random_words_before_the_text(name):
    model, ids = ready(name, "prompt", seed=7, random=False), words()
    torch.manual_seed(7)
    drawn = torch.randperm(VOCABULARY)[:P].expand(2, -1)
    frozen = BY_NAME[name].build()
    close(model(ids).logits, frozen(torch.cat([drawn, ids], 1)).logits[:, P:])
    again = ready(name, "prompt", seed=7, random=False)
    assert torch.equal(*(tokens(m)[0] for m in (model, again)))
    assert not torch.equal(*(tokens(m)[0] for m in (model, ready(name, "prompt", seed=8, random=False))))
    many = ready(name, "prompt", random=False, length=VOCABULARY + 1) if name in SSMS else None
    assert many is None or len(tokens(many)[0]) == VOCABULARY + 1


@pytest.mark.parametrize("method", ["prompt", "vpt-shallow"])
@pytest.mark.parametrize("name", TEXTS)
@torch.no_grad()
def test_a_prompt_is_vectors_before_the_embedded_text(name, method):
    if (name, method) == ("gpt2", "vpt-shallow"):
        return
    model, ids, frozen = ready(name, method), words(), BY_NAME[name].build()
    embedded = torch.cat([tokens(model)[0].expand(2, -1, -1), frozen.get_input_embeddings()(ids)], 1)
    expected = frozen(inputs_embeds=embedded, labels=torch.cat([torch.full((2, P), -100), ids], 1))
    actual = model(ids, labels=ids)
    close(actual.logits, expected.logits[:, P:])
    # a language model shifts its labels itself: the last vector's guess of the first word is not the text's
    loss = torch.nn.functional.cross_entropy(actual.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    close(actual.loss, loss)
    close(model(ids, logits_to_keep=2).logits, actual.logits[:, -2:])


@torch.no_grad()
def test_all_hidden_states_of_a_prompted_model_are_the_texts():
    model = ready("gpt2", "prompt")
    output = model.transformer(words(), output_hidden_states=True)
    assert [tuple(h.shape) for h in output.hidden_states] == [(2, 6, WIDTH)] * 3
    close(output.hidden_states[-1], output.last_hidden_state)
    plain = model.transformer(words(), output_hidden_states=True, return_dict=False)
    close(plain[0], output.last_hidden_state)


@torch.no_grad()
def test_a_fresh_prefix_is_random_words_before_the_text():
    model, ids = ready("gpt2", "prefix", seed=7, random=False), words()
    torch.manual_seed(7)
    drawn = torch.randint(VOCABULARY, (1, P)).expand(2, -1)
    expected = BY_NAME["gpt2"].build()(torch.cat([drawn, ids], 1)).logits[:, P:]
    close(model(ids).logits, expected)
    assert [tuple(p.shape) for p in tokens(model)] == [(2, P, WIDTH // 2)] * 4


@torch.no_grad()
def test_a_prefix_is_keys_and_values_in_the_cache():
    model, ids = ready("gpt2", "prefix"), words()
    cache = DynamicCache()
    for layer in range(2):
        key, value = (
            part[layer].expand(2, -1, -1, -1)
            for part in (model.transformer.prefix.keys, model.transformer.prefix.values)
        )
        cache.update(key, value, layer)
    frozen = BY_NAME["gpt2"].build()
    expected = frozen(ids, **{cache_parameter(frozen): cache}).logits
    close(model(ids).logits, expected)
    close(model(ids, attention_mask=torch.ones_like(ids)).logits, expected)
    close(model(ids, position_ids=torch.arange(6)[None]).logits, expected)


GENERATING = [("gpt2", "prompt"), ("gpt2", "prefix")]
GENERATING += [(name, method) for name in SSMS for method in ("prompt", "vpt-shallow", "vpt-deep")]


def compare_generation(model, frozen):
    ids = words(4)
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    ids = torch.where(mask.bool(), ids, 0)
    common = {"do_sample": False, "min_new_tokens": 5, "max_new_tokens": 5}
    common |= {"output_logits": True, "return_dict_in_generate": True}
    for options in ({}, {"num_beams": 3}):
        cached, plain = (
            model.generate(ids, attention_mask=mask, use_cache=on, **common, **options) for on in (True, False)
        )
        assert torch.equal(cached.sequences, plain.sequences)
        close(torch.stack(cached.logits), torch.stack(plain.logits))
    # the row that was padded is what it is alone, and the tokens act
    alone = model.generate(ids[1:, 2:], **common)
    close(torch.stack(alone.logits)[:, 0], torch.stack(model.generate(ids, attention_mask=mask, **common).logits)[:, 1])
    plain = frozen.generate(ids[1:, 2:], **common)
    assert not torch.allclose(alone.logits[0], plain.logits[0], atol=1e-3)


@pytest.mark.parametrize(("name", "method"), GENERATING)
@torch.no_grad()
def test_generation_with_and_without_the_cache_agree(name, method):
    compare_generation(ready(name, method), BY_NAME[name].build())


@pytest.fixture
def llama():
    """A language model that the methods were not written for, with rotary positions and shared keys."""
    shape = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": 2, "intermediate_size": 32}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return LlamaForCausalLM(LlamaConfig(**shape, **heads, **special)).eval()


@pytest.mark.parametrize("method", ["prompt", "prefix"])
@torch.no_grad()
def test_a_language_model_of_another_family_works_too(llama, method):
    frozen = copy.deepcopy(llama)
    torch.manual_seed(7)
    model, ids = rs.baselines.apply(llama, method, length=P), words()
    torch.manual_seed(7)
    drawn = torch.randperm(VOCABULARY)[:P] if method == "prompt" else torch.randint(VOCABULARY, (P,))
    close(model(ids).logits, frozen(torch.cat([drawn.expand(2, -1), ids], 1)).logits[:, P:])
    for p in tokens(model):
        p.normal_()
    compare_generation(model, frozen)
    assert cache_of(model(ids, use_cache=False)) is None
    assert not any(isinstance(part, DynamicCache) for part in model.model(ids, use_cache=False, return_dict=False))
    assert cache_of(model(ids, use_cache=True)).get_seq_length() == 6 + P


@pytest.mark.parametrize("name", ["mamba_ssm-1", "mamba_ssm-2"])
@pytest.mark.parametrize("method", ["prompt", "vpt-shallow", "vpt-deep"])
@torch.no_grad()
def test_prefill_and_steps_agree_with_the_whole_sequence(name, method):
    model = ready(name, method)
    from mamba_ssm.utils.generation import InferenceParams

    ids = words(7)
    state = InferenceParams(max_seqlen=8, max_batch_size=2)
    state.key_value_memory_dict = model.allocate_inference_cache(2, 8)
    parts = [model(ids[:, :4], inference_params=state).logits]
    for position in range(4, ids.shape[1]):
        state.seqlen_offset = position
        parts.append(model(ids[:, position : position + 1], inference_params=state).logits)
    whole = model(ids).logits
    close(torch.cat(parts, dim=1), whole)
    assert not torch.allclose(whole, BY_NAME[name].build()(ids).logits, atol=1e-3)


@pytest.mark.parametrize("method", ["prompt", "vpt-shallow", "vpt-deep"])
@pytest.mark.parametrize("name", ["mamba_ssm-1", "mamba_ssm-2"])
@torch.no_grad()
def test_a_pair_of_tensors_gets_tokens_in_their_sum(name, method):
    model, ids, frozen = ready(name, method).backbone, words(), BY_NAME[name].build().backbone
    given = tokens(model)
    hidden, residual = frozen.embedding(ids), None
    for index, block in enumerate(frozen.layers):
        if index == 0 or method == "vpt-deep":
            stream = hidden if residual is None else hidden + residual
            stream = stream if index == 0 else stream[:, P:]
            hidden, residual = torch.cat([given[index].expand(2, -1, -1), stream], 1), None
        hidden, residual = block(hidden, residual)
    close(model(ids), frozen.norm_f(hidden + residual)[:, P:])


@pytest.mark.parametrize("method", ["vpt-shallow", "vpt-deep"])
@pytest.mark.parametrize(("name", "prefix"), [("timm-vit", 1), ("timm-deit", 2), ("timm-eva", 1)])
@torch.no_grad()
def test_vpt_stands_behind_the_prefix_tokens(name, prefix, method):
    model, frozen = ready(name, method), BY_NAME[name].build()
    image = torch.randn(2, 3, 16, 16)
    x, rope = frozen.patch_embed(image), {}
    x = frozen._pos_embed(x)
    if name == "timm-eva":
        x, rope = x[0], {"rope": x[1]}
        assert rope["rope"] is not None
        for block in frozen.blocks:  # tokens without a position of their own, as the prefix tokens are
            block.attn.num_prefix_tokens += P
    x = getattr(frozen, "norm_pre", torch.nn.Identity())(x)  # which timm's older EVA has not
    for index, block in enumerate(frozen.blocks):
        if index == 0 or method == "vpt-deep":
            start = 0 if index == 0 else P
            new = tokens(model)[index].expand(2, -1, -1)
            x = torch.cat([x[:, :prefix], new, x[:, prefix + start :]], 1)
        x = block(x, **rope)
    x = torch.cat([x[:, :prefix], x[:, prefix + P :]], 1)
    close(model(image), frozen.forward_head(frozen.norm(x)))


@pytest.mark.parametrize("method", ["vpt-shallow", "vpt-deep"])
@pytest.mark.parametrize(("name", "prefix"), [("hf-vit", 1), ("hf-deit", 2), ("hf-dinov2", 1), ("hf-clip", 1)])
@torch.no_grad()
def test_vpt_stands_behind_the_prefix_tokens_of_transformers(name, prefix, method):
    model, frozen, case = ready(name, method), BY_NAME[name].build(), BY_NAME[name]
    given, seen = tokens(model), {}
    blocks = case.modules(frozen, "block")

    def enter(index):
        def hook(_, args, kwargs):
            x = args[0] if args else kwargs["hidden_states"]
            if index == 0 or method == "vpt-deep":
                rest = x[:, prefix + (P if index else 0) :]
                x = torch.cat([x[:, :prefix], given[index].expand(2, -1, -1), rest], 1)
            return (x, *args[1:]), {k: v for k, v in kwargs.items() if k != "hidden_states"}

        return hook

    def leave(_, args, output):
        seen["out"] = torch.cat([output[:, :prefix], output[:, prefix + P :]], 1)
        return seen["out"]

    for index, block in enumerate(blocks):
        block.register_forward_pre_hook(enter(index), with_kwargs=True)
    blocks[-1].register_forward_hook(leave)
    case.modules(model, "block")[0].register_forward_pre_hook(
        lambda _, args, kwargs: seen.update(entered=args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    close(case.run(model), case.run(frozen))
    assert seen["out"].shape == (2, prefix + 4, WIDTH)
    close(seen["entered"][:, prefix : prefix + P], given[0].expand(2, -1, -1))


@torch.no_grad()
def test_hidden_states_that_were_captured_before_are_those_of_the_image():
    model, case = BY_NAME["hf-vit"].build(), BY_NAME["hf-vit"]
    case.run(model, output_hidden_states=True)  # which installs hooks of transformers'
    rs.baselines.apply(model, "vpt-deep", length=P)
    states = model(**case.inputs(model), output_hidden_states=True).hidden_states
    assert [tuple(state.shape) for state in states[1:]] == [(2, 5, WIDTH)] * 2


@pytest.mark.parametrize(("name", "method"), [("gpt2", "prompt"), ("mamba", "vpt-deep")])
def test_threads_that_serve_one_model_keep_their_calls_apart(name, method):
    model, ids = ready(name, method), words(rows=1)
    masks = [torch.tensor([[0] * pads + [1] * (6 - pads)]) for pads in (0, 2)]

    @torch.no_grad()
    def run(mask):
        return model(ids, attention_mask=mask).logits

    expected = [run(mask) for mask in masks]
    both = threading.Barrier(2, timeout=60)  # inside the last block, so that each enters before the other leaves
    BY_NAME[name].modules(model, "block")[-1].register_forward_pre_hook(lambda *_: (both.wait(), None)[1])
    with ThreadPoolExecutor(2) as threads:
        assert all(map(torch.equal, threads.map(run, masks), expected))


def test_a_copy_after_a_call_that_failed_is_as_good():
    model = ready("gpt2", "prefix")
    with pytest.raises(IndexError):
        model(words() + VOCABULARY, use_cache=False)
    assert copy.deepcopy(model)(words()).logits.shape == (2, 6, VOCABULARY)


@pytest.mark.parametrize("method", ["vpt-shallow", "vpt-deep"])
def test_vpt_draws_its_tokens_from_the_fan_in_of_a_patch(method):
    drawn = tokens(ready("timm-vit", method, random=False, length=100))
    bound = (6 / (3 * 8 * 8 + WIDTH)) ** 0.5
    for weight in drawn:
        assert 0.95 * bound < weight.abs().max() <= bound
    assert len(drawn) == (2 if method == "vpt-deep" else 1)


def test_a_text_that_does_not_fit_is_an_error():
    model = ready("gpt2", "prompt")
    model(words(32 - P))
    with pytest.raises(rs.SteerError, match=r"32 positions, of which the prompt takes 3; this call needs 33"):
        model(words(33 - P))
    with pytest.raises(rs.SteerError, match=r"this call needs 33"):
        model.generate(words(32 - P), attention_mask=torch.ones(2, 32 - P), min_new_tokens=4, max_new_tokens=4)


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_what_has_no_place_for_tokens_is_refused(method):
    model = ready("gpt2", method)
    with pytest.raises(rs.SteerError, match="static cache"):
        model(words(), **{cache_parameter(model): StaticCache(config=model.config, max_cache_len=12)})
    with pytest.raises(rs.SteerError, match="another kind of mask"):
        model(words(), attention_mask=torch.ones(2, 1, 6, 6))


def test_a_prefix_does_not_go_with_checkpointed_activations():
    model = ready("gpt2", "prefix").train()
    model.gradient_checkpointing_enable()
    with pytest.raises(rs.SteerError, match="gradient checkpointing off"):
        model(words())
    prompted = ready("gpt2", "prompt").train()
    expected = prompted(words()).logits
    prompted.gradient_checkpointing_enable()
    close(prompted(words()).logits, expected)


@pytest.mark.parametrize("value", [0, -1, 1.5, True, None])
@pytest.mark.parametrize(
    ("name", "method"), [("gpt2", "prompt"), ("gpt2", "prefix"), ("mamba", "vpt-deep"), ("timm-vit", "vpt-shallow")]
)
def test_a_length_is_a_positive_integer(name, method, value):
    with pytest.raises(rs.SteerError, match="`length` is an integer of at least 1"):
        rs.baselines.apply(BY_NAME[name].build(), method, length=value)


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_a_model_that_goes_past_what_carries_the_tokens_is_found_out(method):
    model = ready("gpt2", method)
    model.forward = lambda ids: model.lm_head(model.transformer.forward(ids).last_hidden_state)
    model(words())
    with pytest.raises(rs.SteerError, match=r"1 of the 1 modules .* transformer"):
        model.train()(words())
