"""Decoders of text."""

from __future__ import annotations

import functools

from torch import nn

from .case import SPECIAL, VOCABULARY, WIDTH, WITHOUT_CACHE, Case, causal, of_transformers, pair

QWEN2 = (
    "num_key_value_heads=2 num_experts=4 num_experts_per_tok=2 moe_intermediate_size=8 "
    "shared_expert_intermediate_size=8"
)
DEEPSEEK = (
    "num_key_value_heads=2 q_lora_rank=8 kv_lora_rank=8 qk_rope_head_dim=4 qk_nope_head_dim=4 v_head_dim=8 "
    "moe_intermediate_size=8 n_routed_experts=4 num_experts_per_tok=2 n_group=1 topk_group=1 first_k_dense_replace=1"
)
OPT = "ffn_dim=32 max_position_embeddings=32 word_embed_proj_dim=8 dropout=0.0"
GEMMA = "num_key_value_heads=1 head_dim=8 sliding_window=4 layer_types=['sliding_attention','full_attention']"
BY_GPT2 = {"untraced": "gpt2 goes through both"}
EXPERTS = {"untraced": "its experts are picked by the data; gemma3 goes through both"}


def _gpt2(model: str) -> nn.Module:
    shape = {"vocab_size": VOCABULARY, "n_positions": 32, "n_embd": WIDTH, "n_layer": 2, "n_head": 2, "num_labels": 3}
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    return of_transformers(model, "GPT2Config", **shape, **dropout, **SPECIAL)


HEADS, LAYERS = pair("transformer.h.{}", "attn"), pair("model.layers.{}", "self_attn")
NEOX, FALCON = pair("gpt_neox.layers.{}", "attention"), pair("transformer.h.{}", "self_attention")
DECODER = pair("model.decoder.layers.{}", "self_attn", None)
LANGUAGE = [
    Case("gpt2", functools.partial(_gpt2, "GPT2LMHeadModel"), WITHOUT_CACHE, HEADS, "transformer.ln_f", generates=True),
    Case(
        "gpt2-classifier",
        functools.partial(_gpt2, "GPT2ForSequenceClassification"),
        WITHOUT_CACHE,
        HEADS,
        "score",
        **BY_GPT2,
    ),
    causal(
        "gpt-neox", "GPTNeoX", NEOX, "gpt_neox.final_layer_norm", "use_parallel_residual=True rotary_pct=0.5", **BY_GPT2
    ),
    causal("falcon", "Falcon", FALCON, "transformer.ln_f", "parallel_attn=True multi_query=True", **BY_GPT2),
    causal("gemma3", "Gemma3", LAYERS, "model.norm", GEMMA, config="Gemma3TextConfig"),
    causal("qwen2-moe", "Qwen2Moe", LAYERS, "model.norm", QWEN2, **EXPERTS),
    causal("deepseek-v3", "DeepseekV3", LAYERS, "model.norm", DEEPSEEK, **EXPERTS),
    causal("opt", "OPT", DECODER, "model.decoder.final_layer_norm", OPT, untraced="gemma3 goes through both"),
]
