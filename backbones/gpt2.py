"""GPT-2 and the decoders of its time: blocks of an attention and a feed-forward, in sequence or side by side.

They differ in names alone: the blocks are `h`, `layers` or `blocks`, the attention `attn`, `attention` or
`self_attention`.
"""

from torch import nn

from residual_steer.backbone import Backbone, blocks_at, parts
from residual_steer.registry import register_backbone

MODELS = (
    "GPT2 GPTBigCode GPTJ GPTNeo GPTNeoX GPTNeoXJapanese CodeGen Bloom Falcon Mpt OpenAIGPT ImageGPT "
    "DecisionTransformerGPT2"
)


@register_backbone("gpt2", matches=[f"transformers.{name}Model" for name in MODELS.split()])
def gpt2(model: nn.Module) -> Backbone:
    """Describe the stack of a decoder of transformers."""
    blocks = blocks_at(model, "h", "layers", "blocks")
    return Backbone(
        blocks=blocks,
        width=model.config.hidden_size,
        mixer=parts(blocks, "attn", "attention", "self_attention"),
        mlp=parts(blocks, "mlp", "ffn"),
    )
