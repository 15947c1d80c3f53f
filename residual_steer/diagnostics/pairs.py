"""The two models that every diagnostic compares: the frozen one and the adapted one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from residual_steer._controller import steering_of
from residual_steer.backbone import Backbone
from residual_steer.errors import SteerError
from residual_steer.passes import Batch, batches, reading, uncompiled
from residual_steer.registry import find_backbone
from residual_steer.steering import use

__all__ = ["SIDES", "Pair", "compared"]

SIDES = ("frozen", "adapted")


@dataclass
class Pair:
    """A model and what it is compared with; `compared` makes it.

    Attributes:
        model: the adapted one.
        reference: the frozen one; None is the same model with its fields off.
    """

    model: nn.Module
    reference: nn.Module | None
    _backbones: dict[str, Backbone] = field(default_factory=dict)

    def batches(self, loader: Iterable[Any]) -> Iterator[Batch]:
        """Yield the batches of a loader, each of which both sides see before the next: a generator is used up once.

        Raises:
            SteerError: it is no loader or gives nothing.
        """
        return batches(self.model, loader)

    @contextlib.contextmanager
    def on(self, side: str) -> Iterator[nn.Module]:
        """Lend the model of a side, `"frozen"` or `"adapted"`, with the fields off or on that this takes.

        On leaving, also by an exception, what was selected before is selected again.
        """
        if side == "frozen" and self.reference is None:
            with use(self.model, None):
                yield self.model
        else:
            yield self.side(side)

    def side(self, side: str) -> nn.Module:
        """Return the model of a side, whichever fields act."""
        return self.model if side == "adapted" or self.reference is None else self.reference

    def inner(self, side: str) -> nn.Module:
        """Return the module that a side's backbone describes, without heads and other towers."""
        return self.side(side).get_submodule(self.backbone(side).path)

    def backbone(self, side: str) -> Backbone:
        """Return where the stream of a side's model is.

        Raises:
            SteerError: it has no known backbone, or the two have different numbers of blocks.
        """
        if not self._backbones:
            adapted = find_backbone(self.model)
            frozen = adapted if self.reference is None else find_backbone(self.reference)
            one, other = len(frozen.blocks), len(adapted.blocks)
            if one != other:
                raise SteerError(
                    f"a model is compared with one of as many blocks; it has {other}, and the reference {one}. Give "
                    "the frozen model that it was made of."
                )
            self._backbones = {"frozen": frozen, "adapted": adapted}
        return self._backbones[side]


@contextlib.contextmanager
def compared(model: nn.Module, reference: nn.Module | None = None) -> Iterator[Pair]:
    """Hold a model against its frozen self, both in evaluation mode and without gradients while this is open.

    >>> with compared(model, reference) as pair:
    ...     for batch in pair.batches(loader):
    ...         for side in SIDES:
    ...             with pair.on(side) as one:
    ...                 output = batch.run(one)

    Args:
        model: a steered model; any model where a reference is given.
        reference: the frozen model that it is compared with, on the same device. None is the same model with its
            fields off, which only a steered one has.

    Yields:
        The pair. Modes, random generators and the selection of fields come back as they were.

    Raises:
        SteerError: one of them is no module, the model is neither steered nor given a reference, none of its fields
            acts, the reference is the model itself or is on another device.
    """
    for one in (model,) if reference is None else (model, reference):
        if not isinstance(one, nn.Module):
            raise SteerError(f"a model is a torch.nn.Module; received {type(one).__name__}.")
    if reference is None:
        _require_acting(model)
    else:
        _require_comparable(model, reference)
    model, reference = uncompiled(model), None if reference is None else uncompiled(reference)
    with reading(model), contextlib.nullcontext() if reference is None else reading(reference):
        yield Pair(model, reference)


def _require_acting(model: nn.Module) -> None:
    """Make sure that a model has something to be compared with itself by.

    Raises:
        SteerError: it is not steered, or none of its fields acts.
    """
    try:
        _, state = steering_of(model)
    except SteerError as error:
        raise SteerError(
            f"a {type(model).__name__} that is not steered has no frozen self to be compared with. Steer it, or give "
            "the model that it is compared with as `reference`: a copy made before, copy.deepcopy(model)."
        ) from error
    if not state.mix.names:
        raise SteerError(
            f"no field acts, so that there is nothing to compare. Select one of {', '.join(state.specs)} with "
            "residual_steer.use first."
        )


def _require_comparable(model: nn.Module, reference: nn.Module) -> None:
    """Hold a reference against its model.

    Raises:
        SteerError: they are one, or on different devices.
    """
    if reference is model:
        raise SteerError(
            "a model is compared with another one; `reference` is the model itself. Leave it out for a steered model, "
            "or give a copy that was made before: copy.deepcopy(model)."
        )
    devices = [next((p.device for p in one.parameters()), None) for one in (model, reference)]
    if None not in devices and devices[0] != devices[1]:
        raise SteerError(f"both models see the same batches: one is on {devices[0]}, the reference on {devices[1]}.")
