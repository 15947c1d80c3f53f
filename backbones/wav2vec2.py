"""Encoders of speech after wav2vec 2.0, pre-norm and post-norm: Transformer blocks over the frames of convolutions.

With `layerdrop` in its config, a model skips blocks at random in training, and the fields on them with them.
"""

from torch import nn

from residual_steer.backbone import Backbone, parts
from residual_steer.registry import register_backbone

MODELS = "Data2VecAudio Hubert SEW UniSpeech UniSpeechSat Wav2Vec2 Wav2Vec2Bert Wav2Vec2Conformer WavLM"


@register_backbone("wav2vec2", matches=[f"transformers.{name}Model" for name in MODELS.split()])
def wav2vec2(model: nn.Module) -> Backbone:
    """Describe the encoder of a model of transformers; a conformer's two half feed-forwards are no site."""
    blocks = model.encoder.layers
    return Backbone(
        blocks=blocks,
        width=model.config.hidden_size,
        mixer=parts(blocks, "attention", "self_attn"),
        mlp=parts(blocks, "feed_forward"),
    )
