"""Models with a state: Mamba, of transformers and of `mamba_ssm`; RWKV and xLSTM; hybrids of recurrence and attention.

In transformers a block maps the stream to the stream. In `mamba_ssm` a block takes and returns the pair
`(hidden, residual)`, whose SUM is the stream, so that addition and normalisation can be fused.
"""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from residual_steer.backbone import Backbone, first_of, parts, stacked
from residual_steer.errors import SteerError
from residual_steer.registry import register_backbone
from residual_steer.scan_mamba import scan_linearly

MAMBA = "transformers.MambaModel transformers.Mamba2Model transformers.FalconMambaModel mamba_ssm.MixerModel"
HYBRIDS = (
    "Bamba BailingHybrid FalconH1 GraniteMoeHybrid Jamba KimiLinear Lfm2 Lfm2Moe NemotronH OlmoHybrid Qwen3Next "
    "Qwen3_5Text Qwen3_5MoeText RecurrentGemma Zamba Zamba2"
)
MIXERS = ("mamba", "linear_attn", "conv", "temporal_block", "self_attn")
MLPS = ("feed_forward", "mlp", "mlp_block", "block_sparse_moe", "shared_mlp")


@register_backbone("mamba", matches=MAMBA.split())
def mamba(model: nn.Module) -> Backbone:
    """Describe transformers' stacks, or that of `mamba_ssm` with Mamba-1 or Mamba-2 mixers and, maybe, MLPs."""
    if not hasattr(model, "embedding"):  # transformers calls it `embeddings`
        return stacked(model, "layers", mixer=("mixer",), prepare=scan_linearly)
    width, pair = model.embedding.embedding_dim, {"read": _read_pair, "write": _write_pair, "leave": _leave_pair}
    return Backbone(blocks=model.layers, width=width, mixer="mixer", mlp="mlp", **pair)


def _read_pair(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """Return hidden + residual, the stream that enters a `mamba_ssm` block; the first block has no residual yet."""
    hidden, residual = (*args, None, None)[:2]
    return _leave_pair((kwargs.get("hidden_states", hidden), kwargs.get("residual", residual)))


def _leave_pair(output: tuple[Tensor, Tensor | None]) -> Tensor:
    """Return hidden + residual, the stream that leaves a `mamba_ssm` block."""
    hidden, residual = output
    return hidden if residual is None else hidden + residual


def _write_pair(output: tuple[Tensor, Tensor], f: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Move the sum by moving the residual, which is the half that is kept in fp32."""
    hidden, residual = output
    return hidden, f(residual)


@register_backbone("recurrent", matches=["transformers.RwkvModel", "transformers.xLSTMModel"])
def recurrent(model: nn.Module) -> Backbone:
    """Describe RWKV or xLSTM, whose blocks take the stream and their state, and return both.

    Raises:
        SteerError: an RWKV that computes with another stream in evaluation mode than in training.
    """
    every = getattr(model.config, "rescale_every", 0)
    if 0 < every < len(model.blocks):
        raise SteerError(
            f"in evaluation mode this RWKV halves its stream after every {every} blocks, in training it does not, so "
            "that a field would act on another stream than the one that it learned from. Switch that off, before the "
            "model is first called: model.config.rescale_every = 0 (it only keeps fp16 from overflowing)."
        )
    return stacked(model, "blocks", mixer=("attention", "mlstm_layer"), mlp=("feed_forward", "ffn"))


@register_backbone("hybrid", matches=[f"transformers.{name}Model" for name in HYBRIDS.split()])
def hybrid(model: nn.Module) -> Backbone:
    """Describe recurrent layers, SSMs or convolutions among attentions, in one list.

    Blocks with one part only, as in Nemotron-H, have a mixer or a feed-forward. Where an SSM and an attention run in
    parallel (Falcon-H1), the SSM is the mixer. Zamba uses one attention block many times inside entries of its list:
    what is steered is the layer that each entry ends with, which takes and returns the entry's stream, and of which
    transformers captures hidden states.
    """
    blocks = [first_of(entry, "mamba_decoder") or entry for entry in model.layers]
    mixer, mlp = parts(blocks, *MIXERS), parts(blocks, *MLPS)
    if first_of(blocks[0], "mixer") is not None:  # Nemotron-H calls every part so, whatever it does
        mixes = [block.block_type in {"linear_attention", "full_attention"} for block in blocks]
        mixer, mlp = (tuple("mixer" if one is want else None for one in mixes) for want in (True, False))
    return Backbone(blocks=blocks, width=model.config.hidden_size, mixer=mixer, mlp=mlp, prepare=scan_linearly)
