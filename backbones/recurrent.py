"""Recurrent models without attention: RWKV and xLSTM. A block takes the stream and its state, and returns both."""

from torch import nn

from residual_steer.backbone import Backbone, parts
from residual_steer.errors import SteerError
from residual_steer.registry import register_backbone


@register_backbone("recurrent", matches=["transformers.RwkvModel", "transformers.xLSTMModel"])
def recurrent(model: nn.Module) -> Backbone:
    """Describe RWKV or xLSTM.

    Raises:
        SteerError: an RWKV that computes with another stream in evaluation mode than in training.
    """
    blocks = model.blocks
    every = getattr(model.config, "rescale_every", 0)
    if 0 < every < len(blocks):
        raise SteerError(
            f"in evaluation mode this RWKV halves its stream after every {every} blocks, in training it does not, so "
            "that a field would act on another stream than the one that it learned from. Switch that off, before the "
            "model is first called: model.config.rescale_every = 0 (it only keeps fp16 from overflowing)."
        )
    return Backbone(
        blocks=blocks,
        width=model.config.hidden_size,
        mixer=parts(blocks, "attention", "mlstm_layer"),
        mlp=parts(blocks, "feed_forward", "ffn"),
    )
