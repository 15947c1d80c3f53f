"""Requests under many fields in one continuous batch equal transformers with the same field alone."""

import json
import shutil
import types

import proof
import pytest
import torch
from proof import ASKED, CONFIGS, FIELDS, Reference, answers, ask, differ, engine, make_base, make_fields, metric

import residual_steer as rs

CLOSE = 3e-5  # of log-probabilities, in fp32
ATTENTION = {"llama", "qwen3", "gpt2"}  # whose cache has blocks of 32 tokens here


@pytest.fixture(scope="module", params=CONFIGS)
def case(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    base = make_base(folder / "base", request.param)
    folders = make_fields(base, folder / "fields")
    reference = Reference(base, folders)
    texts = proof.prompts()
    wanted = answers(reference, texts, ASKED)
    assert len({tuple(one.tokens) for one in wanted}) == 12  # else a wrong field would go unnoticed
    return types.SimpleNamespace(
        kind=request.param, base=base, folders=folders, reference=reference, texts=texts, wanted=wanted
    )


@pytest.fixture(scope="module")
def llm(case):
    """One engine with a slot for every field; where vLLM can, it keeps what it computed of a prompt."""
    started = engine(
        case.base, enable_prefix_caching=case.kind in ATTENTION, block_size=32 if case.kind in ATTENTION else None
    )
    yield started
    proof.stop(started)


def requests(case, asked):
    return [None if name is None else rs.vllm.request(case.folders[name]) for name in asked]


def check(case, found, asked=ASKED, texts=None):
    wanted = case.wanted if texts is None and asked is ASKED else answers(case.reference, texts or case.texts, asked)
    same, gap = differ(found, wanted)
    print(f"\n{case.kind}: {same} of {len(wanted)} equal, largest difference of a log-probability {gap:.1e}")
    assert same == len(wanted)
    assert gap < CLOSE


def test_a_mixed_batch(case, llm):
    check(case, ask(llm, case.texts, requests(case, ASKED)))


def test_one_field_on_every_request(case, llm):
    check(case, ask(llm, case.texts, requests(case, ["code"] * 12)), ["code"] * 12)


def test_a_mix_takes_one_slot(case, llm):
    mix = {"small": 0.7, "code": -0.3}
    request = rs.vllm.request({case.folders[name]: weight for name, weight in mix.items()})
    asked = [mix, None, "law"] * 4
    check(case, ask(llm, case.texts, [request, *requests(case, asked[1:3])] * 4), asked)


def test_what_was_computed_under_one_field_is_not_used_under_another(case, llm):
    if case.kind not in ATTENTION:
        pytest.skip("prefix caching is off: vLLM's cache of states has blocks longer than these prompts")
    texts = proof.prompts(seed=1, low=70, high=90)
    ask(llm, texts, requests(case, ASKED))
    before = metric(llm, "vllm:prefix_cache_hits")
    check(case, ask(llm, texts, requests(case, ASKED)), texts=texts)
    after = metric(llm, "vllm:prefix_cache_hits")
    assert after - before >= 12 * 32
    other = ["small", "flat", "last", "law", None, "code", "wide", "squad", "flat", "last", "small", "code"]
    assert all(one != two for one, two in zip(ASKED, other, strict=True))
    check(case, ask(llm, texts, requests(case, other)), other, texts)
    assert metric(llm, "vllm:prefix_cache_hits") == after


def test_a_field_that_is_saved_anew_meets_nothing_of_the_old_one(case, llm, tmp_path):
    if case.kind not in ATTENTION:
        pytest.skip("prefix caching is off")
    texts = proof.prompts(seed=2, low=70, high=90)[:3]
    place = tmp_path / "field"
    shutil.copytree(case.folders["law"], place)
    old = rs.vllm.request(place)
    check(case, ask(llm, texts, [old] * 3), ["law"] * 3, texts)
    shutil.rmtree(place)
    shutil.copytree(case.folders["squad"], place)
    new = rs.vllm.request(place)
    hits = metric(llm, "vllm:prefix_cache_hits")
    check(case, ask(llm, texts, [new] * 3), ["squad"] * 3, texts)
    assert metric(llm, "vllm:prefix_cache_hits") == hits
    check(case, ask(llm, texts, [old, new, old]), ["law", "squad", "law"], texts)  # the old file is still open
    again = type(old)("again", 12345, json.dumps(json.loads(old.lora_path), indent=1))
    with pytest.raises(Exception, match="saved anew since this request was made"):
        llm.llm_engine.add_lora(again)


def test_what_does_not_fit_is_refused_and_the_rest_goes_on(case, llm, tmp_path):
    if case.kind != "llama":
        pytest.skip("one model is enough")
    law, kind = case.folders["law"], type(rs.vllm.request(case.folders["law"]))
    small = make_base(tmp_path / "small", "llama", hidden_size=32)
    narrow = make_fields(small, tmp_path, {"narrow": {"rank": 2}})["narrow"]
    gpt2 = make_fields(make_base(tmp_path / "gpt2", "gpt2"), tmp_path, {"foreign": {"rank": 2}})["foreign"]
    wide = make_fields(case.base, tmp_path, {"fat": {"rank": 9}})["fat"]
    for folder, message in (
        (narrow, "4 blocks of width 32; this server has llama, 4 of width 64"),
        (gpt2, "trained on gpt2"),
        (wide, "need 9 units of a slot.*--max-lora-rank"),
        ({law: 1.0, case.folders["last"]: 1.0}, "need 9 units"),
    ):
        with pytest.raises(Exception, match=message):
            ask(llm, case.texts[:1], [rs.vllm.request(folder)])
    good = rs.vllm.request(law)
    ask(llm, case.texts[:1], [good])
    for request, message in (
        (kind("law", 7, law), "names the contents of its field"),
        (kind("none", 8, str(tmp_path / "none")), "there is none, or a damaged one"),
        (kind("other", good.lora_int_id, rs.vllm.request(case.folders["flat"]).lora_path), "is that of"),
        (kind("law", 9, good.lora_path, load_inplace=True), "not reloaded in place"),
    ):
        with pytest.raises(rs.SteerError, match=message):  # in this process, where a wrong request ends nothing
            ask(llm, case.texts[:1], [request])
        with pytest.raises(Exception, match=message):  # in that of the model
            llm.llm_engine.add_lora(request)
    with pytest.raises(Exception, match="not pinned"):
        llm.llm_engine.pin_lora(good.lora_int_id)
    check(case, ask(llm, case.texts, requests(case, ASKED)))


def test_requests_without_a_field_equal_the_unsteered_engine_bit_for_bit(case, llm):
    """From here on `llm` is not asked again: an engine that stops ends the process groups that it shares."""
    mixed = ask(llm, case.texts, requests(case, ASKED))
    none = ask(llm, case.texts, None)
    plain = engine(case.base, fields=False, enable_prefix_caching=False)
    try:
        frozen = ask(plain, case.texts)
    finally:
        proof.stop(plain)
    assert [one for one, name in zip(mixed, ASKED, strict=True) if name is None] == [
        one for one, name in zip(frozen, ASKED, strict=True) if name is None
    ]
    assert none == frozen
    steered = [one.tokens != other.tokens for one, other, name in zip(mixed, frozen, ASKED, strict=True) if name]
    assert all(steered)
    assert len(FIELDS) == 7


def test_a_crowded_engine(case):
    """Two slots and room for three fields in memory, chunks of 24 tokens, and too few blocks for all requests."""
    crowded = {"max_loras": 2, "max_cpu_loras": 3, "max_num_batched_tokens": 24, "enable_prefix_caching": False}
    if case.kind in ATTENTION:
        crowded |= {"num_gpu_blocks_override": 5, "block_size": 32, "max_model_len": 64}
    llm = engine(case.base, **crowded)
    try:
        check(case, ask(llm, case.texts, requests(case, ASKED)))
        if case.kind in ATTENTION:
            assert metric(llm, "vllm:num_preemptions") > 0
        assert len(llm.llm_engine.list_loras()) <= 3
    finally:
        proof.stop(llm)


def test_in_bf16_every_prompt_is_as_likely_as_transformers_finds_it(case):
    """Tokens need not be equal, since both round; the field's own effect is far larger than what rounding does."""
    if case.kind not in {"llama", "mamba2"}:
        pytest.skip("a stream in a pair with fused norms, and one of an SSM, are enough")
    reference = Reference(case.base, case.folders, dtype=torch.bfloat16)

    def likelihoods(asked):
        found = []
        for text, name in zip(case.texts, asked, strict=True):
            with rs.use(reference.model, name), torch.no_grad():
                rows = reference.model(torch.tensor([text])).logits[0].float().log_softmax(-1)
            found.append(rows[:-1].gather(1, torch.tensor(text[1:])[:, None])[:, 0])
        return found

    llm = engine(case.base, dtype="bfloat16", enable_prefix_caching=False)
    try:
        how = proof.SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
        given = [{"prompt_token_ids": text} for text in case.texts]
        done = llm.generate(given, how, lora_request=requests(case, ASKED), use_tqdm=False)
    finally:
        proof.stop(llm)
    steered, frozen = likelihoods(ASKED), likelihoods([None] * 12)
    for out, text, name, wanted, without in zip(done, case.texts, ASKED, steered, frozen, strict=True):
        steps = zip(out.prompt_logprobs[1:], text[1:], strict=True)
        found = torch.tensor([step[token].logprob for step, token in steps])
        rounding, effect = (found - wanted).abs().mean(), (found - without).abs().mean()
        print(f"\n{case.kind} {name}: {rounding:.3f} from transformers with the field, {effect:.3f} without")
        assert effect > 5 * rounding if name else effect < 0.1
