"""Scripts that train and evaluate with other tools: each runs from end to end, and is read at a glance."""

import json
import math
import socket

import pytest
import torch
from safetensors.torch import load_file

import residual_steer as rs
from beside import EXAMPLES, scripts
from words import tokenizer

FOLDER = EXAMPLES / "integrations"
NEEDS = {  # what constraints.txt installs is there in CI: without it a script's test fails, and is not skipped
    "train_with_trainer": (),
    "train_with_trl": (),
    "train_in_4_bit": (),
    "train_with_fsdp2": (),
    "train_timm": (),
    "train_sentence_embeddings": (),
    "train_with_lightning": ("lightning",),
    "evaluate_with_lm_eval": ("lm_eval",),
}
LOCKED = {"trl", "bitsandbytes", "sentence_transformers"}  # of the extras that tests install

pytestmark = [
    pytest.mark.filterwarnings("ignore:Could not find a config file"),  # of a base without a name
    pytest.mark.filterwarnings("ignore::UserWarning:(trl|lightning|lm_eval|sentence_transformers|transformers)"),
]


def script(name):
    for package in NEEDS[name]:
        pytest.importorskip(package, reason=f"{package} is not installed; constraints.txt leaves it out")
    try:
        with scripts(FOLDER) as importing:
            return importing(name)
    except ModuleNotFoundError as error:
        if error.name in LOCKED:
            pytest.skip(f"{error.name} is not installed: pip install 'residual-steer[dev,tools]'")
        raise


def logits(model, **inputs):
    with torch.no_grad():
        return model.eval()(**inputs).logits


def test_each_script_is_short_and_tried():
    lengths = {path.stem: len(path.read_text("utf-8").splitlines()) for path in FOLDER.glob("*.py")}
    assert lengths.keys() == NEEDS.keys()
    assert max(lengths.values()) <= 40


@pytest.mark.parametrize("name", ["train_with_trainer", "train_in_4_bit"])
def test_trainer_and_what_was_saved_is_what_was_trained(name, tmp_path):
    model, again = script(name).main(str(tmp_path))
    on = logits(model, input_ids=torch.arange(8)[None])
    assert torch.equal(logits(again, input_ids=torch.arange(8)[None]), on)
    with model.disable_adapter():
        assert not torch.equal(logits(model, input_ids=torch.arange(8)[None]), on)


def test_trl(tmp_path):
    losses = script("train_with_trl").main(str(tmp_path))
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses[-1] < losses[0]


def test_fsdp2(tmp_path, monkeypatch):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    group = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in {**group, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.warns(UserWarning, match="returned a view tensor"):  # torch, of blocks
        losses = script("train_with_fsdp2").main(str(tmp_path / "field"))
    assert losses[-1] < losses[0]
    assert load_file(tmp_path / "field" / "steering.safetensors")["blocks.0.up.weight"].any()


def test_timm(tmp_path):
    model, again = script("train_timm").main(str(tmp_path))
    images = torch.randn(1, 3, 160, 160)
    with torch.no_grad():
        assert torch.equal(model.eval()(images), again.eval()(images))


def test_lightning(tmp_path):
    model = script("train_with_lightning").main(str(tmp_path))
    assert load_file(tmp_path / "steering.safetensors")["blocks.0.up.weight"].any()
    assert all(p.grad is None for name, p in model.named_parameters() if "steering" not in name)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_sentence_transformers(tmp_path):
    one, other = script("train_sentence_embeddings").main(str(tmp_path))
    assert torch.equal(one, other)


@pytest.mark.filterwarnings("ignore")
def test_lm_eval(tmp_path, monkeypatch):
    """A task of one's own, offline: which of two words goes on."""
    program = script("evaluate_with_lm_eval")
    import transformers
    from peft import get_peft_model

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    tokenizer(["the", "cat", "sat", "ran"]).save_pretrained(tmp_path / "base")
    sizes = {"n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 16, "vocab_size": 8}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=2, eos_token_id=3))
    model.save_pretrained(tmp_path / "base")
    whole = get_peft_model(model, rs.peft.HResConfig(rank=4, task_type="CAUSAL_LM"))
    with torch.no_grad():
        for parameter in rs.parameters(whole):
            parameter.add_(torch.randn_like(parameter))
    whole.save_pretrained(tmp_path / "field")
    rows = [{"text": "the cat", "choices": ["sat", "ran"], "label": label} for label in (0, 1, 1)]
    (tmp_path / "rows.json").write_text("\n".join(map(json.dumps, rows)))
    task = {
        "task": "words", "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.json")}},
        "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "text", "doc_to_choice": "choices",
        "doc_to_target": "label", "metric_list": [{"metric": "acc"}],
    }  # fmt: skip
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "words.yaml").write_text(json.dumps(task))
    found = program.main(str(tmp_path / "base"), str(tmp_path / "field"), "words", str(tmp_path / "tasks"))
    assert {name: result["acc,none"] for name, result in found.items()}.keys() == {"base", "field"}
