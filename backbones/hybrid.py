"""Hybrids: recurrent layers, state-space models or convolutions among attentions, in one list of `layers`.

Which mixer a block has is asked block by block. Blocks with one part only, as in Nemotron-H, have a mixer or a
feed-forward; where an SSM and an attention run in parallel (Falcon-H1), the SSM is the mixer. Zamba uses one attention
block many times inside entries of its list: what is steered is each entry, with a field of its own.
"""

from torch import nn

from residual_steer.backbone import Backbone, first_of, parts
from residual_steer.registry import register_backbone
from residual_steer.scan_mamba import scan_linearly

MODELS = (
    "Bamba BailingHybrid FalconH1 GraniteMoeHybrid Jamba KimiLinear Lfm2 Lfm2Moe NemotronH OlmoHybrid Qwen3Next "
    "Qwen3_5Text Qwen3_5MoeText RecurrentGemma Zamba Zamba2"
)
MIXERS = ("mamba", "linear_attn", "conv", "temporal_block", "self_attn", "mamba_decoder.mamba")
MLPS = ("feed_forward", "mlp", "mlp_block", "block_sparse_moe", "shared_mlp")


@register_backbone("hybrid", matches=[f"transformers.{name}Model" for name in MODELS.split()])
def hybrid(model: nn.Module) -> Backbone:
    """Describe the stack of a hybrid of transformers."""
    blocks = model.layers
    mixer, mlp = parts(blocks, *MIXERS), parts(blocks, *MLPS)
    if first_of(blocks[0], "mixer") is not None:  # Nemotron-H calls every part so, whatever it does
        mixes = [block.block_type in {"linear_attention", "full_attention"} for block in blocks]
        mixer, mlp = (tuple("mixer" if one is want else None for one in mixes) for want in (True, False))
    return Backbone(blocks=blocks, width=model.config.hidden_size, mixer=mixer, mlp=mlp, prepare=scan_linearly)
