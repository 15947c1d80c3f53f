"""A field beside a base in 4 bits (nf4, quantised twice), by bitsandbytes and PEFT, as QLoRA does.

Run it: python examples/integrations/train_in_4_bit.py
"""

import sys

import torch
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, Trainer, TrainingArguments

from residual_steer.peft import HResConfig

FOUR = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}


def base(folder):
    """Load the model in 4 bits."""
    four = BitsAndBytesConfig(**FOUR, bnb_4bit_compute_dtype=torch.float32)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=four, device_map={"": "cpu"})


def main(folder="runs/nf4"):
    """Train, and load the adapter on another copy of the base; return both models."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=64, **SIZES)).save_pretrained(f"{folder}/base")
    model = prepare_model_for_kbit_training(base(f"{folder}/base"), use_gradient_checkpointing=False)  # before PEFT
    model = get_peft_model(model, HResConfig(rank=4, task_type="CAUSAL_LM"))
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.arange(24 * 8).reshape(24, 8) % 64]
    arguments = TrainingArguments(folder, max_steps=3, learning_rate=0.02, report_to=[], use_cpu=True)
    Trainer(model, arguments, train_dataset=rows).train()
    model.save_pretrained(f"{folder}/field")
    return model, PeftModel.from_pretrained(base(f"{folder}/base"), f"{folder}/field")


if __name__ == "__main__":
    print(main(*sys.argv[1:])[1].peft_config)
