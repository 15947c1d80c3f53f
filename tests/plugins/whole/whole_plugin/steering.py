"""What the package says of its models to residual_steer, by its entry point."""

from residual_steer import Backbone, register_backbone


def read(args, kwargs):
    return args[0]["stream"]


def write(output, f):
    return {**output, "stream": f(output["stream"])}


@register_backbone("whole", matches=["whole_plugin.Stack"])
def whole(model):
    return Backbone(blocks=model.layers, width=model.width, mixer="mix", mlp="mlp", read=read, write=write)
