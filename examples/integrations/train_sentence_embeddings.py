"""sentence-transformers with a field: its trainer trains the field, and its folder carries it.

Run it: python examples/integrations/train_sentence_embeddings.py
"""

import sys

import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.losses import MultipleNegativesRankingLoss
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

import residual_steer as rs

WORDS = "[PAD] [UNK] one two three four five six".split()  # noqa: SIM905
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


def main(folder="runs/sentences"):
    """Train, and load again; return the embeddings of both models."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=len(WORDS), **SIZES)).save_pretrained(f"{folder}/base")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]")
    tokenizer.save_pretrained(f"{folder}/base")
    model = rs.steer(SentenceTransformer(f"{folder}/base", device="cpu"), rank=4)
    pairs = Dataset.from_dict({"anchor": ["one two", "three four"] * 4, "positive": ["two", "four five"] * 4})
    options = {"max_steps": 3, "report_to": [], "use_cpu": True, "save_strategy": "no"}
    arguments = SentenceTransformerTrainingArguments(folder, **options)
    SentenceTransformerTrainer(model, arguments, pairs, loss=MultipleNegativesRankingLoss(model)).train()
    model.save_pretrained(f"{folder}/saved")
    again = rs.load(SentenceTransformer(f"{folder}/saved", device="cpu"), f"{folder}/saved/residual_steer/default")
    return [each.encode(["one six"], convert_to_tensor=True) for each in (model, again)]


if __name__ == "__main__":
    print(main(*sys.argv[1:]))
