"""Models with two streams: the blocks of the encoder, then those of the decoder."""

import pytest
import torch

import residual_steer as rs
from cases import CASES, RANK, randomise

TABLE = {case.name: case for case in CASES}
both = pytest.mark.parametrize("name", ["t5", "bart", "whisper"])


@both
@torch.no_grad()
def test_layers_count_through_both_stacks(name):
    case = TABLE[name]
    frozen = case.build()(**case.inputs(case.build()), output_hidden_states=True)

    def moved(layer):
        model = randomise(rs.steer(case.build(), rank=RANK, layers=[layer]))
        output = model(**case.inputs(model), output_hidden_states=True)
        return tuple(
            [not torch.equal(a, b) for a, b in zip(output[stack], frozen[stack], strict=True)]
            for stack in ("encoder_hidden_states", "decoder_hidden_states")
        )

    assert moved(0) == ([False, True, True], [False, True, True])
    assert moved(1) == ([False, False, True], [False, True, True])
    assert moved(2) == ([False, False, False], [False, True, True])
    assert moved(-1) == ([False, False, False], [False, False, True])


@both
@torch.no_grad()
def test_the_encoder_runs_once_and_the_decoder_at_every_step(name):
    case = TABLE[name]
    model = randomise(rs.steer(case.build(), rank=RANK))
    calls = [0, 0, 0, 0]
    for index, block in enumerate(case.modules(model, "block")):

        def count(*_, index=index):
            calls[index] += 1

        block.register_forward_hook(count)
    main = next(iter(case.inputs(model).values()))
    model.generate(main, do_sample=False, min_new_tokens=5, max_new_tokens=5)
    assert calls[:2] == [1, 1]
    assert calls[2:] == [5, 5]


@pytest.mark.parametrize("site", ["block", "mixer", "input"])
@torch.no_grad()
def test_whisper_generates_with_its_cache_what_it_does_without(site):
    case = TABLE["whisper"]
    model = randomise(rs.steer(case.build(), rank=RANK, site=site))
    speech = case.inputs(model)["input_features"]
    settings = {"do_sample": False, "min_new_tokens": 5, "max_new_tokens": 5}
    settings |= {"output_logits": True, "return_dict_in_generate": True}
    cached, plain = (model.generate(speech, use_cache=use_cache, **settings) for use_cache in (True, False))
    assert torch.equal(cached.sequences, plain.sequences)
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(plain.logits), rtol=0, atol=1e-5)
    with rs.use(model, None):
        off = model.generate(speech, **settings)
    assert not torch.allclose(off.logits[0], cached.logits[0])


def test_one_field_steers_the_decoder_and_another_the_encoder():
    case = TABLE["t5"]
    model = case.build()
    rs.steer(model, rank=RANK, layers=[0, 1], name="listens")
    rs.steer(model, rank=2, layers=[2, 3], name="speaks")
    randomise(model)
    with torch.no_grad():
        alone = {}
        for name in ("listens", "speaks"):
            rs.use(model, name)
            alone[name] = case.run(model)
        rs.use(model, ["speaks", "listens"])
        mixed = case.run(model)
    torch.testing.assert_close(mixed[0], alone["speaks"][0], rtol=0, atol=1e-5)
    torch.testing.assert_close(mixed[1], alone["listens"][1], rtol=0, atol=1e-5)


def half(name, **settings):
    transformers = pytest.importorskip("transformers")
    shape = {"vocab_size": 50, "d_model": 16, "num_layers": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    shape |= dict.fromkeys(("encoder_layers", "decoder_layers", "num_heads"), 2)
    shape |= dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 2)
    shape |= dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "d_ff"), 32)
    model = getattr(transformers, name)
    return model(model.config_class(**shape, d_kv=8, **settings)).eval()


@pytest.mark.parametrize(
    ("name", "path", "kind"),
    [
        ("T5EncoderModel", "", "T5Block"),
        ("T5ForTokenClassification", "transformer", "T5Block"),
        ("BartForCausalLM", "model.decoder", "BartDecoderLayer"),
        ("MarianMTModel", "model", "MarianEncoderLayer"),
        ("PegasusForCausalLM", "model.decoder", "PegasusDecoderLayer"),
        ("WhisperForAudioClassification", "encoder", "WhisperEncoderLayer"),
    ],
)
def test_halves_and_heads_are_found(name, path, kind):
    backbone = rs.find_backbone(half(name))
    assert (backbone.name, backbone.path) == ("encoder_decoder", path)
    assert type(backbone.blocks[0]).__name__ == kind
    assert len(backbone.blocks) == (4 if name == "MarianMTModel" else 2)


def test_stacks_may_differ_in_width():
    transformers = pytest.importorskip("transformers")
    from transformers.models.t5gemma.configuration_t5gemma import T5GemmaModuleConfig

    stack = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    stack |= {"vocab_size": 50, "intermediate_size": 32, "query_pre_attn_scalar": 8}
    encoder, decoder = (T5GemmaModuleConfig(hidden_size=width, **stack) for width in (16, 24))
    config = transformers.T5GemmaConfig(encoder=encoder, decoder=decoder, vocab_size=50)
    model = transformers.T5GemmaForConditionalGeneration(config)
    assert rs.find_backbone(model).widths == (16, 24)
    assert [m.width for m in rs.steer(model, rank=2).modules() if isinstance(m, rs.HRes)] == [16, 24]
