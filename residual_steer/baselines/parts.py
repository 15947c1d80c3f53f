"""What a method is given and what it hands back."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from residual_steer.backbone import Backbone, compute_dtype
from residual_steer.config import check_ranks
from residual_steer.errors import SteerError

__all__ = ["Subject", "Trained", "add_child", "count", "place_of", "require_free"]


@dataclass(frozen=True)
class Subject:
    """A model that a method is applied to.

    Attributes:
        model: what the user gave.
        backbone: where its stream is.
        opened: the base parameters that the user asked to train along.
    """

    model: nn.Module
    backbone: Backbone
    opened: Sequence[nn.Parameter] = ()

    @property
    def inner(self) -> nn.Module:
        """The module that the backbone describes, without heads and wrappers."""
        return self.model.get_submodule(self.backbone.path)

    def blocks(self, layers: Sequence[int] | None = None) -> dict[int, nn.Module]:
        """Return the blocks that `layers` names, by index; None names all.

        Raises:
            SteerError: a block that is not there, or named twice.
        """
        chosen = check_ranks(1, layers, len(self.backbone.blocks))
        return {index: self.backbone.blocks[index] for index in chosen}


@dataclass(frozen=True)
class Trained:
    """What a method trains.

    Attributes:
        parameters: what it opens, beside what the user asked for.
        called: paths of modules in the model that have to be called for the method to have an effect.
    """

    parameters: Sequence[nn.Parameter]
    called: Sequence[str] = ()


def place_of(module: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Return the device of a module, and the type that trains beside it: fp32 where its weights have less."""
    device = next((t.device for t in (*module.parameters(), *module.buffers())), torch.device("cpu"))
    return device, torch.promote_types(compute_dtype(module), torch.float32)


def require_free(hosts: Iterable[nn.Module], name: str) -> None:
    """Make sure that a child of this name can be put into every host, before one is.

    Raises:
        SteerError: a host has something of that name.
    """
    for host in hosts:
        if hasattr(host, name):
            raise SteerError(f"this {type(host).__name__} has a {name!r} of its own, where the method would stand.")


def add_child(host: nn.Module, name: str, child: nn.Module) -> None:
    """Register `child` in `host`, in the mode that the host is in."""
    require_free([host], name)
    host.add_module(name, child)
    child.train(host.training)


def count(name: str, value: object, *, least: int = 1) -> int:
    """Return an option that is a whole number.

    Raises:
        SteerError: it is none, or too small.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise SteerError(f"`{name}` is an integer from {least}; received {value!r}.")
    return value
