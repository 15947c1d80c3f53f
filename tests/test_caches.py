"""A cache is found whatever a release calls it, and is known to be empty or not."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from cases import TABLE
from residual_steer._caches import begins_text, cache_of, cache_parameter

NAMES = ("cache", "past_key_values", "cache_params", "a_name_of_next_year")
CACHED = ("gpt2", "mamba", "mamba2", "falcon-mamba", "jamba")


@pytest.mark.parametrize("name", CACHED)
@torch.no_grad()
def test_a_cache_is_found_in_the_output_and_the_model_goes_on_with_it(name):
    model = TABLE[name].build().eval()
    ids = TABLE[name].inputs(model)["input_ids"]
    cache = cache_of(model(ids[:, :-1], use_cache=True))
    assert cache_of(model(ids[:, :-1], use_cache=True, return_dict=False)) is not None
    after = model(ids[:, -1:], use_cache=True, **{cache_parameter(model): cache})
    assert cache_of(after) is cache
    torch.testing.assert_close(after.logits, model(ids).logits[:, -1:], rtol=0, atol=2e-5)


@pytest.mark.parametrize("keyword", NAMES)
@pytest.mark.parametrize("name", CACHED)
@torch.no_grad()
def test_a_call_begins_a_text_until_its_cache_holds_something(name, keyword):
    from transformers import DynamicCache

    model = TABLE[name].build().eval()
    ids = TABLE[name].inputs(model)["input_ids"]
    empty, full = DynamicCache(config=model.config), cache_of(model(ids, use_cache=True))
    assert begins_text({"input_ids": ids, keyword: empty})
    assert not begins_text({"input_ids": ids, keyword: full})
    assert begins_text({"input_ids": ids, keyword: None})
    if "mamba" in name:
        assert begins_text({keyword: empty}, layer=1)
        assert not begins_text({keyword: full}, layer=1)


def test_other_kinds_of_states():
    assert not begins_text({"state": [torch.zeros(1)]})
    for offset in (0, 3):
        assert begins_text({"inference_params": SimpleNamespace(seqlen_offset=offset)}) is (offset == 0)


def test_what_takes_no_cache():
    assert cache_parameter(nn.Linear(1, 1)) is None
    assert cache_parameter(TABLE["hf-vit"].build()) is None
    assert cache_of({"hidden_states": torch.zeros(1), "use_cache": True, "past_key_values": None}) is None
    assert cache_of((torch.zeros(1), None)) is None


@pytest.mark.parametrize("keyword", NAMES[:3])
def test_a_parameter_without_a_type_is_known_by_its_name(keyword):
    module = nn.Module()
    exec(f"def forward(hidden_states, use_cache=None, {keyword}=None): ...", namespace := {})
    module.forward = namespace["forward"]
    assert cache_parameter(module) == keyword
