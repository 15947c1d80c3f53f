"""The model that a preference loss compares with, as DPO's: the same backbone under what it began with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ._controller import Steering, steering_of
from ._undisturbed import as_before
from .errors import SteerError
from .routing import Asked
from .steering import freeze, use

__all__ = ["reference"]


def reference(model: nn.Module, *, base: bool = False) -> nn.Module:
    """Return the reference model of a steered one, for DPO (Rafailov et al. 2023, arXiv 2305.18290) and its kind.

    It runs the same model, without the wrappers around it, in evaluation mode and without a gradient, under a frozen
    copy of what is selected now, and has no parameters of its own: `DPOTrainer(model, ref_model=rs.reference(model))`.
    A field that was never trained is the base, and is not copied. Copies are fields of the model, `NAME-reference`,
    which `unsteer` takes away.

    Args:
        model: a steered model.
        base: compare with the frozen model, whatever is selected.

    Raises:
        SteerError: the model is not steered, or a copy's name is in use.

    >>> ratio = log_probs(model, batch) - log_probs(rs.reference(model), batch)
    """
    root, state = steering_of(model)
    asked: Asked = None if base else state.mix.asked()
    if asked is not None:
        state.mix.check_whole("a reference")
    names = {name: _copied(root, state, name) for name in state.mix.names} if asked is not None else {}
    if isinstance(asked, str):
        asked = names[asked]
    elif isinstance(asked, list):
        asked = [None if name is None else names[name] for name in asked]
    elif isinstance(asked, Mapping):
        asked = {copy: weight for name, weight in asked.items() if (copy := names[name]) is not None}
    return _Reference(root, asked)


def _copied(root: nn.Module, state: Steering, name: str) -> str | None:
    """Return the name of a frozen copy of a field; None if the field adds nothing."""
    tensors = state.tensors(root, name)
    if not state.specs[name].train and not any(value.any() for key, value in tensors.items() if ".up." in key):
        return None
    copy = f"{name}-reference"
    if copy in state.specs:
        raise SteerError(f"the field {copy!r} is there already: `unsteer(model, {copy!r})` first, or use that one.")
    with use(root, state.mix.asked()), torch.no_grad():
        state.add(root, replace(state.specs[name], name=copy))
        for key, value in state.tensors(root, copy).items():
            value.copy_(tensors[key])
        freeze(root, copy)
    return copy


class _Reference(nn.Module):
    """A model under another selection. Other attributes are the model's."""

    def __init__(self, model: nn.Module, asked: Asked) -> None:
        super().__init__()
        self._model = (model,)  # in a tuple, since a module would become a child
        self._asked = asked
        self.eval()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_model"][0], name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run `forward`, also one that somebody put in its place, under the selection."""
        model = self._model[0]
        with use(model, self._asked), torch.no_grad(), as_before(model):
            for module in model.modules():
                module.training = False
            return super().__call__(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model."""
        return self._model[0](*args, **kwargs)

    def extra_repr(self) -> str:
        """Name what acts."""
        return f"{type(self._model[0]).__name__} under {self._asked!r}"
