"""Prompts, prefixes and VPT: against sequences put together by hand, and against themselves without a cache."""

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

import residual_steer as rs
from baseline_models import MODELS, applied, shaken, trained
from cases import VOCABULARY, WIDTH
from cases.ssm import in_steps
from residual_steer._caches import cache_of, cache_parameter
from residual_steer.baselines.vpt import behind_padding, insert, take_out

TEXTS = [name for name, case in MODELS.items() if case.generates]
SSMS = [name for name in TEXTS if name != "gpt2"]
P = 3


def ready(name, method, **options):
    """Return a model with a method whose tokens are random."""
    return shaken(applied(name, method, length=P, **options))


def tokens(model):
    return list(trained(model).values())


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
    x, new = torch.randn(len(rows), 5, *extra), torch.randn(count, *extra)
    place = behind_padding(mask)
    assert place.tolist() == rows
    longer = insert(x, new, place)
    for row, pads in enumerate(rows):
        assert torch.equal(longer[row], torch.cat([x[row, :pads], new, x[row, pads:]]))
        assert torch.equal(insert(x, new, pads)[row], longer[row])
        assert torch.equal(take_out(insert(x, new, pads), count, pads), x)
    assert torch.equal(take_out(longer, count, place), x)


@pytest.mark.parametrize(("name", "method"), [*((name, "prompt") for name in TEXTS), ("gpt2", "prefix")])
@torch.no_grad()
def test_a_fresh_one_is_random_words_before_the_text(name, method):
    model, again, other = (applied(name, method, seed=seed, length=P) for seed in (7, 7, 8))
    torch.manual_seed(7)
    drawn = torch.randperm(VOCABULARY)[:P] if method == "prompt" else torch.randint(VOCABULARY, (P,))
    longer = torch.cat([drawn.expand(2, -1), words()], 1)
    close(model(words()).logits, MODELS[name].build()(longer).logits[:, P:])
    assert torch.equal(tokens(model)[0], tokens(again)[0])
    assert not torch.equal(tokens(model)[0], tokens(other)[0])
    if name in SSMS:
        assert len(tokens(applied(name, method, length=VOCABULARY + 1))[0]) == VOCABULARY + 1
    if method == "prefix":
        assert [tuple(p.shape) for p in tokens(model)] == [(2, P, WIDTH // 2)] * 4


@pytest.mark.parametrize(
    ("name", "method"), [*((name, "prompt") for name in TEXTS), *((name, "vpt-shallow") for name in SSMS)]
)
@torch.no_grad()
def test_a_prompt_is_vectors_before_the_embedded_text(name, method):
    model, ids, frozen = ready(name, method), words(), MODELS[name].build()
    embedded = torch.cat([tokens(model)[0].expand(2, -1, -1), frozen.get_input_embeddings()(ids)], 1)
    actual = model(ids, labels=ids)
    close(actual.logits, frozen(inputs_embeds=embedded).logits[:, P:])
    # a language model shifts its labels itself: the last vector's guess of the first word is not the text's
    close(actual.loss, functional.cross_entropy(actual.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))
    close(model(ids, logits_to_keep=2).logits, actual.logits[:, -2:])
    close(model(inputs_embeds=frozen.get_input_embeddings()(ids)).logits, actual.logits)


@torch.no_grad()
def test_hidden_states_are_those_of_the_text_or_image():
    model = ready("gpt2", "prompt")
    output = model.transformer(words(), output_hidden_states=True)
    assert [tuple(h.shape) for h in output.hidden_states] == [(2, 6, WIDTH)] * 3
    close(output.hidden_states[-1], output.last_hidden_state)
    close(model.transformer(words(), return_dict=False)[0], output.last_hidden_state)

    case, model = MODELS["hf-vit"], MODELS["hf-vit"].build()
    case.run(model, output_hidden_states=True)  # which installs hooks of transformers'
    applied(model, "vpt-deep")
    states = model(**case.inputs(model), output_hidden_states=True).hidden_states
    assert [tuple(state.shape) for state in states[1:]] == [(2, 5, WIDTH)] * 2


@torch.no_grad()
def test_a_prefix_is_keys_and_values_in_the_cache():
    model, frozen, ids, cache = ready("gpt2", "prefix"), MODELS["gpt2"].build(), words(), DynamicCache()
    for layer, pair in enumerate(zip(model.transformer.prefix.keys, model.transformer.prefix.values, strict=True)):
        cache.update(*(part.expand(2, -1, -1, -1) for part in pair), layer)
    expected = frozen(ids, **{cache_parameter(frozen): cache}).logits
    for more in ({}, {"attention_mask": torch.ones_like(ids)}, {"position_ids": torch.arange(6)[None]}):
        close(model(ids, **more).logits, expected)


@torch.no_grad()
def test_a_prompt_counts_positions_on_and_is_of_the_first_kind():
    model, ids, frozen = ready("gpt2", "prompt"), words(), MODELS["gpt2"].build()
    embedded = torch.cat([tokens(model)[0].expand(2, -1, -1), frozen.get_input_embeddings()(ids)], 1)
    call = {"position_ids": torch.tensor([[0, 1, 2, 5, 6, 7]]), "token_type_ids": torch.ones_like(ids)}
    after = torch.cat([torch.arange(P)[None], call["position_ids"] + P], 1)
    kinds = torch.cat([torch.zeros(2, P, dtype=ids.dtype), call["token_type_ids"]], 1)
    expected = frozen(inputs_embeds=embedded, position_ids=after, token_type_ids=kinds)
    close(model(ids, **call).logits, expected.logits[:, P:])
    with pytest.raises(ValueError, match="input_ids or inputs_embeds"):  # the model's own
        model()


def compare_generation(model, frozen):
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    ids = torch.where(mask.bool(), words(4), 0)
    common = {"do_sample": False, "min_new_tokens": 5, "max_new_tokens": 5}
    common |= {"output_logits": True, "return_dict_in_generate": True}
    for beams in (3, 1):
        cached, plain = (
            model.generate(ids, attention_mask=mask, use_cache=on, num_beams=beams, **common) for on in (True, False)
        )
        assert torch.equal(cached.sequences, plain.sequences)
        close(torch.stack(cached.logits), torch.stack(plain.logits))
    # the row that was padded is what it is alone, and the tokens act
    alone = torch.stack(model.generate(ids[1:, 2:], **common).logits)
    close(alone[:, 0], torch.stack(cached.logits)[:, 1])
    assert not torch.allclose(alone[0], frozen.generate(ids[1:, 2:], **common).logits[0], atol=1e-3)


ON_SSMS = [(name, method) for name in SSMS for method in ("prompt", "vpt-shallow", "vpt-deep")]


@pytest.mark.parametrize(("name", "method"), [("gpt2", "prompt"), ("gpt2", "prefix"), *ON_SSMS])
@torch.no_grad()
def test_generation_with_and_without_the_cache_agree(name, method):
    compare_generation(ready(name, method), MODELS[name].build())


@pytest.mark.parametrize("method", ["prompt", "prefix"])
@torch.no_grad()
def test_a_language_model_of_another_family_works_too(method):
    """With rotary positions and shared keys, for which the methods were not written."""
    shape = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": 2, "intermediate_size": 32}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    llama = LlamaForCausalLM(LlamaConfig(**shape, **special, num_attention_heads=4, num_key_value_heads=2)).eval()
    frozen, ids = copy.deepcopy(llama), words()
    model = applied(llama, method, seed=7, length=P)
    torch.manual_seed(7)
    drawn = torch.randperm(VOCABULARY)[:P] if method == "prompt" else torch.randint(VOCABULARY, (P,))
    close(model(ids).logits, frozen(torch.cat([drawn.expand(2, -1), ids], 1)).logits[:, P:])
    compare_generation(shaken(model), frozen)
    assert cache_of(model(ids, use_cache=False)) is None
    assert not any(isinstance(part, DynamicCache) for part in model.model(ids, use_cache=False, return_dict=False))
    assert cache_of(model(ids, use_cache=True)).get_seq_length() == 6 + P


ON_PAIRS = [(name, m) for name in ("mamba_ssm-1", "mamba_ssm-2") for m in ("prompt", "vpt-shallow", "vpt-deep")]


@pytest.mark.parametrize(("name", "method"), ON_PAIRS)
@torch.no_grad()
def test_prefill_and_steps_agree_with_the_whole_sequence(name, method):
    model, ids = ready(name, method), words(7)
    whole = model(ids).logits
    close(in_steps(model, ids), whole)
    assert not torch.allclose(whole, MODELS[name].build()(ids).logits, atol=1e-3)


@pytest.mark.parametrize(("name", "method"), ON_PAIRS)
@torch.no_grad()
def test_a_pair_of_tensors_gets_tokens_in_their_sum(name, method):
    model, ids, frozen = ready(name, method).backbone, words(), MODELS[name].build().backbone
    given = tokens(model)
    hidden, residual = frozen.embedding(ids), None
    for index, block in enumerate(frozen.layers):
        if index == 0 or method == "vpt-deep":
            stream = hidden if residual is None else hidden + residual
            stream = stream if index == 0 else stream[:, P:]
            hidden, residual = torch.cat([given[index].expand(2, -1, -1), stream], 1), None
        hidden, residual = block(hidden, residual)
    close(model(ids), frozen.norm_f(hidden + residual)[:, P:])


PREFIX_TOKENS = {"timm-vit": 1, "timm-deit": 2, "timm-eva": 1, "hf-vit": 1, "hf-deit": 2, "hf-dinov2": 1, "hf-clip": 1}


@pytest.mark.parametrize("method", ["vpt-shallow", "vpt-deep"])
@pytest.mark.parametrize("name", PREFIX_TOKENS)
@torch.no_grad()
def test_vpt_stands_behind_the_prefix_tokens(name, method):
    case, prefix, model, frozen = MODELS[name], PREFIX_TOKENS[name], ready(name, method), MODELS[name].build()
    given, seen, blocks = tokens(model), {}, case.modules(frozen, "block")

    def entering(args, kwargs):
        return args[0] if args else kwargs["hidden_states"]

    def enter(index):
        def hook(_, args, kwargs):
            x = entering(args, kwargs)
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
        if name == "timm-eva":
            block.attn.num_prefix_tokens += P  # without a position of their own, as the prefix tokens are
    blocks[-1].register_forward_hook(leave)
    case.modules(model, "block")[0].register_forward_pre_hook(
        lambda _, args, kwargs: seen.update(entered=entering(args, kwargs)), with_kwargs=True
    )
    close(case.run(model), case.run(frozen))
    assert seen["out"].shape == (2, prefix + 4, WIDTH)
    close(seen["entered"][:, prefix : prefix + P], given[0].expand(2, -1, -1))


@pytest.mark.parametrize("method", ["vpt-shallow", "vpt-deep"])
def test_vpt_draws_its_tokens_from_the_fan_in_of_a_patch(method):
    drawn = tokens(applied("timm-vit", method, length=100))
    bound = (6 / (3 * 8 * 8 + WIDTH)) ** 0.5
    for weight in drawn:
        assert 0.95 * bound < weight.abs().max() <= bound
    assert len(drawn) == (2 if method == "vpt-deep" else 1)


@pytest.mark.parametrize(("name", "method"), [("gpt2", "prompt"), ("mamba", "vpt-deep")])
def test_threads_that_serve_one_model_keep_their_calls_apart(name, method):
    model, ids = ready(name, method), words(rows=1)
    masks = [torch.tensor([[0] * pads + [1] * (6 - pads)]) for pads in (0, 2)]

    @torch.no_grad()
    def run(mask):
        return model(ids, attention_mask=mask).logits

    expected = [run(mask) for mask in masks]
    both = threading.Barrier(2, timeout=60)  # inside the last block, so that each enters before the other leaves
    MODELS[name].modules(model, "block")[-1].register_forward_pre_hook(lambda *_: (both.wait(), None)[1])
    with ThreadPoolExecutor(2) as threads:
        assert all(map(torch.equal, threads.map(run, masks), expected))


def test_a_copy_after_a_call_that_failed_is_as_good():
    model = ready("gpt2", "prefix")
    with pytest.raises(IndexError):
        model(words() + VOCABULARY, use_cache=False)
    assert copy.deepcopy(model)(words()).logits.shape == (2, 6, VOCABULARY)


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
    for length in (0, True):
        with pytest.raises(rs.SteerError, match=f"`length`.* received {length}"):
            applied("gpt2", method, length=length)
    model.forward = lambda ids: model.lm_head(model.transformer.forward(ids).last_hidden_state)
    model(words())
    with pytest.raises(rs.SteerError, match=r"1 of the 1 modules .* transformer"):  # which carries the tokens
        model.train()(words())


def test_vpt_is_refused_where_a_mask_or_stream_has_no_place_for_it():
    model = ready("timm-vit", "vpt-deep")
    with pytest.raises(rs.SteerError, match="ready-made"):
        model.blocks[0](torch.zeros(2, 5, WIDTH), attn_mask=torch.ones(5, 5))
    with pytest.raises(rs.SteerError, match=r"\(batch, length, width\); this block was given \(5, 16\)"):
        model.blocks[0](torch.zeros(5, WIDTH))


def test_a_prefix_does_not_go_with_checkpointed_activations():
    model = ready("gpt2", "prefix").train()
    model.gradient_checkpointing_enable()
    with pytest.raises(rs.SteerError, match="gradient checkpointing off"):
        model(words())
    prompted = ready("gpt2", "prompt").train()
    expected = prompted(words()).logits
    prompted.gradient_checkpointing_enable()
    close(prompted(words()).logits, expected)
