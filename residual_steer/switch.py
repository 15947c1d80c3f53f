"""The module that sits on a head: where the rows of a batch belong to different fields, each meets its field's head.

A field can train base modules along, such as a classifier. Whole models that differ there cannot share a batch, but a
module that comes after the blocks, or before them, can be computed once for every field and its rows chosen.
"""

from __future__ import annotations

import copy
import warnings
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .errors import SteerError
from .mix import Mix, row_factor

__all__ = ["Switch"]

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Switch(nn.Module):
    """Stand on one base module of which fields have their own values.

    Args:
        host: a module without children, outside the steered blocks.
    """

    key = "steering_rows"

    def __init__(self, host: nn.Module) -> None:
        super().__init__()
        self._host = (host,)  # in a tuple, since a module would become a child
        self._twins: tuple[tuple[nn.Module, Tensor], ...] = ()
        self._met = False
        host.add_module(self.key, self)
        # First in line, so that whoever watches the host sees what the rows really get.
        self._handle = host.register_forward_hook(self._after, with_kwargs=True, prepend=True)

    @property
    def host(self) -> nn.Module:
        """The module that it stands on."""
        return self._host[0]

    @staticmethod
    def fits(host: nn.Module) -> bool:
        """Whether a module can be computed again with other values: it has no children, and its own forward."""
        return all(isinstance(child, Switch) for child in host.children()) and "forward" not in host.__dict__

    def detach(self) -> None:
        """Take away the child and the hook, and nothing else."""
        self._handle.remove()
        delattr(self.host, self.key)

    def select(self, mix: Mix, values: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Give the rows of each field the host with that field's values.

        Args:
            mix: says which rows are whose.
            values: by field, the host's tensors by their names in it; a field that is not there keeps the host's own.
        """
        host = self.host
        device = next(iter((*host.parameters(), *host.buffers()))).device
        twins = []
        for name in mix.names if mix.differs else ():
            if name in values:
                rows = torch.tensor(mix.columns[name], device=device) != 0
                twins.append((_twin(host, values[name]), rows))
        self._twins = tuple(twins)
        self._met = False

    def _after(self, host: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Any:
        for twin, rows in self._twins:
            other = twin(*args, **kwargs)
            if not isinstance(other, Tensor) or not isinstance(output, Tensor):
                raise SteerError(
                    f"the rows of this batch have different values of {type(host).__name__}, which returns "
                    f"{type(output).__name__} and no tensor of rows. Select one field at a time."
                )
            chosen = rows.repeat_interleave(row_factor(len(rows), output.shape[0]))
            output = torch.where(chosen.view(-1, *[1] * (output.dim() - 1)), other, output)
        if not torch.compiler.is_compiling():
            self._met = True
        return output

    def settle(self) -> None:
        """Warn if the model has run without calling the host: some kernels take a module's weight straight."""
        if self._twins and not self._met:
            warnings.warn(
                f"the rows of this batch have their own values of a {type(self.host).__name__} that this call did "
                "not go through; where its weight was used, it was the base's. Select one field at a time instead.",
                stacklevel=2,
            )
        self._met = False

    def _apply(self, fn: Any, recurse: bool = True) -> Switch:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for twin, _ in self._twins:
            twin._apply(fn)  # type: ignore[no-untyped-call]
        probe = fn(torch.empty(0))
        self._twins = tuple((twin, rows.to(probe.device)) for twin, rows in self._twins)
        return self

    def train(self, mode: bool = True) -> Switch:
        """Follow the host's mode."""
        for twin, _ in self._twins:
            twin.train(mode)
        super().train(mode)
        return self


def _twin(host: nn.Module, values: Mapping[str, Tensor]) -> nn.Module:
    """Return the same module with other values, and nobody's hooks; what is not in `values` is shared."""
    twin = copy.copy(host)
    hooks: dict[str, Any] = {name: OrderedDict() for name in _HOOKS}
    twin.__dict__.update(hooks, _parameters=dict(host._parameters), _buffers=dict(host._buffers), _modules={})
    for name, value in values.items():
        like: Tensor = getattr(host, name)
        if name in twin._parameters:
            twin._parameters[name] = nn.Parameter(value.to(like), requires_grad=False)
        else:
            twin._buffers[name] = value.to(like)
    return twin
