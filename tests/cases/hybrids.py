"""Hybrids: state-space models, recurrences and convolutions among attentions."""

from __future__ import annotations

from .case import before, causal, pair, points

JAMBA = (
    "num_key_value_heads=1 attn_layer_period=2 attn_layer_offset=1 expert_layer_period=2 expert_layer_offset=1 "
    "num_experts=4 mamba_d_state=4 mamba_dt_rank=4 use_mamba_kernels=False"
)
ZAMBA2 = (
    "layers_block_type=['hybrid','hybrid'] num_key_value_heads=2 mamba_d_state=4 mamba_headdim=8 n_mamba_heads=4 "
    "chunk_size=4 num_mem_blocks=1 use_mem_rope=True"
)
NEMOTRON = (
    "num_hidden_layers=3 layers_block_type=['mamba','mlp','attention'] num_key_value_heads=1 head_dim=8 "
    "ssm_state_size=4 mamba_num_heads=4 mamba_head_dim=8 n_groups=1 chunk_size=4"
)
FALCON = "num_key_value_heads=1 mamba_d_ssm=32 mamba_n_heads=4 mamba_d_head=8 mamba_n_groups=1 mamba_d_state=4"
QWEN3 = (
    "layer_types=['linear_attention','full_attention'] num_key_value_heads=1 head_dim=8 linear_num_key_heads=2 "
    "linear_num_value_heads=2 linear_key_head_dim=8 linear_value_head_dim=8 num_experts=4 num_experts_per_tok=2 "
    "moe_intermediate_size=8 shared_expert_intermediate_size=8"
)
LFM2 = "num_key_value_heads=1 layer_types=['conv','full_attention']"
GEMMA = "block_types=['recurrent','attention'] lru_width=16 attention_window_size=16"
WHY = {"untraced": "its recurrence is that of the mamba cases, its attention that of the llama layout"}
KERNELS = {"kernels": True, **WHY}
BROKEN = before("transformers", "5.15", generate="KeyError: 'mlp', which has no place in the cache")


def _layers(mixer: str | list[str | None], mlp: str | None = "feed_forward") -> dict[str, tuple[str | None, ...]]:
    return pair("model.layers.{}", mixer, mlp)


PARTS = points([f"model.layers.{i}" for i in range(3)], ["mixer", None, "mixer"], [None, "mixer", None])
ZAMBAS = pair("model.layers.{}.mamba_decoder", "mamba", None)
HYBRIDS = [
    causal("jamba", "Jamba", _layers(["mamba", "self_attn"]), "model.final_layernorm", JAMBA, scans=True, **KERNELS),
    # two entries of the list with one shared Transformer block, a Mamba layer of its own in each
    causal("zamba2", "Zamba2", ZAMBAS, "model.final_layernorm", ZAMBA2, **KERNELS),
    causal("nemotron-h", "NemotronH", PARTS, "model.norm_f", NEMOTRON, broken=BROKEN, **KERNELS),
    causal("falcon-h1", "FalconH1", _layers("mamba"), "model.final_layernorm", FALCON, **KERNELS),
    causal("qwen3-next", "Qwen3Next", _layers(["linear_attn", "self_attn"], "mlp"), "model.norm", QWEN3, **WHY),
    causal("lfm2", "Lfm2", _layers(["conv", "self_attn"]), "model.embedding_norm", LFM2, **WHY),
    causal(
        "recurrent-gemma", "RecurrentGemma", _layers("temporal_block", "mlp_block"), "model.final_norm", GEMMA, **WHY
    ),
]
