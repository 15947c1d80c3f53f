"""TRL's SFTTrainer, then its DPOTrainer, with a field as PEFT's adapter: no second model, and a loss from ln 2 on.

Run it: python examples/integrations/train_with_trl.py
"""

import sys

import torch
from datasets import Dataset
from peft import get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from residual_steer.peft import HResConfig

WORDS = "<pad> <s> </s> <unk> the cat dog sat ran on mat log was bad".split()  # noqa: SIM905


def main(folder="runs/trl"):
    """Fine-tune on texts and then on preferences; return the losses of the latter."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    torch.manual_seed(0)
    config = GPT2Config(n_layer=2, n_embd=32, n_head=2, n_positions=32, vocab_size=len(WORDS), pad_token_id=0)
    model = get_peft_model(GPT2LMHeadModel(config), HResConfig(rank=4, task_type="CAUSAL_LM"))
    same = {"max_steps": 3, "per_device_train_batch_size": 2, "logging_steps": 1, "report_to": [], "use_cpu": True}
    same |= {"learning_rate": 0.01, "bf16": False, "max_length": 32, "gradient_checkpointing": False}
    texts = Dataset.from_dict({"text": ["the cat sat on the mat", "the dog ran on the log"] * 4})
    SFTTrainer(model, SFTConfig(folder, **same), None, texts, None, tokenizer).train()
    pairs = {"prompt": ["the cat"] * 8, "chosen": ["sat on the mat"] * 8, "rejected": ["was bad"] * 8}
    trainer = DPOTrainer(model, None, DPOConfig(folder, **same), None, Dataset.from_dict(pairs), None, tokenizer)
    trainer.train()
    return [record["loss"] for record in trainer.state.log_history if "loss" in record]


if __name__ == "__main__":
    print(main(*sys.argv[1:]))
