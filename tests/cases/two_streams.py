"""Encoder-decoders: the blocks of the encoder, then those of the decoder."""

from __future__ import annotations

import functools
from typing import Any

import torch

from .case import LENGTH, VOCABULARY, WIDTH, Case, Points, before, of_text, of_transformers, points, read

T5 = "num_layers=2 d_kv=8 d_ff=32 dropout_rate=0.0 decoder_start_token_id=1 feed_forward_proj='gated-gelu'"
BART = (
    f"d_model={WIDTH} encoder_layers=2 decoder_layers=2 encoder_attention_heads=2 decoder_attention_heads=2 "
    "encoder_ffn_dim=32 decoder_ffn_dim=32 decoder_start_token_id=1 forced_eos_token_id=None dropout=0.0 "
    "attention_dropout=0.0 activation_dropout=0.0"
)
WHISPER = (
    f"vocab_size={VOCABULARY} num_mel_bins=8 max_source_positions=10 max_target_positions=16 pad_token_id=0 "
    f"bos_token_id=1 eos_token_id=2 {BART}"
)
BROKEN = before("torch", "2.7", export="'Attempted to insert a get_attr Node' is warned of where buffers are read")
BY_T5 = {"untraced": "t5 goes through both"}


def _both(prefix: str, name: str, mixer: str, mlps: list[str] | None) -> Points:
    blocks = [f"{prefix}{stack}.{name}.{index}" for stack in ("encoder", "decoder") for index in range(2)]
    return points(blocks, mixer, mlps and [mlps[0], mlps[0], mlps[1], mlps[1]])


def _pair_of_texts() -> dict[str, Any]:
    ids, more = (torch.randint(3, VOCABULARY, (2, length)) for length in (LENGTH, 5))
    return {"input_ids": ids, "decoder_input_ids": more, "use_cache": False}


def _speech() -> dict[str, Any]:
    ids = torch.randint(3, VOCABULARY, (2, 5))
    return {"input_features": torch.randn(2, 8, 20), "decoder_input_ids": ids, "use_cache": False}


TEXTS = {"batch": _pair_of_texts, "generates": True}
T5_POINTS = _both("", "block", "layer.0.SelfAttention", ["layer.1.DenseReluDense", "layer.2.DenseReluDense"])
BART_POINTS = _both("model.", "layers", "self_attn", None)
TWO_STREAMS = [
    of_text("t5", "T5ForConditionalGeneration", T5_POINTS, "decoder.final_layer_norm", T5, broken=BROKEN, **TEXTS),
    of_text(
        *("bart", "BartForConditionalGeneration", BART_POINTS, "model.decoder.layernorm_embedding"),
        f"max_position_embeddings=32 {BART}",
        **TEXTS,
        **BY_T5,
    ),
    Case(
        "whisper",
        functools.partial(of_transformers, "WhisperForConditionalGeneration", "WhisperConfig", **read(WHISPER)),
        _speech,
        BART_POINTS,
        "model.decoder.layer_norm",
        **BY_T5,
    ),
]
