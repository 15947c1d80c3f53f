"""Adapters that are one steering field at another place: AdaptFormer, and the scaled parallel adapter.

AdaptFormer (Chen et al. 2022, arXiv 2205.13535, eq. 1–3) is MLP(x) + s·W_up·ReLU(W_down·x) with s = 0.1, x being what
enters the MLP, after its norm. The parallel adapter (He et al. 2022, arXiv 2110.04366) has s = 4 (Table 6); on blocks
without an MLP, those of Mamba, it stands beside the mixer, as in MambaPEFT (Yoshimura et al. 2025, arXiv 2411.03855).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TypeVar

from torch import nn

from residual_steer.errors import UnsuitableError
from residual_steer.registry import find_backbone
from residual_steer.steering import steer

__all__ = ["adaptformer", "parallel_adapter"]

Model = TypeVar("Model", bound=nn.Module)


def adaptformer(
    model: Model,
    arch: str | None,
    train: Sequence[str] | str,
    *,
    rank: int = 64,
    scale: float = 0.1,
    dropout: float = 0.0,
    layers: Sequence[int] | None = None,
) -> Model:
    """AdaptFormer, whose width is `rank`, beside the MLP of blocks.

    Raises:
        UnsuitableError: the blocks have no MLP.
    """
    backbone = find_backbone(model, arch)
    if "mlp" not in backbone.sites:
        raise UnsuitableError(
            f"AdaptFormer stands beside the MLP of a block (eq. 1), and blocks of {backbone.name!r} have none: sites "
            f"here are {', '.join(backbone.sites)}. 'parallel-adapter' then stands beside the mixer."
        )
    relu = partial(steer, site="mlp", activation="relu")
    return relu(model, arch, rank=rank, scale=scale, layers=layers, dropout=dropout, train=train)


def parallel_adapter(
    model: Model,
    arch: str | None,
    train: Sequence[str] | str,
    *,
    rank: int = 32,
    scale: float = 4.0,
    dropout: float = 0.0,
    layers: Sequence[int] | None = None,
) -> Model:
    """Scaled parallel adapter, whose width is `rank`, beside the MLP of blocks or, where there is none, the mixer.

    Raises:
        UnsuitableError: the blocks have neither part.
    """
    backbone = find_backbone(model, arch)
    site = next((site for site in ("mlp", "mixer") if site in backbone.sites), None)
    if site is None:
        raise UnsuitableError(
            f"a parallel adapter stands beside the MLP or the mixer of a block; backbone {backbone.name!r} names "
            "neither. Use 'hres', which takes the whole block."
        )
    relu = partial(steer, site=site, activation="relu")
    return relu(model, arch, rank=rank, scale=scale, layers=layers, dropout=dropout, train=train)
