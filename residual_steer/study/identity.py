"""What tells one backbone from another in the keys of a ledger."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

__all__ = ["digest"]


def digest(model: nn.Module) -> str:
    """Return a digest, 16 hexadecimal digits, of every tensor in a model's state dict with its name, type and shape."""
    found = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if not isinstance(tensor, Tensor):  # the extra state of a module, which may be anything
            continue
        plain = tensor.detach().cpu().contiguous()
        found.update(f"{name} {plain.dtype} {tuple(plain.shape)};".encode())
        if plain.numel():
            found.update(plain.view(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()[:16]
