"""State-space models, and recurrences without attention."""

from __future__ import annotations

import functools
from typing import Any

from torch import nn

from mamba_ssm_on_cpu import compiled, import_mamba_ssm

from .case import SPECIAL, VOCABULARY, WIDTH, WITHOUT_CACHE, Case, entering_pair, of_transformers, pair, text, tokens


def _mamba(family: str, **more: Any) -> nn.Module:
    shape = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": 2, "state_size": 4}
    return of_transformers(f"{family}ForCausalLM", f"{family}Config", **shape, **more, **SPECIAL)


def _mamba_ssm(layer: str, **more: Any) -> nn.Module:
    import_mamba_ssm()
    from mamba_ssm.models.config_mamba import MambaConfig
    from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel

    fused = compiled()
    mixer: dict[str, Any] = {"layer": layer, "d_state": 16}
    if layer == "Mamba2":
        mixer |= {"headdim": 16, "chunk_size": 16, "use_mem_eff_path": fused}
    config = MambaConfig(
        d_model=WIDTH,
        n_layer=2,
        vocab_size=VOCABULARY,
        ssm_cfg=mixer,
        rms_norm=fused,
        fused_add_norm=fused,
        pad_vocab_size_multiple=1,
        **more,
    )
    return MambaLMHeadModel(config)


MAMBA_POINTS = pair("backbone.layers.{}", "mixer", None)

SSM = [
    Case(
        "mamba",
        functools.partial(_mamba, "Mamba"),
        WITHOUT_CACHE,
        MAMBA_POINTS,
        "backbone.norm_f",
        generates=True,
        scans=True,
        kernels=True,
    ),
    Case(
        "mamba2",
        functools.partial(_mamba, "Mamba2", head_dim=8, num_heads=4, n_groups=1, chunk_size=4),
        WITHOUT_CACHE,
        MAMBA_POINTS,
        "backbone.norm_f",
        generates=True,
        kernels=True,
    ),
    Case(
        "falcon-mamba",
        functools.partial(_mamba, "FalconMamba"),
        WITHOUT_CACHE,
        MAMBA_POINTS,
        "backbone.norm_f",
        generates=True,
        scans=True,
        kernels=True,
    ),
    Case(
        "mamba_ssm-1",
        functools.partial(_mamba_ssm, "Mamba1", residual_in_fp32=True),
        tokens,
        MAMBA_POINTS,
        "backbone.norm_f",
        enter=entering_pair,
        leave=sum,
        kernels=True,
        compiled_backward_fails="view size is not compatible",
    ),
    Case(
        "mamba_ssm-2",
        functools.partial(_mamba_ssm, "Mamba2", residual_in_fp32=False, d_intermediate=32),
        tokens,
        pair("backbone.layers.{}", "mixer"),
        "backbone.norm_f",
        enter=entering_pair,
        leave=sum,
        kernels=True,
    ),
    Case(  # generates in test_backbones_recurrent.py: its cached step mixes the rows of a batch, steered or not
        "rwkv",
        functools.partial(text, "RwkvForCausalLM", "RwkvConfig", rescale_every=0),
        WITHOUT_CACHE,
        pair("rwkv.blocks.{}", "attention", "feed_forward"),
        "rwkv.ln_out",
        untraced="its recurrence is a loop that writes into a tensor step by step",
    ),
    Case(
        "xlstm",
        functools.partial(text, "xLSTMForCausalLM", "xLSTMConfig", hidden_size=64, num_heads=2, qk_dim_factor=1.0),
        WITHOUT_CACHE,
        pair("backbone.blocks.{}", "mlstm_layer", "ffn"),
        "backbone.out_norm",
        generates=True,
        beams_fail="cannot use beam search with a cache",
        untraced="its recurrence is a loop that writes into a tensor step by step",
    ),
]
