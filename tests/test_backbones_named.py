"""Every class of transformers that a family names, built small and without memory, has its blocks where it says."""

import importlib
import re
from pathlib import Path

import pytest
import torch

import residual_steer as rs
from residual_steer import registry

transformers = pytest.importorskip("transformers")
rs.list_backbones()
MODULES = {
    name: f"transformers.models.{path.parent.name}.{path.stem}"
    for path in Path(transformers.__file__).parent.glob("models/*/modeling_*.py")
    for name in re.findall(r"^class (\w+)", path.read_text(), re.MULTILINE)
}
NAMED = [
    (family.name, match.partition(".")[2])
    for family in registry._families.values()
    for match in family.matches
    if match.startswith("transformers.") and match.partition(".")[2] in MODULES
]

# What most configs call their sizes; each takes those that it has.
SIZES = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embedding_size", "embedding_dim"), 16),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers", "num_blocks"), 2),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "encoder_attention_heads", "decoder_attention_heads"), 2),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "n_head", "n_heads", "num_heads"), 2),
    **dict.fromkeys(("intermediate_size", "encoder_ffn_dim", "decoder_ffn_dim", "d_ff", "ffn_dim", "hidden_dim"), 32),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts"), 4),
    **{"head_dim": 8, "vocab_size": 50, "moe_intermediate_size": 16, "image_size": 16, "patch_size": 8},
    **{"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "rescale_every": 0, "rotary_dim": 4, "d_kv": 8},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
WINDOWS = {"num_heads": [2, 4], "depths": [2, 2], "embed_dim": 8, "window_size": 2}
WINDOWS |= {"num_layers": None, "num_attention_heads": None}
BIT = {"embedding_size": 32, "hidden_sizes": [128, 256], "depths": [2, 2]}
STAGES = {"hidden_sizes": [8, 12], "depths": [2, 2], "num_stages": 2}
MAMBA2 = {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1}
# What else some need; None takes a size away.
MORE = {
    "GPTNeoModel": {"attention_types": [[["global", "local"], 1]]},
    "FalconModel": {"head_dim": None},
    "BambaModel": {**MAMBA2, "attn_layer_indices": [1]},
    "GraniteMoeHybridModel": {**MAMBA2, "layer_types": ["mamba", "attention"]},
    "Lfm2MoeModel": {"layer_types": ["conv", "full_attention"]},
    "ZambaModel": {
        "num_hidden_layers": 4,
        "layer_types": ["mamba", "hybrid"] * 2,
        "n_mamba_heads": 2,
        "head_dim": None,
    },
    "Zamba2Model": {"layer_types": ["mamba", "hybrid"], "mamba_headdim": 8, "n_mamba_heads": 4, "head_dim": None},
    "Dots1Model": {"n_shared_experts": 1},
    "MambaModel": {"embedding_size": None, "embedding_dim": None},
    "Mamba2Model": {"num_heads": 4},
    **{f"Bit{name}": BIT for name in ("Model", "Backbone")},
    **{f"ConvNext{name}": STAGES for name in ("Model", "Backbone", "V2Model", "V2Backbone")},
    **{f"{name}Model": WINDOWS for name in ("Swin", "Swinv2", "DonutSwin")},
    "YolosModel": {"image_size": [16, 16]},
}
# Those whose blocks are described as wholes only.
WITHOUT_PARTS = {"AlbertModel", *(name for family, name in NAMED if family == "resnet" and "ConvNext" not in name)}


def small(name):
    """Build a model of a class on no device."""
    cls = getattr(importlib.import_module(MODULES[name]), name)
    config = cls.config_class
    default = config()
    told = {key: size for key, size in SIZES.items() if hasattr(default, key)} | MORE.get(name, {})
    with torch.device("meta"):
        return cls(config(**{key: value for key, value in told.items() if value is not None}))


@pytest.mark.parametrize(("family", "name"), NAMED, ids=lambda value: value)
def test_a_named_class_has_its_blocks_where_its_family_says(family, name):
    backbone = rs.find_backbone(small(name))
    assert (backbone.name, backbone.path) == (family, "")
    for index in range(len(backbone.blocks)):
        parts = [backbone.point(index, site) for site in ("mixer", "mlp")]
        assert any(parts) == (name not in WITHOUT_PARTS)
