"""What transformers saves of a steered model comes back with its fields: by hand, Trainer, sentence-transformers."""

import copy
import json
import pickle
import warnings

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import Dataset
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MambaConfig,
    MambaForCausalLM,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

import residual_steer as rs
from residual_steer.errors import SteerError
from words import save_encoder

TINY = {"vocab_size": 64, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
MADE = {
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=32, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, **TINY)
    ),
    "mamba": lambda: MambaForCausalLM(MambaConfig(hidden_size=32, num_hidden_layers=2, **TINY)),
    "vit": lambda: ViTForImageClassification(
        ViTConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            image_size=16,
            patch_size=8,
        )
    ),
}


def made(kind):
    torch.manual_seed(0)
    return MADE[kind]()


def inputs(kind, rows=3):
    torch.manual_seed(1)
    return (
        {"pixel_values": torch.randn(rows, 3, 16, 16)}
        if kind == "vit"
        else {"input_ids": torch.randint(1, 64, (rows, 8))}
    )


def head(kind):
    return ["classifier", "vit.layernorm"] if kind == "vit" else []


def shake(model, name):
    """Give a field, and the head that it trains, values as training would."""
    torch.manual_seed(len(name))
    with torch.no_grad():
        for parameter in rs.parameters(model, name):
            parameter.add_(torch.randn_like(parameter), alpha=0.3)


def steered(kind):
    model = rs.steer(made(kind), rank=2, name="law", train=head(kind))
    shake(model, "law")
    rs.steer(model, rank=3, name="squad", site="input", train=head(kind))
    shake(model, "squad")
    return model.eval()


def logits(model, kind):
    with torch.no_grad():
        return model.eval()(**inputs(kind)).logits


@pytest.mark.parametrize("kind", MADE)
@pytest.mark.parametrize("mix", ["law", None, {"law": 0.5, "squad": -1.0}, ["squad", None, "law"]])
def test_save_pretrained_and_from_pretrained(kind, mix, tmp_path):
    model = steered(kind)
    rs.use(model, mix)
    config = copy.deepcopy(model.config.to_dict())
    model.save_pretrained(tmp_path)
    assert model.config.to_dict().keys() == config.keys()  # nothing of ours stays in it
    again = rs.from_pretrained(tmp_path)
    assert type(again) is type(model)
    assert torch.equal(logits(again, kind), logits(model, kind))
    for other in (None, "squad", "law"):
        rs.use(model, other), rs.use(again, other)
        assert torch.equal(logits(again, kind), logits(model, kind))
    with rs.use(again, None):  # what was saved as the base is the base
        torch.testing.assert_close(logits(again, kind), logits(made(kind), kind), rtol=0, atol=1e-6)


def test_a_plain_from_pretrained_says_how_the_field_comes_back(tmp_path, logged):
    steered("gpt2").save_pretrained(tmp_path)
    entry = json.loads((tmp_path / "config.json").read_text())["residual_steer"]
    assert entry == {"fields": ["law", "squad"], "selected": "squad", "on": "all"}
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert "residual_steer.from_pretrained_loads_this_field" in logged.getvalue()
    assert torch.equal(logits(plain, "gpt2"), logits(made("gpt2"), "gpt2"))


@pytest.mark.parametrize("kind", MADE)
def test_a_state_dict_that_was_saved_is_found(kind, tmp_path):
    model = steered(kind)
    model.save_pretrained(tmp_path, save_original_format=False)
    other = steered(kind)
    for name in ("law", "squad"):
        shake(other, name)
    assert not torch.equal(logits(other, kind), logits(model, kind))
    keys = other.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
    assert keys.unexpected_keys == []
    assert [key for key in keys.missing_keys if "lm_head" not in key] == []  # which is tied
    for name in ("squad", "law"):
        rs.use(model, name), rs.use(other, name)
        assert torch.equal(logits(other, kind), logits(model, kind))


def test_a_folder_without_a_field_is_refused(tmp_path):
    made("gpt2").save_pretrained(tmp_path)
    with pytest.raises(SteerError, match="no field was saved"):
        rs.from_pretrained(tmp_path)


def test_a_class_that_transformers_does_not_have_is_not_loaded_as_another(tmp_path):
    class Mine(GPT2LMHeadModel):
        pass

    model = rs.steer(Mine(made("gpt2").config), rank=2).eval()
    shake(model, "default")
    model.save_pretrained(tmp_path)
    with pytest.raises(SteerError, match="is a Mine, which transformers does not have"):
        rs.from_pretrained(tmp_path)
    assert torch.equal(logits(rs.from_pretrained(tmp_path, Mine), "gpt2"), logits(model, "gpt2"))


def test_unsteered_a_model_saves_as_before(tmp_path):
    model = steered("gpt2")
    assert "save_pretrained" in vars(model)
    rs.unsteer(model)
    assert "save_pretrained" not in vars(model)
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "residual_steer").exists()
    assert "residual_steer" not in (tmp_path / "config.json").read_text()


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_a_copy_saves_its_own_field(copied, tmp_path):
    model = steered("gpt2")
    other = copied(model)
    shake(other, "law")
    rs.use(other, "law")
    other.save_pretrained(tmp_path)
    assert torch.equal(logits(rs.from_pretrained(tmp_path), "gpt2"), logits(other, "gpt2"))
    rs.use(model, "law")
    assert not torch.equal(logits(model, "gpt2"), logits(other, "gpt2"))


class Rows(Dataset):
    def __init__(self, kind):
        torch.manual_seed(2)
        self.kind, self.rows = kind, inputs(kind, 24)
        self.labels = torch.randint(0, 2, (24,))

    def __len__(self):
        return 24

    def __getitem__(self, index):
        row = {name: value[index] for name, value in self.rows.items()}
        return row | {"labels": self.labels[index] if self.kind == "vit" else row["input_ids"]}


trained = pytest.mark.parametrize("kind", ["gpt2", "vit"])  # which has a head; Trainer knows no more of a family


def run(kind, folder, *, steps, resume=False, **options):
    """Train a steered model by Trainer; return it and its losses."""
    model = rs.steer(made(kind), rank=2, train=head(kind))
    arguments = TrainingArguments(
        folder, max_steps=steps, save_steps=3, logging_steps=1, learning_rate=0.02, per_device_train_batch_size=4,
        lr_scheduler_type="constant", report_to=[], disable_tqdm=True, use_cpu=True, seed=3, **options,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=Rows(kind), eval_dataset=Rows(kind))
    trainer.train(resume_from_checkpoint=resume)
    return model, {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}


@trained
def test_trainer_resumes_with_the_field_and_its_head(kind, tmp_path):
    whole, losses = run(kind, tmp_path / "whole", steps=6)
    resumed, later = run(kind, tmp_path / "cut", steps=6, resume=str(tmp_path / "whole" / "checkpoint-3"))
    assert losses == later
    for mine, other in zip(rs.parameters(whole), rs.parameters(resumed), strict=True):
        assert torch.equal(mine, other)
    again = rs.from_pretrained(tmp_path / "cut" / "checkpoint-6")
    assert torch.equal(logits(again, kind), logits(whole, kind))


@trained
def test_trainer_restores_the_best_model(kind, tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 3, "load_best_model_at_end": True}
    options |= {"metric_for_best_model": "loss", "greater_is_better": kind == "gpt2"}  # so that it is the first
    model, _ = run(kind, tmp_path, steps=6, **options)
    state = json.loads((tmp_path / "checkpoint-6" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"].endswith("checkpoint-3")
    best, last = (logits(rs.from_pretrained(tmp_path / f"checkpoint-{step}"), kind) for step in (3, 6))
    assert torch.equal(logits(model, kind), best)
    assert not torch.equal(best, last)


def test_sentence_transformers_save_the_field(tmp_path):
    st = pytest.importorskip("sentence_transformers")
    base, saved = tmp_path / "base", tmp_path / "saved"
    save_encoder(base, ["one", "two"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = rs.steer(st.SentenceTransformer(str(base), device="cpu"), rank=2)
        shake(model, "default")
        model.save_pretrained(str(saved))
        again = rs.load(st.SentenceTransformer(str(saved), device="cpu"), saved / "residual_steer" / "default")
    assert torch.equal(*(torch.as_tensor(each.encode(["one two"])) for each in (model, again)))
    rs.use(again, None)
    assert not torch.equal(*(torch.as_tensor(each.encode(["one two"])) for each in (model, again)))
