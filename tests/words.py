"""Tokenizers of a few words, and a model of sentences on disk."""

from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

NAMES = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}


def tokenizer(words):
    """Return a tokenizer of these words, whose first are those of `NAMES`."""
    import tokenizers

    known = {word: place for place, word in enumerate([*NAMES.values(), *words])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(known, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, **NAMES)


def save_encoder(folder, words):
    """Save what sentence-transformers loads: a small BERT and its tokenizer."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    BertModel(BertConfig(vocab_size=20, **sizes)).save_pretrained(folder)
    tokenizer(words).save_pretrained(folder)
