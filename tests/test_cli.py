"""The command line: each command gives what the public calls give, and what is wrong is said in words."""

import importlib.metadata
import importlib.util
import json
import runpy
import sys

import pytest
import tokenizers
import torch
import yaml
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MambaConfig,
    PreTrainedTokenizerFast,
    T5Config,
    ViTConfig,
)

import residual_steer as rs
from residual_steer.cli import main
from residual_steer.data import ByteBlocks
from residual_steer.recipe import Recipe, open_model
from residual_steer.storage import load

TINY = {"vocab_size": 256, "bos_token_id": 0, "eos_token_id": 0}
CONFIGS = {
    "gpt2": (GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=64, **TINY), "GPT2LMHeadModel"),
    "mamba": (MambaConfig(hidden_size=32, num_hidden_layers=2, **TINY), "MambaForCausalLM"),
    "vit": (ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64), "ViTModel"),
    "encoder_decoder": (T5Config(d_model=32, num_layers=2, num_heads=2, d_kv=16, d_ff=64, vocab_size=256), "T5Model"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a small model of bytes, and a text."""
    there = tmp_path_factory.mktemp("cli")
    torch.manual_seed(0)
    GPT2LMHeadModel(CONFIGS["gpt2"][0]).save_pretrained(there / "gpt2")
    (there / "text").write_text("One thing after another, and then the next. " * 60)
    return there


@pytest.fixture
def recipe(folder):
    return {
        "model": str(folder / "gpt2"),
        "data": {"text": str(folder / "text"), "length": 16, "batch": 4},
        "field": {"rank": 4, "site": "input"},
        "fit": {"steps": 3, "lr": 0.01, "progress": False},
    }


@pytest.mark.parametrize("family", CONFIGS)
def test_inspect_reads_a_config_alone(family, tmp_path, capsys):
    config, named = CONFIGS[family]
    config.architectures = [named]
    config.save_pretrained(tmp_path)
    assert main(["inspect", str(tmp_path / "config.json"), "--rank", "4"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(named)
    assert family in shown.splitlines()[1]
    model = open_model(str(tmp_path), weights=False)
    assert shown.splitlines()[-1] == f"and linear maps: {', '.join(rs.find_backbone(model).projections)}"
    for site in rs.find_backbone(model).sites:
        rs.steer(model, rank=4, site=site)
        count = sum(parameter.numel() for parameter in rs.parameters(model))
        rs.unsteer(model)
        assert any(line.split()[:1] == [site] and f"{count:,}" in line for line in shown.splitlines())


def test_inspect_takes_a_model_of_timm(capsys):
    assert main(["inspect", "timm:vit_tiny_patch16_224"]) == 0
    assert "12 × Block" in capsys.readouterr().out


def test_train_gives_the_bits_that_fit_gives(folder, recipe, tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    assert main(["train", str(path), "--rank", "2", "--set", "fit.warmup=0", "--out", str(tmp_path / "field")]) == 0

    torch.manual_seed(0)
    model = GPT2LMHeadModel.from_pretrained(folder / "gpt2")
    text = (folder / "text").read_bytes()
    rs.steer(model, rank=2, site="input")
    train = DataLoader(ByteBlocks(text, 16), batch_size=4, shuffle=True)
    valid = DataLoader(ByteBlocks(text, 16, "valid"), batch_size=4)
    history = rs.fit(model, train, valid, steps=3, lr=0.01, warmup=0, progress=False)

    other = load(GPT2LMHeadModel.from_pretrained(folder / "gpt2"), tmp_path / "field")
    for mine, theirs in zip(rs.parameters(model), rs.parameters(other), strict=True):
        assert torch.equal(mine, theirs)
    assert f"{history.valid[-1]['loss']:.4f}" in capsys.readouterr().out

    # The recipe that lies beside the field is the one that was run, so that it can be run again.
    again = Recipe.read(tmp_path / "field" / "recipe.yaml")
    assert again.field["rank"] == 2
    assert again.fit["warmup"] == 0
    again.train(tmp_path / "again")
    first, second = (tmp_path / name / "steering.safetensors" for name in ("field", "again"))
    assert first.read_bytes() == second.read_bytes()

    assert main(["eval", str(tmp_path / "field"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["steered"]["loss"] == pytest.approx(history.valid[-1]["loss"], rel=1e-6)
    assert found["frozen"]["loss"] != found["steered"]["loss"]

    assert main(["card", str(tmp_path / "field"), "--repo", "me/river"]) == 0
    assert (tmp_path / "field" / "README.md").read_text("utf-8") == rs.card(other, "me/river")
    assert 'rs.load(model, "me/river")' in rs.card(other, "me/river")
    assert main(["export", str(tmp_path / "field"), str(tmp_path / "baked")]) == 0
    baked = AutoModelForCausalLM.from_pretrained(tmp_path / "baked", trust_remote_code=True)
    ids = torch.arange(8)[None]
    torch.testing.assert_close(baked(ids).logits, other.eval()(ids).logits)
    assert main(["card", str(tmp_path / "field"), "--repo", "river"]) == 1
    assert "'owner/name'" in capsys.readouterr().err


def test_train_takes_flags_alone(folder, tmp_path):
    flags = ["--model", str(folder / "gpt2"), "--text", str(folder / "text"), "--length", "16", "--steps", "1"]
    assert main(["train", *flags, "--lr", "1e-3", "--set", "fit.progress=false", "--out", str(tmp_path / "field")]) == 0
    assert Recipe.read(tmp_path / "field" / "recipe.yaml").fit == {"steps": 1, "lr": 0.001, "progress": False}


def test_train_takes_several_sites(folder, recipe, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    flags = ["--site", "input", "after", "--rank", "3", "--steps", "1"]
    assert main(["train", str(path), *flags, "--out", str(tmp_path / "field")]) == 0
    model = load(GPT2LMHeadModel.from_pretrained(folder / "gpt2"), tmp_path / "field")
    assert {site: set(ranks.values()) for site, ranks in rs.fields(model)[0].sites.items()} == {
        "input": {2},
        "after": {1},
    }
    changes = {"field.site": ["input", "after"], "field.rank": {"input": 1, "after": {-1: 2}}}
    assert Recipe.read(tmp_path / "field" / "recipe.yaml", changes).field["rank"] == {"input": 1, "after": {-1: 2}}


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("modle", "gpt2", ("modle", "model, data")),
        ("model", 3, ("`model`", "3", "Hub")),
        ("data.text", None, ("data", "text, wikitext", "none")),
        ("data.images", "pictures", ("data", "text, images")),
        ("data.batch", 0, ("data", "`batch`", "0", "1")),
        ("data.lenght", 8, ("data", "lenght", "length")),
        ("data.text", "nowhere.txt", ("data.text", "nowhere.txt")),
        ("field.rnak", 8, ("field", "rnak", "rank")),
        ("field.rank", "many", ("rank", "many")),
        ("field.site", "blok", ("site", "blok", "mixer")),
        ("fit.steps", 0, ("steps", "0")),
        ("fit.schedule", "linear", ("fit", "schedule", "linear", "cosine")),
        ("fit.protect", 1, ("fit", "protect", "warmup")),
        ("seed", -1, ("seed", "-1")),
        ("arch", "gtp2", ("gtp2", "gpt2")),
        ("model", "nowhere/at/all", ("nowhere/at/all",)),
    ],
)
def test_a_wrong_recipe_names_key_value_and_what_is_allowed(key, value, words, recipe, tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    assert main(["train", str(path), "--set", f"{key}={json.dumps(value)}", "--out", str(tmp_path / "field")]) == 1
    shown = capsys.readouterr().err
    assert [word for word in words if word not in shown] == []
    assert not (tmp_path / "field").exists()


def test_text_meets_the_tokenizer_of_its_model_or_bytes(folder, recipe, tmp_path, capsys):
    """A model of 256 tokens has a tokenizer of its own here, and one of 64 has none."""
    tokens = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 7, "One": 3}, unk_token="[UNK]"))
    tokens.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    GPT2LMHeadModel(CONFIGS["gpt2"][0]).save_pretrained(tmp_path / "own")
    PreTrainedTokenizerFast(tokenizer_object=tokens, unk_token="[UNK]").save_pretrained(tmp_path / "own")
    _, train, _ = Recipe.of({**recipe, "model": str(tmp_path / "own")})._open()
    assert set(train[0]["input_ids"].tolist()) == {3, 7}
    GPT2LMHeadModel(GPT2Config(**{**CONFIGS["gpt2"][0].to_dict(), "vocab_size": 64})).save_pretrained(tmp_path / "none")
    flags = ["--text", recipe["data"]["text"], "--steps", "1", "--out", str(tmp_path / "field")]
    assert main(["train", "--model", str(tmp_path / "none"), *flags]) == 1
    assert "no tokenizer stands with" in capsys.readouterr().err
    (tmp_path / "latin").write_bytes(b"caf\xe9 " * 99)
    assert main(["train", "--model", str(tmp_path / "own"), *flags, "--text", str(tmp_path / "latin")]) == 1
    assert "UTF-8" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_refused_before_the_training(recipe, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr("residual_steer.recipe.fit", lambda *args, **options: pytest.fail("it trained"))
    with pytest.raises(rs.SteerError, match="file"):
        Recipe.of(recipe).train(tmp_path / "file" / "field")


@pytest.mark.parametrize(
    ("text", "words"),
    [("a: [", ("no YAML",)), ("- 1", ("mapping", "[1]")), ("", ("mapping", "None")), ("model: x", ("lacks `data`",))],
)
def test_a_file_that_is_no_recipe(text, words, tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_text(text)
    assert main(["train", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "field")]) == 1
    shown = capsys.readouterr().err
    assert [word for word in words if word not in shown] == []


def test_doctor_names_what_is_there_and_what_is_missing(capsys):
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert torch.__version__.partition("+")[0] in shown
    assert "GPU" in shown
    if importlib.util.find_spec("vllm") is None:
        assert "pip install 'vllm==0.32.*'" in shown  # the one release that is served


def test_doctor_asks_for_another_release(monkeypatch, capsys):
    there = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.0" if name == "numpy" else there(name))
    assert main(["doctor"]) == 1
    assert "pip install 'numpy>=2.0'" in capsys.readouterr().out


def test_the_module_is_the_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["residual_steer", "--version"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("residual_steer", run_name="__main__")
    assert not ended.value.code
    assert capsys.readouterr().out.strip() == importlib.metadata.version("residual-steer")
