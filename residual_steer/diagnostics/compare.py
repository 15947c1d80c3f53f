"""Two models side by side, an adapted one and the frozen one that it was; both see every batch before the next.

An adapted model may have more tokens, those of a prompt, which stand in one place: before a text, behind its padding on
the left, or behind the first tokens of an image, such as CLS.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from residual_steer._batches import Batch, batches, device_of, require_finite
from residual_steer._checks import check_integer, check_model
from residual_steer._controller import steering_of
from residual_steer.backbone import Backbone
from residual_steer.errors import SteerError
from residual_steer.recording import record, uncompiled, undisturbed
from residual_steer.registry import find_backbone
from residual_steer.steering import use
from residual_steer.stream import prefix_tokens

from ._moments import exact

__all__ = ["SIDES", "Pair", "beside", "compare", "layer_of", "places", "require_tokens"]

SIDES = ("frozen", "adapted")


@dataclass(frozen=True)
class Pair:
    """A model and what it is compared with; `compare` makes it.

    Attributes:
        models: by side, `"frozen"` and `"adapted"`; they may be one.
        backbones: where the stream of each is.
        inner: the part of the frozen model that its backbone describes, without heads and other towers.
        prefix: how many tokens the frozen model puts before those of an image.
    """

    models: dict[str, nn.Module]
    backbones: dict[str, Backbone]
    inner: nn.Module
    prefix: int

    def batches(self, loader: Iterable[Any]) -> Iterator[Batch]:
        """Yield the batches of a loader, which is read once: a generator will do."""
        return batches(self.models["adapted"], loader)

    @contextlib.contextmanager
    def on(self, side: str) -> Iterator[nn.Module]:
        """Lend the model of a side, its fields off where the frozen side is the same model; they come back on again."""
        itself = side == "frozen" and self.models["frozen"] is self.models["adapted"]
        with use(self.models[side], None) if itself else contextlib.nullcontext():
            yield self.models[side]

    def stream(self, side: str, batch: Batch, blocks: Sequence[int]) -> dict[int, Tensor]:
        """Run a side and return what leaves its blocks, by index, `(rows, tokens, width)` in fp64, pixels as tokens."""
        backbone, states = self.backbones[side], {}
        with self.on(side) as model, record(backbone, blocks) as seen:
            batch.run(model)
        for index in blocks:
            if index not in seen.calls:
                raise SteerError(f"the model ran without calling block {index}, so that there is no stream to look at.")
            z = exact(seen.leaving[index].movedim(backbone.channels, -1))
            require_finite(f"the stream that leaves block {index}", z)
            states[index] = z.unsqueeze(1) if z.dim() == 2 else z.flatten(1, -2)
        return states

    def states(self, batch: Batch, blocks: Sequence[int]) -> dict[int, tuple[Tensor, Tensor]]:
        """Return the states of both sides that leave blocks, `(tokens, width)`, without padding and added tokens."""
        found = {}
        frozen, adapted = (self.stream(side, batch, blocks) for side in SIDES)
        for index, z in frozen.items():
            real = batch.real(z.shape[:2], z.device)
            found[index] = z[real], beside(adapted[index], z, self.prefix)[real]
        return found


@contextlib.contextmanager
def compare(model: nn.Module, reference: nn.Module | None = None) -> Iterator[Pair]:
    """Compare a model with its frozen self, both in evaluation mode and without gradients while this is open.

    Modes, random generators and the selection of fields come back as they were.

    Args:
        model: a steered model; any model where a reference is given.
        reference: the frozen model, on the same device. None is the same model with its fields off.

    Raises:
        SteerError: one of them is no module; the model is neither steered nor given a reference, or none of its fields
            acts; the reference is the model itself, on another device, of no known backbone or of other blocks.
    """
    adapted = uncompiled(check_model(model))
    frozen = adapted if reference is None else uncompiled(check_model(reference))
    if reference is None:
        _check_acting(adapted)
    elif frozen is adapted:
        raise SteerError(
            "a model is compared with another one; `reference` is the model itself. Leave it out for a steered model, "
            "or give a copy that was made before: copy.deepcopy(model)."
        )
    models = {"frozen": frozen, "adapted": adapted}
    there, here = map(device_of, models.values())
    if there != here:
        raise SteerError(f"both models see the same batches: one is on {here}, the reference on {there}.")
    backbones = {side: find_backbone(one) for side, one in models.items()}
    before, after = (len(backbone.blocks) for backbone in backbones.values())
    if before != after:
        raise SteerError(
            f"a model is compared with one of as many blocks; it has {after}, and the reference {before}. Give the "
            "frozen model that it was made of."
        )
    inner = frozen.get_submodule(backbones["frozen"].path)
    with undisturbed(*models.values()):
        yield Pair(models, backbones, inner, prefix_tokens(inner))


def _check_acting(model: nn.Module) -> None:
    """Raise if a model has no fields that can be switched off, or none is on."""
    try:
        _, state = steering_of(model)
    except SteerError as error:
        raise SteerError(
            f"a {type(model).__name__} that is not steered has no frozen self to be compared with. Steer it, or give "
            "the model that it is compared with as `reference`: a copy made before, copy.deepcopy(model)."
        ) from error
    if not state.mix.names:
        fields = ", ".join(state.specs)
        raise SteerError(f"no field acts, and there is nothing to compare. Select one of {fields} with `use` first.")


def layer_of(backbone: Backbone, layer: object) -> int:
    """Return the index of a block that is counted from the end if negative, or raise if there is none."""
    count = len(backbone.blocks)
    return check_integer("layer", layer, -count, count - 1, meaning="the index of a block") % count


def places(length: int, longer: int, prefix: int, device: torch.device) -> Tensor:
    """Return where each token stands in a sequence made longer behind its first `prefix` tokens, `(length,)`."""
    if longer < length:
        raise SteerError(
            f"the adapted model has {longer} tokens where the reference has {length}. They are compared one by one: "
            "give a reference that sees the same tokens."
        )
    position = torch.arange(length, device=device)  # padding on the left is not followed: it never counts
    return position + (longer - length) * (position >= prefix)


def beside(adapted: Tensor, frozen: Tensor, prefix: int) -> Tensor:
    """Return the adapted states of those tokens that the frozen model has, both `(rows, tokens, width)`."""
    if adapted.shape[::2] != frozen.shape[::2]:
        raise SteerError(
            f"both models have rows and width in common; the frozen states are {tuple(frozen.shape)} and the adapted "
            f"ones {tuple(adapted.shape)}. Compare models of one backbone."
        )
    return adapted[:, places(frozen.shape[1], adapted.shape[1], prefix, adapted.device)]


def require_tokens(count: Tensor) -> int:
    """Return how many tokens count, or raise if none does."""
    if not int(count):
        raise SteerError("no token of the data counts: every one is padding. Look at the attention mask.")
    return int(count)
