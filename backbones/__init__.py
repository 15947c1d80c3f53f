"""The built-in families by kind; a family is a layout of blocks, not a model name.

Installed as `residual_steer.backbones`. Every family registers itself with the call that anybody uses.
"""

from residual_steer.backbones import decoders, encoder_decoder, encoders, recurrent, resnet, vision

__all__ = ["decoders", "encoder_decoder", "encoders", "recurrent", "resnet", "vision"]
