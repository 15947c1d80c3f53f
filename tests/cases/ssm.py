"""State-space models, and recurrences without attention."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from mamba_ssm_on_cpu import compiled, import_mamba_ssm

from .case import VOCABULARY, WIDTH, WITHOUT_CACHE, Case, causal, entering_pair, of_text, pair, tokens


def _mamba_ssm(layer: str, **more: Any) -> nn.Module:
    import_mamba_ssm()
    from mamba_ssm.models.config_mamba import MambaConfig
    from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel

    fused = compiled()
    mixer: dict[str, Any] = {"layer": layer, "d_state": 16}
    if layer == "Mamba2":
        mixer |= {"headdim": 16, "chunk_size": 16, "use_mem_eff_path": fused}
    shape = {"d_model": WIDTH, "n_layer": 2, "vocab_size": VOCABULARY, "pad_vocab_size_multiple": 1}
    return MambaLMHeadModel(MambaConfig(**shape, ssm_cfg=mixer, rms_norm=fused, fused_add_norm=fused, **more))


def in_steps(model: nn.Module, ids: Tensor) -> Tensor:
    """Return the logits of `mamba_ssm`'s model that reads four tokens at once, then one after the other."""
    from mamba_ssm.utils.generation import InferenceParams

    state = InferenceParams(max_seqlen=8, max_batch_size=2)
    state.key_value_memory_dict = model.allocate_inference_cache(2, 8)
    parts = [model(ids[:, :4], inference_params=state).logits]
    for position in range(4, ids.shape[1]):
        state.seqlen_offset = position
        parts.append(model(ids[:, position : position + 1], inference_params=state).logits)
    return torch.cat(parts, dim=1)


MAMBA, SCANS = pair("backbone.layers.{}", "mixer", None), {"scans": True, "kernels": True}
MAMBA2 = "state_size=4 head_dim=4 num_heads=8 n_groups=1 chunk_size=4"  # eight: the kernels ask for strides of 8
PAIRS = {"enter": entering_pair, "leave": sum, "kernels": True}
BY_MAMBA = {"untraced": "mamba goes through both"}
LOOP = {"untraced": "its recurrence is a loop that writes into a tensor step by step"}
SSM = [
    causal("mamba", "Mamba", MAMBA, "backbone.norm_f", "state_size=4", **SCANS),
    causal("mamba2", "Mamba2", MAMBA, "backbone.norm_f", MAMBA2, kernels=True, **BY_MAMBA),
    causal("falcon-mamba", "FalconMamba", MAMBA, "backbone.norm_f", "state_size=4", **SCANS, **BY_MAMBA),
    Case(
        "mamba_ssm-1",
        functools.partial(_mamba_ssm, "Mamba1", residual_in_fp32=True),
        tokens,
        MAMBA,
        "backbone.norm_f",
        **PAIRS,
    ),
    Case(
        "mamba_ssm-2",
        functools.partial(_mamba_ssm, "Mamba2", residual_in_fp32=False, d_intermediate=32),
        tokens,
        pair("backbone.layers.{}", "mixer"),
        "backbone.norm_f",
        untraced="mamba_ssm-1 goes through both, but for the backward pass",
        **PAIRS,
    ),
    of_text(  # generates in test_backbones_families.py: its cached step mixes the rows of a batch, steered or not
        *("rwkv", "RwkvForCausalLM", pair("rwkv.blocks.{}", "attention", "feed_forward"), "rwkv.ln_out"),
        "rescale_every=0",
        batch=WITHOUT_CACHE,
        **LOOP,
    ),
    causal(
        *("xlstm", "xLSTM", pair("backbone.blocks.{}", "mlstm_layer", "ffn"), "backbone.out_norm"),
        "hidden_size=64 num_heads=2 qk_dim_factor=1.0",
        beams_fail="cannot use beam search with a cache",
        **LOOP,
    ),
]
