"""GPT-2 of transformers, with any head: pre-norm blocks `h`, each an attention `attn` and a feed-forward `mlp`."""

from torch import nn

from residual_steer.backbone import Backbone
from residual_steer.registry import register_backbone


@register_backbone("gpt2", matches=["transformers.GPT2Model"])
def gpt2(model: nn.Module) -> Backbone:
    """Describe `transformers.GPT2Model`."""
    return Backbone(blocks=model.h, width=model.config.hidden_size, mixer="attn", mlp="mlp")
