"""Encoders of text and of speech."""

from __future__ import annotations

import functools

from .case import WIDTH, Case, floats, of_text, of_transformers, pair, points, read

NO_DROPOUT = "hidden_dropout_prob=0.0 attention_probs_dropout_prob=0.0"
ALBERT = f"embedding_size=8 num_hidden_layers=4 num_hidden_groups=2 classifier_dropout_prob=0.0 {NO_DROPOUT}"
DEBERTA = f"relative_attention=True position_buckets=4 pos_att_type=['c2p','p2c'] conv_kernel_size=3 {NO_DROPOUT}"
DISTILBERT = f"dim={WIDTH} n_layers=2 n_heads=2 hidden_dim=32 dropout=0.0 attention_dropout=0.0"
MODERN = "cls_token_id=1 sep_token_id=2 local_attention=4 layer_types=['full_attention','sliding_attention']"
SPEECH = (
    f"hidden_size={WIDTH} num_hidden_layers=2 num_attention_heads=2 intermediate_size=32 conv_dim=[8,8] "
    "conv_kernel=[10,3] conv_stride=[5,2] num_conv_pos_embeddings=4 num_conv_pos_embedding_groups=2 "
    "classifier_proj_size=8 num_labels=3 layerdrop=0.0 apply_spec_augment=False hidden_dropout=0.0 "
    "attention_dropout=0.0 activation_dropout=0.0 feat_proj_dropout=0.0"
)
BY_BERT = {"untraced": "bert goes through both"}

BERT, DEBERTAS = (
    pair("bert.encoder.layer.{}", "attention.self", None),
    pair("deberta.encoder.layer.{}", "attention.self", None),
)
GROUPS = points([f"albert.encoder.albert_layer_groups.{group}.albert_layers.0" for group in range(2)], None, None)
LAYERS = pair("model.layers.{}", "attn")
DISTIL = pair("distilbert.transformer.layer.{}", "attention", "ffn")
ENCODERS = [
    of_text("bert", "BertForSequenceClassification", BERT, "classifier", NO_DROPOUT),
    of_text("albert", "AlbertForTokenClassification", GROUPS, "classifier", ALBERT, **BY_BERT),  # blocks used twice
    of_text("deberta-v2", "DebertaV2ForTokenClassification", DEBERTAS, "classifier", DEBERTA, **BY_BERT),
    of_text("distilbert", "DistilBertForTokenClassification", DISTIL, "classifier", DISTILBERT, **BY_BERT),
    of_text(
        "modernbert",
        "ModernBertForTokenClassification",
        pair("model.layers.{}", "attn"),
        "classifier",
        MODERN,
        **BY_BERT,
    ),
    Case(
        "wav2vec2",
        functools.partial(of_transformers, "Wav2Vec2ForSequenceClassification", "Wav2Vec2Config", **read(SPEECH)),
        floats("input_values", 200),
        pair("wav2vec2.encoder.layers.{}", "attention", "feed_forward"),
        "classifier",
        pickle_fails="Serialization of parametrized modules is only supported through state_dict",
        **BY_BERT,
    ),
]
