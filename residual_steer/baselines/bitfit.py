"""BitFit (Ben Zaken et al. 2022, arXiv 2106.10199): the biases of the backbone, and nothing else."""

from __future__ import annotations

from torch import nn

from residual_steer.errors import UnsuitableError

from ._attach import Subject, Trained

__all__ = ["bitfit", "is_key"]

_KEYS = ("key", "k_proj", "k_lin", "to_k", "wk")
_ROTARY = ("rope", "rotary")


def bitfit(subject: Subject) -> Trained:
    """Train every bias of the backbone: of projections, norms and convolutions, and the step's bias of an SSM.

    Left out are the biases of keys, whose gradient is zero by construction, since a softmax over keys does not change
    when all its arguments move by q·b. (With rotary positions it does, and they train.)

    Raises:
        UnsuitableError: the backbone has no bias.
    """
    found: list[nn.Parameter] = []
    for full, parameter in subject.inner.named_parameters():
        path, _, name = full.rpartition(".")
        if (name == "bias" or name.endswith("_bias")) and not is_key(subject, path, name):
            found.append(parameter)
    if not found:
        raise UnsuitableError(
            f"'bitfit' trains the biases of the backbone, and this {type(subject.inner).__name__} has none. Choose "
            "another method."
        )
    return Trained(found)


def is_key(subject: Subject, path: str, name: str = "bias") -> bool:
    """Return whether a bias is one of keys alone, in an attention without rotary positions."""
    if path.rpartition(".")[2] not in _KEYS and name not in ("k_bias", "key_bias"):
        return False
    return not any(mark in part for part, _ in subject.inner.named_modules() for mark in _ROTARY)
