"""Encoders of text after BERT, and of speech after wav2vec 2.0.

Post-norm blocks have a norm behind each of two sums: the stream is what the next block reads, behind the second norm.
"""

from torch import nn

from residual_steer.backbone import Backbone, first_of, stacked
from residual_steer.registry import register_backbone

TEXT = (
    "Albert Bert BigBird Camembert Data2VecText Deberta DebertaV2 DistilBert Electra Ernie Esm Gte LayoutLM MPNet "
    "MegatronBert ModernBert ModernBertDecoder NomicBert Nystromformer RemBert RoCBert RoFormer Roberta "
    "RobertaPreLayerNorm XLMRoberta XLMRobertaXL Xmod"
)
SPEECH = "Data2VecAudio Hubert SEW UniSpeech UniSpeechSat Wav2Vec2 Wav2Vec2Bert Wav2Vec2Conformer WavLM"
MIXERS = ("attention.self", "attention.attn", "attention", "self_attn", "attn")


@register_backbone("bert", matches=[f"transformers.{name}Model" for name in TEXT.split()])
def bert(model: nn.Module) -> Backbone:
    """Describe an encoder of text.

    The mixer is the attention proper, before its output projection where that stands in another module, for the module
    around both adds the stream and normalises. ALBERT uses one block many times: its field runs every time, and where
    its attention adds the stream and normalises, all is in one module.
    """
    groups = first_of(model, "encoder.albert_layer_groups")
    if groups is not None:
        blocks = [block for group in groups for block in group.albert_layers]
        return Backbone(blocks=blocks, width=model.config.hidden_size)
    return stacked(model, "encoder.layer", "transformer.layer", "layers", mixer=MIXERS, mlp=("ffn", "mlp"))


@register_backbone("wav2vec2", matches=[f"transformers.{name}Model" for name in SPEECH.split()])
def wav2vec2(model: nn.Module) -> Backbone:
    """Describe an encoder of speech; a conformer's two half feed-forwards are no site.

    With `layerdrop` in its config, a model skips blocks at random in training, and the fields on them with them.
    """
    return stacked(model, "encoder.layers", mixer=("attention", "self_attn"), mlp=("feed_forward",))
