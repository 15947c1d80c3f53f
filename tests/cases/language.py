"""Decoders of text."""

from __future__ import annotations

import functools

from torch import nn

from .case import SPECIAL, VOCABULARY, WIDTH, WITHOUT_CACHE, Case, of_transformers, pair, text


def _gpt2(model: str) -> nn.Module:
    shape = {"vocab_size": VOCABULARY, "n_positions": 32, "n_embd": WIDTH, "n_layer": 2, "n_head": 2, "num_labels": 3}
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    return of_transformers(model, "GPT2Config", **shape, **dropout, **SPECIAL)


GPT2_POINTS = pair("transformer.h.{}", "attn")

LLAMA_POINTS = pair("model.layers.{}", "self_attn")

LANGUAGE = [
    Case(
        "gpt2",
        functools.partial(_gpt2, "GPT2LMHeadModel"),
        WITHOUT_CACHE,
        GPT2_POINTS,
        "transformer.ln_f",
        generates=True,
    ),
    Case(
        "gpt2-classifier",
        functools.partial(_gpt2, "GPT2ForSequenceClassification"),
        WITHOUT_CACHE,
        GPT2_POINTS,
        "score",
    ),
    Case(
        "gpt-neox",
        functools.partial(text, "GPTNeoXForCausalLM", "GPTNeoXConfig", use_parallel_residual=True, rotary_pct=0.5),
        WITHOUT_CACHE,
        pair("gpt_neox.layers.{}", "attention"),
        "gpt_neox.final_layer_norm",
        generates=True,
        untraced="gpt2 goes through both",
    ),
    Case(
        "falcon",
        functools.partial(text, "FalconForCausalLM", "FalconConfig", parallel_attn=True, multi_query=True),
        WITHOUT_CACHE,
        pair("transformer.h.{}", "self_attention"),
        "transformer.ln_f",
        generates=True,
        untraced="gpt2 goes through both",
    ),
    Case(
        "gemma3",
        functools.partial(
            text,
            "Gemma3ForCausalLM",
            "Gemma3TextConfig",
            num_key_value_heads=1,
            head_dim=8,
            sliding_window=4,
            layer_types=["sliding_attention", "full_attention"],
        ),
        WITHOUT_CACHE,
        LLAMA_POINTS,
        "model.norm",
        generates=True,
    ),
    Case(
        "qwen2-moe",
        functools.partial(
            text,
            "Qwen2MoeForCausalLM",
            "Qwen2MoeConfig",
            num_key_value_heads=2,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=8,
            shared_expert_intermediate_size=8,
        ),
        WITHOUT_CACHE,
        LLAMA_POINTS,
        "model.norm",
        generates=True,
        untraced="its experts are picked by the data; gemma3 goes through both",
    ),
    Case(
        "deepseek-v3",
        functools.partial(
            text,
            "DeepseekV3ForCausalLM",
            "DeepseekV3Config",
            num_key_value_heads=2,
            q_lora_rank=8,
            kv_lora_rank=8,
            qk_rope_head_dim=4,
            qk_nope_head_dim=4,
            v_head_dim=8,
            moe_intermediate_size=8,
            n_routed_experts=4,
            num_experts_per_tok=2,
            n_group=1,
            topk_group=1,
            first_k_dense_replace=1,
        ),
        WITHOUT_CACHE,
        LLAMA_POINTS,
        "model.norm",
        generates=True,
        untraced="its experts are picked by the data; gemma3 goes through both",
    ),
    Case(
        "opt",
        functools.partial(
            text,
            "OPTForCausalLM",
            "OPTConfig",
            ffn_dim=32,
            max_position_embeddings=32,
            word_embed_proj_dim=8,
            dropout=0.0,
        ),
        WITHOUT_CACHE,
        pair("model.decoder.layers.{}", "self_attn", None),
        "model.decoder.final_layer_norm",
        generates=True,
        untraced="gemma3 goes through both",
    ),
]
