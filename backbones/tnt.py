"""TNT of timm: blocks with two streams, the patches' and, beside it, that of the pixels inside each patch.

A block adds what it made of the pixels to the patches, and the model reads nothing but the patches in the end. So the
patches are the stream: the second of the pair that a block takes and returns.
"""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from residual_steer.backbone import Backbone
from residual_steer.registry import register_backbone


@register_backbone("tnt", matches=["timm.TNT"])
def tnt(model: nn.Module) -> Backbone:
    """Describe the stack of a Transformer in Transformer; the mixer is the attention among patches."""
    return Backbone(
        blocks=model.blocks,
        width=model.embed_dim,
        mixer="attn_out",
        mlp="mlp",
        read=_read_patches,
        write=_write_patches,
    )


def _read_patches(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """Return the patches that enter a block."""
    return kwargs["patch_embed"] if "patch_embed" in kwargs else args[1]


def _write_patches(output: tuple[Tensor, Tensor], f: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Move the patches, and leave the pixels."""
    pixels, patches = output
    return pixels, f(patches)
