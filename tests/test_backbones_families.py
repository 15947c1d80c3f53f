"""What goes wrong most easily in a family: whose hidden state is whose, shared blocks, two streams, states, windows."""

import pytest
import torch

import residual_steer as rs
from cases import LENGTH, RANK, TABLE, steered
from residual_steer._caches import cache_of, cache_parameter
from residual_steer.recording import record

SHAPE = {"vocab_size": 50, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
BOTH = ["t5", "bart", "whisper"]
WINDOWS = ["timm-swin", "timm-swin-v2", "hf-swin"]


def close(actual, expected, **more):
    torch.testing.assert_close(actual, expected, **{"rtol": 0, "atol": 1e-5, **more})


def field_of(block):
    return block.steering_block.fields["default"]


def hidden(case, model, *names):
    output = model(**case.inputs(model), output_hidden_states=True)
    return [output[name] for name in names or ["hidden_states"]]


def moved(one, other):
    return [not torch.equal(a, b) for a, b in zip(one, other, strict=True)]


@pytest.mark.parametrize("name", ["bert", "albert", "deberta-v2", "distilbert", "modernbert", "gemma3", "opt", "bart"])
@torch.no_grad()
def test_what_leaves_a_steered_block_is_what_the_next_one_reads(name):
    """In post-norm blocks too, whose norm stands behind the sum; DeBERTa has a convolution behind its first block."""
    case, model = steered(name)
    calls = []
    for block in case.modules(model, "block"):
        block.register_forward_pre_hook(
            lambda _, args, kwargs: calls.append(case.enter(args, kwargs)), with_kwargs=True
        )
        block.register_forward_hook(lambda _, args, output: calls.append(case.leave(output)))
    case.run(model)
    pairs = list(zip(calls[1::2], calls[2::2], strict=False))
    if name == "bart":
        pairs.pop(1)  # from the encoder to the decoder
    assert [torch.equal(out, into) for out, into in pairs] == [name != "deberta-v2"] * len(pairs)


@pytest.mark.parametrize(
    "name", ["gpt2", "gpt-neox", "falcon", "gemma3", "qwen2-moe", "opt", "jamba", "recurrent-gemma"]
)
@torch.no_grad()
def test_a_field_on_a_block_moves_the_hidden_states_behind_it_alone(name):
    """Hidden state 0 is the embedding's, and i + 1 what leaves block i; the last one is behind the final norm."""
    case = TABLE[name]
    (frozen,) = hidden(case, case.build())
    for layer, expected in ((1, [False, False, True]), (0, [False, True, True])):
        model = case.build()
        hidden(case, model)  # installs hooks of transformers before ours
        model = rs.steer(model, rank=RANK, layers=[layer])
        torch.nn.init.normal_(rs.parameters(model)[-1])
        assert moved(*hidden(case, model), frozen) == expected


@torch.no_grad()
def test_alberts_shared_block_is_steered_whenever_it_is_used():
    case, model = steered("albert", layers=[0])
    block, twin = case.modules(model, "block")[0], case.modules(case.build(), "block")[0]
    calls = []
    block.register_forward_hook(lambda _, args, output: calls.append((args, output)))
    case.run(model)
    assert len(calls) == 2
    for args, output in calls:
        close(output, twin(*args) + field_of(block)(args[0]))
    assert len(rs.parameters(model)) == 4, "one field, however often it runs"


def test_alberts_field_learns_from_every_use():
    case, model = steered("albert", layers=[0])
    outputs, block = [], case.modules(model, "block")[0]
    block.register_forward_hook(lambda _, args, output: outputs.append(output) or output.retain_grad())
    case.loss(model).backward()
    expected = sum(output.grad.sum((0, 1)) for output in outputs)
    close(field_of(block).up.bias.grad, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("name", "site", "message"),
    [
        *(
            (name, "mlp", "has the sites block, mixer, input, after; received 'mlp'")
            for name in ("opt", "bert", "bart")
        ),
        ("nemotron-h", "mixer", r"'mixer' .* block 1 \(NemotronHBlock\), only in layers=\[0, 2\]"),
        ("nemotron-h", "mlp", r"site 'mlp' is not there in block 0 .*, only in layers=\[1\]"),
    ],
)
def test_a_part_that_is_no_module_or_not_in_every_block_is_no_site(name, site, message):
    with pytest.raises(rs.SteerError, match=message):
        steered(name, site=site)


def test_of_several_parts_the_one_that_is_named_is_steered():
    backbone = rs.find_backbone(TABLE["deepseek-v3"].build())
    assert [type(backbone.point(i, "mlp")).__name__ for i in range(2)] == ["DeepseekV3MLP", "DeepseekV3MoE"]
    model = TABLE["nemotron-h"].build()
    assert rs.summary(rs.steer(model, site="mixer", layers=[0, 2], rank=RANK)).trainable > 0
    _, model = steered("falcon-h1", site="mixer")  # a state-space model and an attention side by side
    names = [name for name, module in model.named_modules() if isinstance(module, rs.HRes)]
    assert [name.split(".")[3] for name in names] == ["mamba", "mamba"]


@torch.no_grad()
def test_left_padding_changes_nothing_for_the_tokens_that_are_there():
    case, model = steered("gemma3")
    ids = case.inputs(model)["input_ids"]
    padded, mask = (torch.cat([torch.zeros_like(ids[:, :2]), x], 1) for x in (ids, torch.ones_like(ids)))
    actual = model(padded, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits[:, 2:]
    close(actual, model(ids).logits)


def test_zambas_entries_have_fields_of_their_own_around_shared_weights_and_learn_apart():
    case, model = steered("zamba2")
    first, second = case.modules(model, "block")
    shared, twin = (entry.shared_transformer for entry in model.model.layers)
    assert all(a is b for a, b in zip(shared.parameters(), twin.parameters(), strict=True))
    assert not any("steering" in name for name, _ in shared.named_modules())
    with torch.no_grad():  # eq. 1 in the hidden states that transformers captures
        on = model(**case.inputs(model), output_hidden_states=True).hidden_states
        with rs.use(model, None):
            off = model(**case.inputs(model), output_hidden_states=True).hidden_states
        close(on[1], off[1] + field_of(first)(on[0]))
    assert field_of(first) is not field_of(second)
    case.loss(model).backward()
    one, other = (field_of(block).up.weight.grad for block in (first, second))
    assert min(one.abs().max(), other.abs().max()) > 0
    assert not torch.allclose(one, other)


@pytest.mark.parametrize(
    ("name", "site"),
    [("rwkv", "mlp"), *((name, site) for name in ("rwkv", "whisper") for site in ("block", "mixer", "input"))],
)
@torch.no_grad()
def test_generation_with_a_state_agrees_with_that_without(name, site):
    """RWKV row by row: in transformers 5.23 its step of one token mixes the rows of a batch, steered or not."""
    case, model = steered(name, site=site)
    given = case.inputs(model)
    prompt = given["input_ids"][:1, :4] if name == "rwkv" else given["input_features"]
    settings = {"do_sample": False, "min_new_tokens": 5, "max_new_tokens": 5}
    settings |= {"output_logits": True, "return_dict_in_generate": True}
    cached, plain = (model.generate(prompt, use_cache=use_cache, **settings) for use_cache in (True, False))
    assert torch.equal(cached.sequences, plain.sequences)
    close(torch.stack(cached.logits), torch.stack(plain.logits))
    with rs.use(model, None):
        assert not torch.allclose(model.generate(prompt, **settings).logits[0], cached.logits[0])


@pytest.mark.parametrize("name", ["jamba", "zamba2", "nemotron-h", "falcon-h1", "qwen3-next", "lfm2"])
@torch.no_grad()
def test_a_prompt_and_then_single_tokens_give_what_the_whole_sequence_gives(name):
    case, model = steered(name)
    ids = case.inputs(model)["input_ids"]
    state = model(ids[:, :4], use_cache=True)
    parts = [state.logits]
    for position in range(4, LENGTH):
        state = model(ids[:, position : position + 1], use_cache=True, **{cache_parameter(model): cache_of(state)})
        parts.append(state.logits)
    close(torch.cat(parts, 1), case.run(model), atol=2e-5)


def test_an_rwkv_that_halves_its_stream_in_evaluation_mode_is_refused():
    model = TABLE["rwkv"].build()
    model.config.rescale_every = 1
    with pytest.raises(rs.SteerError, match=r"halves its stream after every 1 blocks.*model.config.rescale_every = 0"):
        rs.steer(model, rank=RANK)
    model.config.rescale_every = 2  # which halves it behind the last block alone
    rs.steer(model, rank=RANK)


@pytest.mark.parametrize("name", BOTH)
@torch.no_grad()
def test_layers_count_through_both_stacks(name):
    stacks = ("encoder_hidden_states", "decoder_hidden_states")
    frozen = hidden(TABLE[name], TABLE[name].build(), *stacks)
    nothing, last, both = [False] * 3, [False, False, True], [False, True, True]
    for layer, expected in ((0, (both, both)), (1, (last, both)), (2, (nothing, both)), (-1, (nothing, last))):
        case, model = steered(name, layers=[layer])
        assert tuple(map(moved, hidden(case, model, *stacks), frozen)) == expected


@pytest.mark.parametrize("name", BOTH)
@torch.no_grad()
def test_the_encoder_runs_once_and_the_decoder_at_every_step(name):
    case, model = steered(name)
    main = next(iter(case.inputs(model).values()))
    with record(model) as seen:
        model.generate(main, do_sample=False, min_new_tokens=5, max_new_tokens=5)
    assert [len(seen.calls[index]) for index in range(4)] == [1, 1, 5, 5]


@torch.no_grad()
def test_one_field_steers_the_decoder_and_another_the_encoder():
    case, model = steered("t5", layers=[0, 1], name="listens")
    rs.steer(model, rank=2, layers=[2, 3], name="speaks")
    for parameter in rs.parameters(model, "speaks"):
        torch.nn.init.normal_(parameter)
    rs.use(model, ["speaks", "listens"])
    mixed = case.run(model)
    for row, name in enumerate(("speaks", "listens")):
        with rs.use(model, name):
            close(mixed[row], case.run(model)[row])


def half(name, **settings):
    transformers = pytest.importorskip("transformers")
    shape = {**SHAPE, "d_model": 16, "num_layers": 2, "encoder_layers": 2, "decoder_layers": 2, "num_heads": 2}
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


@pytest.mark.parametrize("kind", ["CLIP", "Siglip"])
@torch.no_grad()
def test_of_two_towers_one_is_steered_by_its_name(kind):
    transformers = pytest.importorskip("transformers")
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**shape, **SHAPE, "max_position_embeddings": 16, "projection_size": 16}
    more = {"projection_dim": 8} if kind == "CLIP" else {}
    vision = {**shape, "image_size": 16, "patch_size": 8}
    config = getattr(transformers, f"{kind}Config")(text_config=text, vision_config=vision, **more)
    model = getattr(transformers, f"{kind}Model")(config).eval().requires_grad_(False)
    with pytest.raises(rs.SteerError, match=r"model.text_model \(vit\), model.vision_model \(vit\).*steer\(model.text"):
        rs.steer(model, rank=RANK)
    inputs = {"input_ids": torch.randint(3, 50, (2, 7)), "pixel_values": torch.randn(2, 3, 16, 16)}
    before = model(**inputs)
    rs.steer(model.vision_model, rank=RANK)
    assert torch.equal(model(**inputs).logits_per_image, before.logits_per_image)
    for parameter in rs.parameters(model.vision_model):
        torch.nn.init.normal_(parameter)
    after = model(**inputs)
    assert torch.equal(after.text_embeds, before.text_embeds)
    assert not torch.equal(after.image_embeds, before.image_embeds)
    rs.unsteer(model.vision_model)
    assert torch.equal(model(**inputs).logits_per_image, before.logits_per_image)


@pytest.mark.parametrize("name", WINDOWS)
@torch.no_grad()
def test_a_swin_has_fields_as_wide_as_each_stage_and_a_mixer_that_sees_windows_in_the_order_of_images(name):
    """So that a list of fields, one per row, reaches the right windows."""
    _, model = steered(name, rank={0: 2, 1: 3, 2: 4})
    fields = [module for module in model.modules() if isinstance(module, rs.HRes)]
    assert [(field.width, field.rank) for field in fields] == [(8, 2), (16, 3), (16, 4)]
    case, model = steered(name, site="mixer")
    rs.steer(model, rank=2, site="mixer", name="other")
    for parameter in rs.parameters(model, "other"):
        torch.nn.init.normal_(parameter)
    rs.use(model, ["default", "other"])
    with record({"mixer": case.modules(model, "mixer")[0]}) as seen:
        mixed = case.run(model)
    assert len(seen.entering["mixer"]) == 32, "two images of sixteen windows"
    for row, field in enumerate(("default", "other")):
        with rs.use(model, field):
            close(mixed[row], case.run(model)[row])


def test_a_rank_wider_than_the_narrowest_stage_is_refused():
    with pytest.raises(rs.SteerError, match="from 1 to 8, the width; received 12"):
        rs.steer(TABLE["timm-swin"].build(), rank=12)


@torch.no_grad()
def test_a_masked_autoencoder_keeps_its_patches():
    case, model = steered("hf-mae")
    before, after = (one(**case.inputs(one)) for one in (case.build(), model))
    assert torch.equal(before.ids_restore, after.ids_restore)
    assert after.last_hidden_state.shape[1] == 3, "half of four patches, and the class token"
