"""TRL's trainers with a field as an adapter: no second model, and a preference loss that begins at ln 2."""

import math

import pytest

import residual_steer as rs
from peft_models import shake
from words import tokenizer

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
trl = pytest.importorskip("trl", reason="trl is not installed")
datasets = pytest.importorskip("datasets")
HResConfig = rs.peft.HResConfig

pytestmark = [
    pytest.mark.filterwarnings("ignore:Could not find a config file"),  # of a base without a name
    pytest.mark.filterwarnings("ignore::UserWarning:trl"),
]
WORDS = ["the", "a", "cat", "dog", "sat", "ran", "on", "under", "mat", "log", "it", "was", "bad"]
PAIRS = {
    "prompt": ["the cat", "a dog"] * 4,
    "chosen": ["sat on the mat", "ran under a log"] * 4,
    "rejected": ["was bad", "it was bad"] * 4,
}


def base(kind="GPT2LMHeadModel", **options):
    import torch

    torch.manual_seed(0)
    shape = {"n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 64, "vocab_size": 4 + len(WORDS)}
    ends = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    still = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    return getattr(transformers, kind)(transformers.GPT2Config(**shape, **ends, **still, **options))


def trained(kind, model, folder, rows, **more):
    """Train for three steps; return the trainer and its losses."""
    options = {key: more.pop(key) for key in list(more) if key in {"num_generations", "max_completion_length", "beta"}}
    if kind != "GRPO":
        options["max_length"] = 32
    arguments = getattr(trl, f"{kind}Config")(
        str(folder),
        max_steps=3,
        per_device_train_batch_size=2,
        logging_steps=1,
        save_steps=3,
        learning_rate=0.01,
        report_to=[],
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        gradient_checkpointing=False,
        **options,
    )
    made = getattr(trl, f"{kind}Trainer")(
        model, args=arguments, train_dataset=datasets.Dataset.from_dict(rows), processing_class=tokenizer(WORDS), **more
    )
    made.train()
    return made, [entry["loss"] for entry in made.state.log_history if "loss" in entry]


def assert_small(folder):
    files = {file.name: file.stat().st_size for file in (folder / "checkpoint-3").iterdir()}
    assert files["adapter_model.safetensors"] < 5_000
    assert "model.safetensors" not in files


@pytest.mark.parametrize("kind", ["SFT", "GRPO", "Reward"])
def test_trainers_take_the_config(kind, tmp_path):
    rows = {"SFT": {"text": PAIRS["chosen"]}, "GRPO": {"prompt": PAIRS["prompt"]}, "Reward": PAIRS}[kind]
    more, model, task = {}, base(), "CAUSAL_LM"
    if kind == "GRPO":
        more = {"reward_funcs": lambda completions, **_: [float(len(each)) for each in completions]}
        more |= {"num_generations": 2, "max_completion_length": 4, "beta": 0.1}
    elif kind == "Reward":
        model, task = base("GPT2ForSequenceClassification", num_labels=1), "SEQ_CLS"
    config = HResConfig(rank=4, task_type=task)
    made, losses = trained(kind, model, tmp_path, rows, peft_config=config, **more)
    assert all(math.isfinite(loss) for loss in losses)
    assert rs.fields(made.model)[0].trains
    assert all(any(value.any() for value in up.parameters()) for up in ups(made.model))
    assert_small(tmp_path)


def ups(model):
    return [m["default"].up for m in model.modules() if isinstance(m, rs.peft.HResLayer)]


@pytest.mark.parametrize("how", ["config", "fresh", "trained", "loaded", "beside a reference"])
def test_dpo_begins_at_ln_2_without_a_second_model(how, tmp_path):
    more, model = {}, base()
    if how == "config":
        more = {"peft_config": HResConfig(rank=4)}
    else:
        model = peft.get_peft_model(model, HResConfig(rank=4, dropout=0.5))  # which TRL switches off
    if how in {"trained", "loaded", "beside a reference"}:
        shake(model).save_pretrained(tmp_path / "field")
    if how == "loaded":
        model = peft.PeftModel.from_pretrained(base(), tmp_path / "field", is_trainable=True)
    if how == "beside a reference":
        again = peft.PeftModel.from_pretrained(base(), tmp_path / "field")
        more = {"ref_model": again.get_base_model()}  # TRL takes no reference in a wrapper
    made, losses = trained("DPO", model, tmp_path / "run", PAIRS, **more)
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses[2] < losses[0]
    if how != "beside a reference":
        assert made.ref_model is None
    assert [field.name for field in rs.fields(made.model) if field.trains] == ["default"]
    assert_small(tmp_path / "run")
