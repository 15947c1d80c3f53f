"""Configs of transformers, shrunk: the same architecture with few layers of few features and a small vocabulary.

A config is made by its own class from keywords, so that what it derives from others (kinds of layers, head sizes) is
derived from the small sizes. Sizes are chosen by the names that configs of transformers use; what a family needs beside
that stands in `coverage_recipes`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from coverage_recipes import RECIPES

WIDTH, HEADS, HEAD, FEED_FORWARD, VOCABULARY, LAYERS = 64, 4, 16, 96, 160, 4

SIZES: tuple[tuple[int, str], ...] = (
    (
        WIDTH,
        """hidden_size d_model n_embd dim n_embed embedding_size word_embed_proj_dim
        embed_dim emb_dim encoder_hidden_size model_dim attention_hidden_size entity_emb_size lru_width hidden_dim
        output_dim projection_dim output_hidden_size encoder_hidden_dim decoder_hidden_size decoder_hidden_dim
        cross_attention_hidden_size text_hidden_size conv_channels backbone_hidden_size
        dim_model hidden_size_per_layer attention_dim""",
    ),
    (
        HEADS,
        """num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads attention_heads
        num_encoder_attention_heads num_decoder_attention_heads encoder_num_attention_heads
        num_cross_attention_heads speech_encoder_attention_heads swa_num_attention_heads linear_num_key_heads
        linear_num_value_heads num_qk_heads mamba_num_heads num_self_attention_heads num_codebooks num_linear_heads
        linear_num_attention_heads n_attn_heads""",
    ),
    (
        HEAD,
        """head_dim d_kv kv_channels qk_nope_head_dim v_head_dim attention_head_dim linear_key_head_dim
        linear_value_head_dim mamba_head_dim mamba_d_head global_head_dim swa_head_dim swa_v_head_dim
        attention_head_size index_head_dim dim_head linear_head_dim mamba_headdim""",
    ),
    (
        FEED_FORWARD,
        """intermediate_size ffn_dim d_ff n_inner encoder_ffn_dim decoder_ffn_dim moe_intermediate_size
        shared_expert_intermediate_size ffn_hidden_size shared_intermediate_size intermediate_size_mlp
        moe_shared_expert_intermediate_size expert_ffn_hidden_size expert_intermediate_size dim_inner
        encoder_intermediate_size dense_intermediate_size mlp_dim ffn_intermediate_size
        moe_shared_intermediate_size encoder_intermediate_dim decoder_intermediate_size feed_forward_size
        speech_encoder_intermediate_size""",
    ),
    (LAYERS, "num_hidden_layers n_layer n_layers num_layers num_blocks"),
    (
        2,
        """encoder_layers decoder_layers num_encoder_layers num_decoder_layers num_experts_per_tok moe_topk moe_top_k
        num_experts_per_token top_k_experts moe_k num_hidden_groups_ encoder_num_hidden_layers depth
        decoder_num_hidden_layers mamba_expand topk_experts experts_per_token n_activated_experts vision_layers
        num_local_blocks speech_encoder_layers""",
    ),
    (VOCABULARY, "vocab_size vocab_size_per_layer_input text_vocab_size"),
    (
        4,
        """num_experts num_local_experts n_routed_experts moe_num_experts num_local_routed_experts zero_expert_num
        n_experts conv_kernel mamba_d_conv num_global_experts moe_num_primary_router_experts""",
    ),
    (
        1,
        """n_group topk_group first_k_dense_replace n_shared_experts num_shared_experts moe_layer_start_index n_groups
        mamba_n_groups num_nextn_predict_layers_ decoder_sparse_step moe_num_shared_experts num_expert_group
        moe_layer_freq_ num_dense_layers n_expert_groups n_limited_groups""",
    ),
    (
        8,
        """qk_rope_head_dim rotary_dim state_size mamba_d_state chunk_size mamba_chunk_size ssm_state_size
        time_step_rank_ index_topk patch_size mamba_chunk_length chunk_length_""",
    ),
    (
        16,
        """kv_lora_rank q_lora_rank o_lora_rank bottleneck_size num_mel_bins position_embedding_size
        hidden_size_per_layer_input attention_chunk_size input_feat_per_channel conv_pos
        num_conv_pos_embeddings codebook_size""",
    ),
    (32, "image_size sliding_window attention_window_size local_attention window_size_ max_length_"),
    (
        128,
        """max_position_embeddings n_positions n_ctx max_source_positions max_target_positions max_seq_len seq_length
        max_sequence_length max_seq_length context_length model_max_length""",
    ),
)
BY_NAME = {name.rstrip("_"): size for size, names in SIZES for name in names.split() if not name.endswith("_")}
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1, "sep_token_id": 2}
KEY_VALUE = ("num_key_value_heads", "num_kv_heads", "n_head_kv", "multi_query_group_num", "swa_num_key_value_heads")
DEPTHS = ("depths", "num_blocks", "layer_depths", "stage_depths", "num_encoder_blocks_")
PER_STAGE = ("hidden_sizes", "embed_dims", "embed_dim", "dims", "hidden_dim", "encoder_hidden_sizes", "dim", "channels")


def shrunk(config_class: Any, names: Sequence[str]) -> Any:
    """Return a small config of a class, with the first recipe that there is under one of the names."""
    name = next((name for name in names if name in RECIPES), names[-1])
    return config_class(**_keywords(config_class(), name))


def _keywords(config: Any, model_type: str, own: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the keywords that make a config small; `own` is what it needs where it stands, beside its recipe."""
    recipe = {**RECIPES.get(model_type, {}), **(own or {})}
    found: dict[str, Any] = {}
    values = {key: value for key, value in vars(config).items() if not key.startswith("_")}
    for key, value in values.items():
        if key in recipe:
            continue
        small = _small(key, value, values)
        if small is not None:
            found[key] = small
    layers = next((found[k] for k in ("num_hidden_layers", "n_layer", "n_layers", "num_layers") if k in found), None)
    layers = recipe.get("num_hidden_layers", layers)
    for key, value in values.items():
        if isinstance(layers, int) and key not in recipe and key not in found and _is_per_layer(key, value, values):
            found[key] = kinds(value, layers)
    nested = {key: value for key, value in values.items() if hasattr(value, "to_dict") and key not in recipe}
    for key, value in nested.items():  # "decoder.is_decoder" is for the config inside
        own = {name.partition(".")[2]: given for name, given in recipe.items() if name.startswith(f"{key}.")}
        found[key] = type(value)(**_keywords(value, value.model_type, own))
    return found | {key: value for key, value in recipe.items() if value is not ... and "." not in key}


def _small(key: str, value: Any, values: Mapping[str, Any]) -> Any:
    """Return a small value for one entry, None to leave it to the config."""
    if isinstance(value, bool) or value is None or isinstance(value, (str, float)):
        return None
    if isinstance(value, (list, tuple)) and value and all(isinstance(x, int) for x in value):
        return _small_list(key, value)
    if not isinstance(value, int):
        return None
    if key in IDS:
        return IDS[key]
    if key.endswith(("_token_id", "_token_index")):
        return min(value, VOCABULARY - 1 - sum(map(ord, key)) % 50)
    if key in KEY_VALUE:
        heads = next((values[k] for k in ("num_attention_heads", "n_head", "num_heads") if k in values), value)
        return HEADS if value == heads else 1 if value == 1 else 2
    if key == "hidden_size" and "depths" in values:  # of the last stage, which the config derives
        return None
    if key == "head_dim" and value == values.get("qk_rope_head_dim"):
        return BY_NAME["qk_rope_head_dim"]
    small = BY_NAME.get(key)
    return None if small is None else min(small, value) if value > 0 else None


def _small_list(key: str, value: Sequence[int]) -> Any:
    if key in DEPTHS:
        return type(value)([2] * len(value))
    if key in PER_STAGE:
        return type(value)([16 * (i + 1) if i else 16 for i in range(len(value))])
    if key in ("num_attention_heads", "num_heads"):
        return type(value)([2] * len(value))
    if key in ("image_size",):
        return type(value)([32] * len(value))
    if key in ("conv_dim", "tdnn_dim", "conv_channels"):
        return type(value)([32] * len(value))
    return None


def _is_per_layer(key: str, value: Any, values: Mapping[str, Any]) -> bool:
    layers = {values.get(name) for name in ("num_hidden_layers", "n_layer", "n_layers", "num_layers")}
    return isinstance(value, (list, tuple)) and len(value) > 1 and len(value) in layers


def kinds(value: Sequence[Any], layers: int) -> list[Any]:
    """Return as many entries as there are layers, every kind among them as long as there is room."""
    different = list({repr(x): x for x in value}.values())[:layers]
    rest = [x for x in value if len(different) < layers][: layers - len(different)]
    return sorted([*different, *rest], key=lambda x: [repr(y) for y in value].index(repr(x)))
