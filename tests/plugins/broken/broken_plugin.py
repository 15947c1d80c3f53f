"""A plugin that fails after it has registered something."""

from residual_steer import Backbone, register_backbone


@register_backbone("half", matches=["broken_plugin.Model"])
def half(model):
    return Backbone(blocks=model.blocks, width=4)


raise ImportError("no such kernel")
