"""Methods that are one steering field: H-Res itself, and two adapters that are the same map at another place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from torch import nn

from residual_steer.errors import UnsuitableError
from residual_steer.registry import find_backbone
from residual_steer.steering import steer

__all__ = ["adaptformer", "hres", "parallel_adapter"]

Model = TypeVar("Model", bound=nn.Module)


def hres(model: Model, arch: str | None, train: Sequence[str] | str, **options: Any) -> Model:
    """H-Res (arXiv 2606.24396): `residual_steer.steer` with its own options."""
    return steer(model, arch, train=train, **options)


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
    """AdaptFormer (Chen et al. 2022, arXiv 2205.13535): MLP(x) + s·W_up·ReLU(W_down·x) (eq. 1–3).

    x is what enters the MLP, after its norm.

    Args:
        model: a Transformer, or any model whose blocks have an MLP.
        arch: as in `steer`.
        train: as in `steer`.
        rank: the width of the bottleneck; the paper's AdaptFormer-64.
        scale: s; 0.1 in the paper.
        dropout: of the bottleneck in training mode.
        layers: which blocks.

    Raises:
        UnsuitableError: the blocks have no MLP.
    """
    backbone = find_backbone(model, arch)
    if "mlp" not in backbone.sites:
        raise UnsuitableError(
            f"AdaptFormer stands beside the MLP of a block (eq. 1), and blocks of {backbone.name!r} have none: sites "
            f"here are {', '.join(backbone.sites)}. 'parallel-adapter' then stands beside the mixer."
        )
    return steer(
        model, arch, rank=rank, scale=scale, layers=layers, site="mlp", activation="relu", dropout=dropout, train=train
    )


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
    """Scaled parallel adapter (He et al. 2022, arXiv 2110.04366): MLP(x) + s·W_up·ReLU(W_down·x), with s = 4.

    On blocks without an MLP, those of Mamba, it stands beside the mixer, as in MambaPEFT (Yoshimura et al. 2025,
    arXiv 2411.03855).

    Args:
        model: any model with a known backbone.
        arch: as in `steer`.
        train: as in `steer`.
        rank: the width of the bottleneck; up to 512 in the paper.
        scale: s; 4 in the paper's best (Table 6).
        dropout: of the bottleneck in training mode.
        layers: which blocks.

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
    return steer(
        model, arch, rank=rank, scale=scale, layers=layers, site=site, activation="relu", dropout=dropout, train=train
    )
