"""transformers' Trainer with a field as an adapter: checkpoints of kilobytes, exact resume, best model, 4-bit bases."""

import dataclasses
import functools

import pytest
import torch

import residual_steer as rs
from cases.case import text
from peft_models import BY_NAME, run, shake

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
HResConfig = rs.peft.HResConfig

pytestmark = pytest.mark.filterwarnings("ignore:Could not find a config file")  # of a base without a name
kinds = pytest.mark.parametrize("case", [BY_NAME["gpt2"], BY_NAME["hf-vit"]], ids=lambda case: case.name)


class Rows(torch.utils.data.Dataset):
    """Text or pictures of noise, the same for the same place."""

    def __init__(self, case):
        self.pictures = case.name == "hf-vit"

    def __len__(self):
        return 24

    def __getitem__(self, place):
        generator = torch.Generator().manual_seed(place)
        if self.pictures:
            return {"pixel_values": torch.randn(3, 16, 16, generator=generator), "labels": torch.tensor(place % 3)}
        ids = torch.randint(3, 50, (7,), generator=generator)
        return {"input_ids": ids, "labels": ids}


def trainer(case, folder, model=None, **options):
    if model is None:
        name = case.head.rpartition(".")[2]
        model = case.build()
        torch.manual_seed(0)
        model = peft.get_peft_model(model, HResConfig(rank=4, modules_to_save=[name]))
    arguments = transformers.TrainingArguments(
        str(folder),
        max_steps=8,
        per_device_train_batch_size=4,
        learning_rate=0.02,
        logging_steps=1,
        save_steps=4,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        label_names=["labels"],
        **options,
    )
    return transformers.Trainer(model, arguments, train_dataset=Rows(case), eval_dataset=Rows(case))


def losses(trained, key="loss"):
    return [entry[key] for entry in trained.state.log_history if key in entry]


@kinds
def test_checkpoints_are_small_and_resume_exactly(case, tmp_path):
    whole = trainer(case, tmp_path / "whole")
    whole.train()
    checkpoint = tmp_path / "whole" / "checkpoint-4"
    files = {file.name: file.stat().st_size for file in checkpoint.iterdir()}
    assert "adapter_model.safetensors" in files
    assert "model.safetensors" not in files
    assert files["adapter_model.safetensors"] < 5_000
    again = trainer(case, tmp_path / "again")
    again.train(resume_from_checkpoint=str(checkpoint))
    assert losses(again) == losses(whole)
    assert len(losses(whole)) == 8
    assert torch.equal(run(case, again.model), run(case, whole.model))
    with again.model.disable_adapter():
        assert torch.equal(run(case, again.model), run(case, case.build()))


@kinds
def test_the_best_model_comes_back(case, tmp_path):
    how = {"eval_strategy": "steps", "eval_steps": 4, "load_best_model_at_end": True}
    model = shake(peft.get_peft_model(case.build(), HResConfig(rank=4)))
    whole = trainer(case, tmp_path, model, **how, metric_for_best_model="eval_loss", greater_is_better=True)
    whole.train()  # the worst is asked for, which is the first
    assert losses(whole, "eval_loss")[0] > losses(whole, "eval_loss")[1]
    assert whole.state.best_model_checkpoint.endswith("checkpoint-4")
    best, last = (
        run(case, peft.PeftModel.from_pretrained(case.build(), tmp_path / f"checkpoint-{step}")) for step in (4, 8)
    )
    assert torch.equal(run(case, whole.model), best)
    assert not torch.equal(best, last)


@pytest.mark.parametrize("prepared", [False, True])
def test_a_4_bit_base_trains_and_the_adapter_loads_on_it(prepared, tmp_path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    wide = {"hidden_size": 64, "intermediate_size": 128}  # what its kernel for CPUs takes
    case = dataclasses.replace(
        BY_NAME["llama"], make=functools.partial(text, "LlamaForCausalLM", "LlamaConfig", **wide)
    )
    case.build().save_pretrained(tmp_path / "base")
    quantization = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )

    def base():
        kind = transformers.AutoModelForCausalLM
        return kind.from_pretrained(tmp_path / "base", quantization_config=quantization, device_map={"": "cpu"})

    model = base()
    assert any(type(parameter).__name__ == "Params4bit" for parameter in model.parameters())
    off = run(case, base())  # on a CPU evaluation packs the weights, and packed ones do not train
    if prepared:
        model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    whole = trainer(case, tmp_path / "run", peft.get_peft_model(model, HResConfig(rank=4, task_type="CAUSAL_LM")))
    whole.train()
    on = run(case, whole.model)
    with whole.model.disable_adapter():
        assert torch.equal(run(case, whole.model), off)
    assert {parameter.dtype for parameter in rs.parameters(whole.model)} == {torch.float32}
    again = peft.PeftModel.from_pretrained(base(), tmp_path / "run" / "checkpoint-8")
    assert torch.equal(run(case, again), on)
    assert not torch.equal(on, off)
