"""Fields that act on the prompt alone: training sees what cached generation does, and what is unclear is refused."""

import copy

import pytest
import torch
from peft import PromptTuningConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode

import residual_steer as rs
from cases import TABLE, randomise
from residual_steer.recording import watch
from silent import tiny

FAMILIES = [TABLE[name] for name in ("gpt2", "mamba")]
families = pytest.mark.parametrize("case", FAMILIES, ids=lambda case: case.name)
PROMPT = 4


def steered(case=FAMILIES[0], **more):
    model = case.build()
    rs.steer(model, rank=3, name="law", **more)
    rs.steer(model, rank=2, name="art", site="mixer")
    randomise(model)
    rs.use(model, "law", on="prompt")
    return model, case.inputs(model)["input_ids"]


def answers(ids):
    """Return labels of the tokens behind the prompt."""
    labels = ids.clone()
    labels[:, :PROMPT] = -100
    return labels


@torch.no_grad()
def by_hand(model, ids, mix, **more):
    """Return the logits of a text whose prompt is read under a mix and whose rest by the frozen model, with a cache."""
    with rs.use(model, mix):
        first = model(ids[:, :PROMPT], use_cache=True, **more)
    with rs.use(model, None):
        rest = [
            model(ids[:, place : place + 1], use_cache=True, cache=first.cache).logits for place in range(PROMPT, 8)
        ]
    return torch.cat([first.logits, *rest], dim=1)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@families
@pytest.mark.parametrize("mix", ["law", {"law": 0.5, "art": -1.0}, ["law", "art"], [None, "law"]], ids=str)
def test_training_sees_what_cached_decoding_does(case, mix):
    model, ids = steered(case)
    ids = ids[:, :8] if ids.shape[1] >= 8 else ids.repeat(1, 8)[:, :8]
    expected = by_hand(model, ids, mix)
    rs.use(model, mix, on="prompt")
    mask = torch.arange(8).expand(2, 8) < PROMPT
    for call in ({"labels": answers(ids)}, {"prompt_mask": mask}):
        close(model(ids, **call).logits.detach(), expected)
    assert not torch.allclose(model(ids).logits, expected, atol=1e-3)  # the whole text is the prompt
    with rs.use(model, mix):
        whole = model(ids).logits
    assert torch.equal(model(ids).logits, whole)
    with torch.no_grad():
        first = model(ids[:, :PROMPT], use_cache=True)
        second = model(ids[:, PROMPT : PROMPT + 1], use_cache=True, cache=first.cache).logits
    close(torch.cat([first.logits, second], dim=1), expected[:, : PROMPT + 1])


@families
@pytest.mark.parametrize("more", [{}, {"num_beams": 2}, {"cache_implementation": "static"}], ids=str)
@torch.no_grad()
def test_generate_decodes_as_the_frozen_model(case, more):
    if case.name == "mamba" and "cache_implementation" in more:
        return
    model, ids = steered(case)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0  # padded on the left
    settings = {"attention_mask": mask, "max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, **more}
    actual = model.generate(ids, return_dict_in_generate=True, output_logits=True, **settings)
    called = []

    def switch(model, args, kwargs):
        called.append(kwargs["input_ids"].shape[1])
        rs.use(model, "law" if len(called) == 1 else None)

    handle = model.register_forward_pre_hook(switch, with_kwargs=True, prepend=True)
    expected = model.generate(ids, return_dict_in_generate=True, output_logits=True, **settings)
    handle.remove()
    assert torch.equal(actual.sequences, expected.sequences)
    for one, other in zip(actual.logits, expected.logits, strict=True):
        close(one, other)
    assert called == [ids.shape[1], 1, 1, 1]


@pytest.mark.filterwarnings("ignore:Position ids are not supported")  # by PEFT's prompts
@torch.no_grad()
def test_generate_counts_the_tokens_of_its_prompt():
    """Read in chunks, the last of one token, or with guesses of an assistant behind it, it is the same prompt."""
    model, ids = steered()
    ids = torch.cat([ids, ids], dim=1)[:1, :5]
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    expected = model.generate(ids, **settings)
    assert not torch.equal(expected, generated_under(model, None, ids, settings))
    ways = [{"prefill_chunk_size": size} for size in (1, 2, 4)]
    ways += [{"prompt_lookup_num_tokens": 3}, {"assistant_model": FAMILIES[0].build()}]
    ways += [{"input_ids": None, "inputs_embeds": model.get_input_embeddings()(ids)}]
    for way in ways:
        actual = model.generate(**{"input_ids": ids, **settings, **way})
        assert torch.equal(actual[:, -6:], expected[:, -6:]), way
    with refused("has tokens already"):
        model.generate(ids, **settings, cache=model(ids[:, :3], use_cache=True).cache)
    assert torch.equal(copy.deepcopy(model).generate(ids, **settings), expected)
    tuned, seen = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)), []
    rs.use(model, "law", on="prompt")
    actual = tuned.generate(input_ids=ids, **settings)  # what stands in front of a prompt is read with it

    def switch(model, args, kwargs):
        rs.use(model, None if seen else "law")
        seen.append(kwargs.get("inputs_embeds"))

    with watch([model], switch, first=True):
        assert torch.equal(actual, tuned.generate(input_ids=ids, **settings))
    assert seen[0].shape[1] == 7
    assert "generate" not in vars(rs.unsteer(model))


def generated_under(model, mix, ids, settings):
    with rs.use(model, mix):
        return model.generate(ids, **settings)


@families
@torch.no_grad()
def test_decoding_runs_the_operations_of_the_frozen_model(case):
    model, ids = steered(case)

    class Count(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.found = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.found.append(str(func))
            return func(*args, **(kwargs or {}))

    def decoding(mix, on):
        rs.use(model, mix, on=on)
        cache = model(ids, use_cache=True).cache
        with Count() as count:
            model(ids[:, :1], use_cache=True, cache=cache)
        return count.found

    assert decoding("law", "prompt") == decoding(None, "all")
    assert decoding("law", "prompt") != decoding("law", "all")


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_computes_the_same_prompt_again_whatever_was_selected_since(reentrant):
    model, ids = steered()
    rs.thaw(model, "law")
    model.train()

    def gradients(labels, after=None):
        model.zero_grad()
        loss = model(ids, labels=labels).loss
        other = model(ids, labels=ids)  # another call, with no prompt at all
        if after is not None:
            rs.use(model, after, on="prompt")
        loss.backward()
        rs.use(model, "law", on="prompt")
        del other
        return [p.grad.clone() for p in rs.parameters(model, "law")]

    expected = gradients(answers(ids))
    assert any(g.abs().max() > 0 for g in expected)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for after in (None, {"law": 1.0}):
        for actual, right in zip(gradients(answers(ids), after), expected, strict=True):
            torch.testing.assert_close(actual, right)


def test_gradients_are_those_of_the_prompt_alone():
    model, ids = steered()
    model(ids, labels=ids).loss.backward()  # no prompt
    assert all(p.grad is None or not p.grad.any() for p in rs.parameters(model))


def refused(words):
    return pytest.raises(rs.SteerError, match=words)


def test_what_may_be_a_prompt_or_not_is_refused():
    model, ids = steered()
    labels = answers(ids)
    with torch.no_grad():
        with rs.use(model, "law"):
            elsewhere = model(ids, use_cache=True).cache
        begun = model(ids, use_cache=True).cache
        with refused("cache that another call began, by 1 tokens"):
            model(ids[:, :1], cache=elsewhere)
        with refused("has tokens already, by 3 tokens"):
            model(ids[:, :3], cache=begun)
        with refused("cache that another call began"):
            model(ids[:, :1], cache=copy.deepcopy(begun))
        model(ids[:, :3], cache=begun, prompt_mask=torch.tensor([[True, False, False]] * 2))
        with refused("without a cache every call has the whole text"):
            model.generate(ids, max_new_tokens=2, use_cache=False)
        model.config.use_cache = False
        with refused("without a cache every call has the whole text"):
            model(ids)
        model.config.use_cache = True
        with refused("several texts stand in one row"):
            model(ids, cu_seq_lens_q=torch.tensor([0, 2, 4]))
        with refused("called by itself"):
            model.transformer(ids)
    turns = labels.clone()
    turns[:, -1] = ids[:, -1]
    turns[:, -2] = -100
    with refused("a talk of several turns"):
        model(ids, labels=turns)
    with refused("start again within a row"):
        positions = torch.arange(ids.shape[1]) % 3
        model(ids, labels=labels, position_ids=positions.expand_as(ids))
    for mask in (torch.ones(2, 1, dtype=torch.bool), torch.ones(ids.shape), 3):
        with refused("`prompt_mask` is a bool tensor"):
            model(ids, prompt_mask=mask)
    model.train()
    with refused("this call has no `labels`"):
        model(ids)
    rs.use(model, "law")
    with refused("is for fields that act on the prompt alone"):
        model(ids, prompt_mask=torch.ones(ids.shape, dtype=torch.bool))
    rs.use(model, None)
    model(ids)


def test_models_that_read_no_prompt_are_refused_and_nothing_changes():
    for name, words in (("t5", "has an encoder"), ("timm-vit", "that write"), ("bert", "that write")):
        model = rs.steer(TABLE[name].build(), rank=2)
        rs.use(model, {"default": 0.5})
        with refused(words):
            rs.use(model, "default", on="prompt")
        assert rs.summary(model).acting == {"default": 0.5}
    model = rs.steer(FAMILIES[0].build(), rank=2, name="headed", train=FAMILIES[0].head)
    with refused("trained .* along"):
        rs.use(model, "headed", on="prompt")
    with refused("`on` is one of all, prompt; received 'answer'"):
        rs.use(model, "headed", on="answer")


@torch.no_grad()
def test_it_is_part_of_what_is_selected(tmp_path):
    model, ids = steered()
    assert "law on the prompt" in str(rs.summary(model))
    assert rs.summary(model).on == "prompt"
    chosen = rs.use(model, {"law": 1.0}, on="prompt")
    rs.use(model, None)
    with chosen:
        assert rs.summary(model).on == "prompt"
    assert rs.summary(model).on == "all"
    rs.use(model, "law", on="prompt")
    other = copy.deepcopy(model)
    expected = model(ids, labels=answers(ids)).logits
    assert torch.equal(other(ids, labels=answers(ids)).logits, expected)
    with refused("a reference has its fields act on every token"):
        rs.reference(model)
    model.save_pretrained(tmp_path)
    loaded = rs.from_pretrained(tmp_path)
    assert rs.summary(loaded).on == "prompt"
    assert torch.equal(loaded(ids, labels=answers(ids)).logits, expected)


@torch.no_grad()
def test_a_compiled_graph_is_refused_and_code_that_is_not_one_graph_runs():
    torch._dynamo.reset()
    model, ids = rs.steer(tiny(n_layer=1), rank=3, name="law"), FAMILIES[0].inputs(tiny())["input_ids"]
    rs.use(randomise(model), "law", on="prompt")
    expected = model(ids, labels=answers(ids)).logits
    with pytest.raises(torch._dynamo.exc.Unsupported, match="Observed exception"):
        torch.compile(model, fullgraph=True, backend="eager")(ids, labels=answers(ids))
    torch._dynamo.reset()
    actual = torch.compile(model, backend="eager")(ids, labels=answers(ids)).logits
    torch.testing.assert_close(actual, expected)


def test_fit_trains_on_the_prompt():
    case = FAMILIES[0]
    model = rs.steer(case.build(), rank=3, name="law")
    rs.use(model, "law", on="prompt")
    ids = case.inputs(model)["input_ids"]
    rs.fit(model, [{"input_ids": ids, "labels": answers(ids)}], steps=8, lr=0.05)
    with torch.no_grad():
        first = model(ids, labels=answers(ids)).loss
        rs.use(model, None)
        assert first < model(ids, labels=answers(ids)).loss


def test_a_generate_that_somebody_put_on_the_model_runs_and_is_there_again_after():
    model = FAMILIES[0].build()
    model.generate = lambda *ids, **more: ("mine", more)
    own = model.generate
    rs.steer(model, rank=2)
    assert model.generate(do_sample=False) == ("mine", {"do_sample": False})
    rs.use(model, "default", on="prompt")
    assert model.generate(torch.ones(1, 2, dtype=torch.long))[0] == "mine"
    rs.unsteer(model)
    assert model.generate is own
