"""An exported model loads by transformers alone and computes what the steered one does."""

import pytest
import timm
import torch
import transformers
from transformers import BertConfig, GPT2Config, LlamaConfig, MambaConfig, T5Config, ViTConfig

import residual_steer as rs
from apart import printed
from residual_steer.errors import SteerError
from residual_steer.export import export

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
MODELS = {
    "GPT2LMHeadModel": (GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=32), "CausalLM"),
    "LlamaForCausalLM": (LlamaConfig(vocab_size=64, num_key_value_heads=2, **SMALL), "CausalLM"),
    "MambaForCausalLM": (MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2), "CausalLM"),
    "T5ForConditionalGeneration": (
        T5Config(vocab_size=64, d_model=32, d_ff=64, d_kv=16, num_heads=2, num_layers=2, decoder_start_token_id=0),
        "Seq2SeqLM",
    ),
    "BertForSequenceClassification": (BertConfig(vocab_size=64, **SMALL), "SequenceClassification"),
    "ViTForImageClassification": (ViTConfig(image_size=16, patch_size=8, **SMALL), "ImageClassification"),
}

ALONE = """
import sys, torch, transformers
sys.modules["residual_steer"] = None  # an import of it would fail
transformers.dynamic_module_utils.HF_MODULES_CACHE = {modules!r}
for folder, auto in {models}:
    model = getattr(transformers, auto).from_pretrained(folder, trust_remote_code=True).eval()
    model.requires_grad_(False)  # torch computes a frozen weight's product by another kernel
    torch.save(model(**torch.load(folder + "/inputs")).logits, folder + "/logits")
"""


def steered(name, **options):
    torch.manual_seed(0)
    model = rs.steer(getattr(transformers, name)(MODELS[name][0]).eval(), rank=3, **options)
    with torch.no_grad():
        for parameter in rs.parameters(model):
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


def inputs(name):
    torch.manual_seed(1)
    if name.startswith("ViT"):
        return {"pixel_values": torch.randn(2, 3, 16, 16)}
    tokens = torch.randint(2, 64, (2, 7))
    return {"input_ids": tokens} | ({"decoder_input_ids": tokens} if name.startswith("T5") else {})


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Export every model, run all in one process that has no such library as ours, and return what ours computed."""
    home, expected, models = tmp_path_factory.mktemp("export"), {}, []
    for name, (_, head) in MODELS.items():
        model = steered(name, train=["classifier"] if "Classification" in name else [])
        export(model, home / name)
        torch.save(inputs(name), home / name / "inputs")
        models.append((str(home / name), f"AutoModelFor{head}"))
        expected[name] = model(**inputs(name)).logits.detach()  # with a gradient: without one GELU rounds otherwise
        assert not hasattr(model.config, "steering")
    modules = str(home / "modules")
    printed(ALONE.format(modules=modules, models=models), paths=[modules])
    return {name: (torch.load(home / name / "logits"), value) for name, value in expected.items()}


@pytest.mark.parametrize("name", MODELS)
def test_it_loads_without_this_library_and_computes_the_same(name, exported):
    assert torch.equal(*exported[name])


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Load an exported GPT-2 in this process."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))

    def load(model, **options):
        export(model, tmp_path / "out")
        auto = transformers.AutoModelForCausalLM
        return auto.from_pretrained(tmp_path / "out", trust_remote_code=True, **options).eval()

    return load


@pytest.mark.parametrize("site", ["mixer", "mlp", "input"])
def test_every_site_and_a_weighted_mix(site, here):
    model = steered("GPT2LMHeadModel", site=site, activation="tanh", scale=0.5)
    rs.steer(model, name="law", rank=2, site=site, bias=False, layers=[1])
    with torch.no_grad():
        for parameter in rs.parameters(model):
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    rs.use(model, {"default": 0.5, "law": -1.0})
    again = here(model)
    with torch.no_grad():
        expected, found = (each(**inputs("GPT2LMHeadModel")).logits for each in (model, again))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    made = [each.generate(**inputs("GPT2LMHeadModel"), max_new_tokens=5, do_sample=False) for each in (model, again)]
    assert torch.equal(*made)


def test_bf16(here):
    model = steered("GPT2LMHeadModel").bfloat16()
    again = here(model, dtype=torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(*(each(**inputs("GPT2LMHeadModel")).logits for each in (model, again)))


def test_what_cannot_be_exported_is_refused_before_anything_is_written(tmp_path):
    model = steered("GPT2LMHeadModel")
    for mix, word in ((None, "no field acts"), ({"default": 0.0}, "no field acts"), (["default", None], "every row")):
        rs.use(model, mix)
        with pytest.raises(SteerError, match=word):
            export(model, tmp_path / "out")
    with pytest.raises(SteerError, match="models of transformers; received VisionTransformer"):
        export(rs.steer(timm.create_model("test_vit"), rank=2), tmp_path / "out")
    assert not (tmp_path / "out").exists()
