"""What single families of transformers need beside the sizes that all share, to be built small.

An entry `...` leaves a value to the config. The keys are `model_type`s, nested ones too.
"""

from __future__ import annotations

from typing import Any

_FOUR_OF_SIXTEEN = {"head_dim": 16, "num_key_value_heads": 2}
_QWEN4 = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 16,
    "indexer_compress_ratio": 2,
    "ngram_vocab_size_base": 200,
    "linear_num_key_heads": 2,
}
_DOTS3 = {
    "num_key_value_heads": 4,
    "index_n_heads": 2,
    "index_topk": 16,  # ties among keys of score zero are broken otherwise with a cache
    "head_dim": 24,
    "shared_experts_intermediate_size": 96,
    **{"swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_q_lora_rank": 16, "swa_kv_lora_rank": 16},
    **{"swa_head_dim": 24, "swa_qk_nope_head_dim": 16, "swa_v_head_dim": 16},
}
_TOKENIZER = {"num_filters": 4, "depths": [1] * 7}

RECIPES: dict[str, dict[str, Any]] = {
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 16, "attn_layer_indices": [1]},
    "bit": {"hidden_sizes": [32, 32, 32, 32], "embedding_size": 32, "num_groups": 4, "depths": [2, 2, 2, 2]},
    "blt": {"encoder_hash_byte_group_vocab": 200},
    "blt_local_encoder": {"hidden_size_global": 64, "num_hidden_layers": 1},
    "blt_local_decoder": {"hidden_size_global": 64, "num_hidden_layers": 2},
    "cohere_compass_text": {
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in ("full_attention", "sliding_attention")
        },
    },
    "dbrx": {"attn_config.rope_theta": 10000.0, "attn_config.clip_qkv": 8.0},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "donut-swin": {"embed_dim": 16, "image_size": 128, "patch_size": 4, "window_size": 4},
    "dia_decoder": {"cross_hidden_size": 64, "cross_num_attention_heads": 4, "cross_num_key_value_heads": 4},
    "dots1": {"n_shared_experts": 1, "n_routed_experts": 4, "num_experts_per_tok": 2},
    "dots3_note": _DOTS3,
    "dots3_note_text": _DOTS3,
    "efficientnet": {"width_coefficient": 1.0, "depth_coefficient": 0.5, "hidden_dim": 1280, "image_size": 64},
    "encoder-decoder": {"decoder.is_decoder": True, "decoder.add_cross_attention": True},
    "esm": {"vocab_size": 33, "pad_token_id": 1, "mask_token_id": 32},
    "fun_asr_nano": {"adaptor_config.intermediate_size": 16},
    "gemma3n": {"vision_config.architecture": "mobilenetv3_small_050"},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "intermediate_size": [96] * 4,
        "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        "num_kv_shared_layers": 2,
        "laurel_rank": 4,
    },
    "granitemoehybrid": {
        "mamba_n_heads": 8,
        "mamba_d_head": 16,
        "layer_types": ["linear_attention", "full_attention", "linear_attention", "full_attention"],
    },
    "hgnet_v2": {"hidden_sizes": ..., "depths": ..., "embedding_size": ...},
    "hunyuan_v1_dense": _FOUR_OF_SIXTEEN,
    "hunyuan_v1_moe": {**_FOUR_OF_SIXTEEN, "moe_topk": 2, "num_experts": 4},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 4},
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention", "conv"], "num_dense_layers": 1},
    "luke": {"entity_vocab_size": 200},
    "mimi": {"upsample_groups": 64, "num_filters": 8},
    "moonshine_streaming": {"num_key_value_heads": 4},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "ministral": _FOUR_OF_SIXTEEN,
    "nemotron": {"num_key_value_heads": 2},
    "perceiver": {
        "d_latents": 64,
        "d_model": 64,
        "num_latents": 8,
        "num_self_attends_per_block": 3,
        "num_self_attention_heads": 4,
        "num_cross_attention_heads": 4,
        "qk_channels": 64,
        "v_channels": 64,
        "max_position_embeddings": 64,
        "image_size": 32,
        "num_blocks": 2,
    },
    "qwen4_exp": _QWEN4,
    "qwen4_exp_text": _QWEN4,
    "reformer": {
        "is_decoder": True,
        "attn_layers": ["local", "lsh"],
        "num_hidden_layers": 2,
        "axial_pos_embds": False,
        "num_buckets": 2,
    },
    "ReformerForMaskedLM": {
        "is_decoder": False,
        "attn_layers": ["local", "lsh"],
        "num_hidden_layers": 2,
        "axial_pos_embds": False,
        "num_buckets": 2,
    },
    "shieldgemma2": {"yes_token_index": 5, "no_token_index": 6},
    "speech-encoder-decoder": {"decoder.is_decoder": True, "decoder.add_cross_attention": True},
    "swin": {"embed_dim": 16, "image_size": 128, "patch_size": 4, "window_size": 4},
    "swinv2": {"embed_dim": 16, "image_size": 128, "patch_size": 4, "window_size": 4},
    "textnet": {"hidden_sizes": ..., "depths": ..., "image_size": 64},
    "parakeet_encoder": {"num_mel_bins": ...},
    "vibevoice_acoustic_tokenizer": _TOKENIZER,
    "vibevoice_acoustic_tokenizer_decoder": _TOKENIZER,
    "vibevoice_acoustic_tokenizer_encoder": _TOKENIZER,
    "vision-encoder-decoder": {"decoder.is_decoder": True, "decoder.add_cross_attention": True},
    "wav2vec2-bert": {"vocab_size": 32},
    "wav2vec2-conformer": {"vocab_size": 32},
    "xlstm": {"embedding_dim": 64, "qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 5,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid", "linear_attention"],
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "mamba_dt_rank": 4,
    },
    "zamba2": {
        "num_hidden_layers": 5,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid", "linear_attention"],
        "hybrid_layer_ids": [1, 3],
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "kv_channels": 32,
        "num_query_groups": 4,
        "mamba_headdim": 16,
    },
}
