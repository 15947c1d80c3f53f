"""A plugin that takes a built-in name."""

from residual_steer import Backbone, register_backbone


@register_backbone("gpt2", matches=["greedy_plugin.Model"])
def gpt2(model):
    return Backbone(blocks=model.blocks, width=4)
