"""What tells one backbone from another in the keys of a ledger."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

__all__ = ["digest"]


def digest(model: nn.Module) -> str:
    """Return a short digest of every stored tensor of a model, with its name, type and shape."""
    found = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        plain = tensor.detach().cpu().contiguous()
        found.update(f"{name} {plain.dtype} {tuple(plain.shape)};".encode())
        found.update(plain.view(-1).view(torch.uint8).numpy().tobytes() if plain.numel() else b"")
    return found.hexdigest()[:16]
