"""A plugin as anybody would write it; its entry point stands in the dist-info beside it."""

from residual_steer import Backbone, register_backbone


@register_backbone("toy", matches=["toy_plugin.Model"])
def toy(model):
    return Backbone(blocks=model.blocks, width=4)
