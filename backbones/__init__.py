"""The built-in families, one file each; a family is a layout of blocks, not a model name.

Installed as `residual_steer.backbones`. Every family registers itself with the call that anybody uses.
`residual_steer.list_backbones()` lists every registered backbone, those of installed packages included.
"""

from residual_steer.backbones import (
    bert,
    encoder_decoder,
    gpt2,
    hybrid,
    llama,
    mamba,
    recurrent,
    resnet,
    swin,
    tnt,
    vit,
    wav2vec2,
)

__all__ = [
    "bert",
    "encoder_decoder",
    "gpt2",
    "hybrid",
    "llama",
    "mamba",
    "recurrent",
    "resnet",
    "swin",
    "tnt",
    "vit",
    "wav2vec2",
]
