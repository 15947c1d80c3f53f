"""Encoder-decoders and their halves: T5, BART and what came of it, Whisper.

A model with two streams has the blocks of its encoder and then those of its decoder: `layers` counts through both, so
that -1 is the decoder's last block. While text is generated, the encoder runs once and the decoder at every step.
"""

from torch import nn

from residual_steer.backbone import Backbone, blocks_at, first_of, parts
from residual_steer.registry import register_backbone

BART = (
    "Bart BigBirdPegasus Blenderbot BlenderbotSmall LED M2M100 MBart Marian Mvp NllbMoe PLBart Pegasus "
    "Speech2Text Whisper"
)
T5 = "T5 MT5 UMT5 LongT5 SwitchTransformers"
T5_PARTS = "Model EncoderModel ForConditionalGeneration Stack"
MIXERS = ("self_attn", "layer.0.SelfAttention", "layer.0.LocalSelfAttention", "layer.0.TransientGlobalSelfAttention")
MLPS = ("mlp", "ffn", "layer.2.DenseReluDense", "layer.1.DenseReluDense", "layer.2.mlp", "layer.1.mlp")


@register_backbone(
    "encoder_decoder",
    matches=[
        *(f"transformers.{name}{part}" for name in BART.split() for part in ("Model", "Encoder", "Decoder")),
        *(f"transformers.{name}{part}" for name in T5.split() for part in T5_PARTS.split()),
        *(f"transformers.{name}ForQuestionAnswering" for name in ("T5", "MT5", "UMT5")),
        "transformers.T5GemmaModel",
        "transformers.MoonshineModel",
    ],
)
def encoder_decoder(model: nn.Module) -> Backbone:
    """Describe both stacks of a model of transformers, or the one that it is."""
    stacks = [stack for name in ("encoder", "decoder") if (stack := first_of(model, name)) is not None] or [model]
    lists = [blocks_at(stack, "layers", "block") for stack in stacks]
    blocks = [block for own in lists for block in own]
    width = [stack.config.hidden_size for stack, own in zip(stacks, lists, strict=True) for _ in own]
    return Backbone(blocks=blocks, width=width, mixer=parts(blocks, *MIXERS), mlp=parts(blocks, *MLPS))
