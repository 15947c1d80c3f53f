"""The built-in families, one file each; a family is a layout of blocks, not a model name.

Installed as `residual_steer.backbones`. Every family registers itself with the call that anybody uses. The package can
be called: `residual_steer.backbones()` lists every registered backbone, those of installed packages included, and
`residual_steer.backbones("llama")` the classes of one.
"""

import sys
import types

from residual_steer import registry
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


class _Families(types.ModuleType):
    """A module that is also the public function `residual_steer.backbones()`."""

    def __call__(self, name: str | None = None) -> tuple[str, ...]:
        return registry.backbones(name)


sys.modules[__name__].__class__ = _Families
