"""Encoders of text after BERT: post-norm blocks, an attention and a feed-forward, with a norm behind each of two sums.

The stream is what the next block reads, behind the second norm. The mixer is the attention proper, before its output
projection where that stands in another module, for the module around both adds the stream and normalises. ALBERT uses
one block many times: its field, too, is one, and runs every time. ModernBERT and a few others are pre-norm.
"""

from torch import nn

from residual_steer.backbone import Backbone, blocks_at, first_of, parts
from residual_steer.registry import register_backbone

MODELS = (
    "Albert Bert BigBird Camembert Data2VecText Deberta DebertaV2 DistilBert Electra Ernie Esm Gte LayoutLM MPNet "
    "MegatronBert ModernBert ModernBertDecoder NomicBert Nystromformer RemBert RoCBert RoFormer Roberta "
    "RobertaPreLayerNorm XLMRoberta XLMRobertaXL Xmod"
)


@register_backbone("bert", matches=[f"transformers.{name}Model" for name in MODELS.split()])
def bert(model: nn.Module) -> Backbone:
    """Describe the encoder of a model of transformers."""
    width = model.config.hidden_size
    groups = first_of(model, "encoder.albert_layer_groups")
    if groups is not None:  # whose attention adds the stream and normalises, all in one module
        return Backbone(blocks=[block for group in groups for block in group.albert_layers], width=width)
    blocks = blocks_at(model, "encoder.layer", "transformer.layer", "layers")
    return Backbone(
        blocks=blocks,
        width=width,
        mixer=parts(blocks, "attention.self", "attention.attn", "attention", "self_attn", "attn"),
        mlp=parts(blocks, "ffn", "mlp"),
    )
