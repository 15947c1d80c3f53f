"""transformers' Trainer with a field as PEFT's adapter: checkpoints of kilobytes that resume exactly.

Run it: python examples/integrations/train_with_trainer.py
"""

import sys

import torch
from peft import PeftModel, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from residual_steer.peft import HResConfig


def base():
    """Return a small model; `AutoModelForCausalLM.from_pretrained` takes its place."""
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=32, n_head=2, n_positions=16, vocab_size=64))


def main(folder="runs/trainer"):
    """Train, and load the adapter again; return both models."""
    texts = torch.arange(24 * 8).reshape(24, 8) % 64
    rows = [{"input_ids": ids, "labels": ids} for ids in texts]
    model = get_peft_model(base(), HResConfig(rank=4, task_type="CAUSAL_LM"))
    more = {"report_to": [], "dataloader_pin_memory": torch.cuda.is_available()}
    arguments = TrainingArguments(folder, max_steps=6, save_steps=3, learning_rate=0.02, **more)
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    trainer.save_model(folder)
    return model, PeftModel.from_pretrained(base(), folder)


if __name__ == "__main__":
    print(main(*sys.argv[1:])[1].peft_config)
