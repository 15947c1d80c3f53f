"""What fields were not tried with is refused before anything starts, and vLLM without the switch is as it was."""

import types

import proof
import pytest
import vllm
from proof import make_base
from vllm.engine.arg_utils import EngineArgs

import residual_steer as rs
from residual_steer.vllm import _vllm_internals


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return str(make_base(tmp_path_factory.mktemp("base") / "base", "llama"))


def configured(base, switch=True, **options):
    given = {"enable_lora": True, "skip_tokenizer_init": True, "dtype": "float32", **options}
    on = {} if switch is None else {"residual_steer": switch}
    return EngineArgs(model=base, additional_config=on, **given).create_engine_config()


def test_what_was_tried_is_accepted_and_told_to_the_keys_of_what_is_compiled(base):
    assert configured(base).additional_config == {"residual_steer": True}
    assert configured(base).compute_hash() != configured(base, None).compute_hash()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"enable_lora": False}, "Give vLLM --enable-lora"),
        ({"switch": "yes"}, "received 'yes'"),
        ({"pipeline_parallel_size": 2}, "pipeline parallelism"),
        ({"data_parallel_size": 2}, "data parallelism"),
        ({"model_impl": "transformers"}, "this model is Transformers"),
        ({"runner": "pooling"}, "pooling|this model is"),
        (
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}},
            "speculative",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_was_not_tried_is_refused(base, options, message):
    with pytest.raises(ValueError, match=message):
        configured(base, **options)


def test_it_can_be_tried_at_ones_own_risk(base):
    assert configured(base, "untested", pipeline_parallel_size=2).parallel_config.pipeline_parallel_size == 2


def test_another_model_is_refused(tmp_path):
    import transformers

    config = transformers.OPTConfig(
        hidden_size=64, num_hidden_layers=1, num_attention_heads=2, ffn_dim=64, vocab_size=97
    )
    transformers.OPTForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="this model is OPTForCausalLM"):
        configured(str(tmp_path))


def test_another_release_is_refused(base, monkeypatch):
    config = configured(base)
    monkeypatch.setattr(vllm, "__version__", "0.33.0")
    with pytest.raises(rs.SteerError, match=r"tried with vLLM 0\.32\.\*; this is 0\.33\.0"):
        _vllm_internals.check_config(config)


def test_a_graph_of_cuda_is_refused(base):
    config = configured(base)
    config.compilation_config.cudagraph_mode = types.SimpleNamespace(name="FULL")
    with pytest.raises(rs.SteerError, match="--enforce-eager"):
        _vllm_internals.check_config(config)


def test_a_layer_that_was_not_proven_is_refused(base):
    layer = type("LlamaDecoderLayer", (proof.torch.nn.Module,), {"__module__": "vllm.model_executor.models.other"})
    model = proof.torch.nn.Module()
    model.layers = proof.torch.nn.ModuleList([layer(), layer()])
    from residual_steer.vllm._layers import install

    with pytest.raises(rs.SteerError, match=r"found 2, vllm\.model_executor\.models\.other\.LlamaDecoderLayer"):
        install(model, None, 2, "llama.LlamaDecoderLayer")
    assert type(model.layers[0]) is layer
