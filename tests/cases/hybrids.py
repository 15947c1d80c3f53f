"""Hybrids: state-space models, recurrences and convolutions among attentions."""

from __future__ import annotations

import functools

from .case import WITHOUT_CACHE, Case, before, pair, points, text

MAMBA2 = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 4}
WHY = "its recurrence is that of the mamba cases, its attention that of the llama layout"

HYBRIDS = [
    Case(
        "jamba",
        functools.partial(
            text,
            "JambaForCausalLM",
            "JambaConfig",
            num_key_value_heads=1,
            attn_layer_period=2,
            attn_layer_offset=1,
            expert_layer_period=2,
            expert_layer_offset=1,
            num_experts=4,
            mamba_d_state=4,
            mamba_dt_rank=4,
            use_mamba_kernels=False,
        ),
        WITHOUT_CACHE,
        pair("model.layers.{}", ["mamba", "self_attn"], "feed_forward"),
        "model.final_layernorm",
        generates=True,
        scans=True,
        kernels=True,
        untraced=WHY,
    ),
    Case(
        "zamba2",  # two entries of the list with one shared Transformer block, a Mamba layer of its own in each
        functools.partial(
            text,
            "Zamba2ForCausalLM",
            "Zamba2Config",
            layers_block_type=["hybrid", "hybrid"],
            num_key_value_heads=2,
            mamba_d_state=4,
            mamba_headdim=8,
            n_mamba_heads=4,
            chunk_size=4,
            num_mem_blocks=1,
            use_mem_rope=True,
        ),
        WITHOUT_CACHE,
        pair("model.layers.{}", "mamba_decoder.mamba", None),
        "model.final_layernorm",
        generates=True,
        kernels=True,
        untraced=WHY,
    ),
    Case(
        "nemotron-h",
        functools.partial(
            text,
            "NemotronHForCausalLM",
            "NemotronHConfig",
            num_hidden_layers=3,
            layers_block_type=["mamba", "mlp", "attention"],
            num_key_value_heads=1,
            head_dim=8,
            ssm_state_size=4,
            mamba_num_heads=4,
            mamba_head_dim=8,
            n_groups=1,
            chunk_size=4,
        ),
        WITHOUT_CACHE,
        points([f"model.layers.{i}" for i in range(3)], ["mixer", None, "mixer"], [None, "mixer", None]),
        "model.norm_f",
        generates=True,
        kernels=True,
        untraced=WHY,
        broken=before("transformers", "5.15", generate="KeyError: 'mlp', which has no place in the cache"),
    ),
    Case(
        "falcon-h1",
        functools.partial(text, "FalconH1ForCausalLM", "FalconH1Config", num_key_value_heads=1, **MAMBA2),
        WITHOUT_CACHE,
        pair("model.layers.{}", "mamba", "feed_forward"),
        "model.final_layernorm",
        generates=True,
        kernels=True,
        untraced=WHY,
    ),
    Case(
        "qwen3-next",
        functools.partial(
            text,
            "Qwen3NextForCausalLM",
            "Qwen3NextConfig",
            layer_types=["linear_attention", "full_attention"],
            num_key_value_heads=1,
            head_dim=8,
            linear_num_key_heads=2,
            linear_num_value_heads=2,
            linear_key_head_dim=8,
            linear_value_head_dim=8,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=8,
            shared_expert_intermediate_size=8,
        ),
        WITHOUT_CACHE,
        pair("model.layers.{}", ["linear_attn", "self_attn"]),
        "model.norm",
        generates=True,
        untraced=WHY,
    ),
    Case(
        "lfm2",
        functools.partial(
            text, "Lfm2ForCausalLM", "Lfm2Config", num_key_value_heads=1, layer_types=["conv", "full_attention"]
        ),
        WITHOUT_CACHE,
        pair("model.layers.{}", ["conv", "self_attn"], "feed_forward"),
        "model.embedding_norm",
        generates=True,
        untraced=WHY,
    ),
    Case(
        "recurrent-gemma",
        functools.partial(
            text,
            "RecurrentGemmaForCausalLM",
            "RecurrentGemmaConfig",
            block_types=["recurrent", "attention"],
            lru_width=16,
            attention_window_size=16,
        ),
        WITHOUT_CACHE,
        pair("model.layers.{}", "temporal_block", "mlp_block"),
        "model.final_norm",
        generates=True,
        untraced=WHY,
    ),
]
