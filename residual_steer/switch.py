"""The module that sits on a head: where the rows of a batch belong to different fields, each meets its field's head.

A field can train base modules along, such as a classifier. Whole models that differ there cannot share a batch, but a
module that comes after the blocks, or before them, can be computed once for every field and its rows chosen.
"""

from __future__ import annotations

import copy
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .errors import SteerError
from .mix import Mix, row_factor

__all__ = ["Switch", "follow"]

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Switch(nn.Module):
    """Stand on one base module of which fields have their own tensors.

    Args:
        host: a module without children, outside the steered blocks.
    """

    key = "steering_rows"

    def __init__(self, host: nn.Module) -> None:
        super().__init__()
        self._host = (host,)  # in a tuple, since a module would become a child
        self._twins: tuple[tuple[nn.Module, Tensor, bool], ...] = ()  # the module, its rows, whether there are any
        self._met = False
        self.batch: int | None = None  # rows of the model's batch, while it runs outside torch.compile
        host.add_module(self.key, self)
        # First in line, so that whoever watches the host sees what the rows really get.
        self._handle = host.register_forward_hook(self._after, with_kwargs=True, prepend=True)

    @property
    def host(self) -> nn.Module:
        """The module that it stands on."""
        return self._host[0]

    @staticmethod
    def fits(host: nn.Module) -> bool:
        """Whether a module can be computed again with other tensors.

        It has no children, its own forward, and no weight that a hook computes (older weight norm, pruning).
        """
        alone = all(isinstance(child, Switch) for child in host.children())
        return alone and not any(name == "forward" or isinstance(x, Tensor) for name, x in host.__dict__.items())

    def detach(self) -> None:
        """Take away the child and the hook, and nothing else."""
        self._handle.remove()
        delattr(self.host, self.key)

    def select(self, mix: Mix, tensors: Mapping[str, Mapping[str, Tensor]], trains: Callable[[str], bool]) -> None:
        """Give the rows of each field the host with that field's tensors.

        Args:
            mix: says which rows are whose.
            tensors: by field, the host's tensors by their names in it; a field that is not there keeps the host's.
            trains: says whether a field trains.
        """
        device = next(iter((*self.host.parameters(), *self.host.buffers()))).device
        off = (0.0,) * len(mix.table)
        twins = []
        for name, own in tensors.items():
            for parameter in own.values():
                if isinstance(parameter, nn.Parameter) and parameter.is_floating_point():
                    parameter.requires_grad_(trains(name))
            rows = torch.tensor(mix.columns.get(name, off), device=device) != 0
            twins.append((_twin(self.host, own), rows, name in mix.names))
        self._twins = tuple(twins)
        self._met = False

    def _after(self, host: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Any:
        """Choose every row's output.

        Under `torch.compile` every field's is computed, so that other rows are not another graph.

        Raises:
            SteerError: what goes in or comes out has no rows.
        """
        compiling = torch.compiler.is_compiling()
        for twin, rows, acting in self._twins:
            if not compiling and not acting:
                continue
            other = twin(*args, **kwargs)
            self._check([x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)], output)
            size = self.batch if output.shape[0] == 1 and self.batch else output.shape[0]
            chosen = rows.repeat_interleave(row_factor(len(rows), size))
            output = torch.where(chosen.view(-1, *[1] * (output.dim() - 1)), other, output)
        if not compiling:
            self._met = True
        return output

    def _check(self, entered: list[Tensor], output: Any) -> None:
        """Refuse a call that is not row by row: a table of positions, tokens picked out of the batch.

        Raises:
            SteerError: it is none.
        """
        fits = isinstance(output, Tensor) and bool(entered) and entered[0].dim() > 1 and output.dim() > 1
        if not fits or (self.batch is not None and output.shape[0] not in (1, self.batch)):
            shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise SteerError(
                f"the rows of this batch have their own {type(self.host).__name__}, whose output, {shape}, has not the "
                f"batch's rows{f', {self.batch},' if self.batch else ''} in front. Use one field at a time."
            )

    def settle(self) -> None:
        """Warn if the model has run without calling the host: some kernels take a module's weight straight."""
        if any(acting for _, _, acting in self._twins) and not self._met:
            warnings.warn(
                f"the rows of this batch have their own values of a {type(self.host).__name__} that this call did "
                "not go through; where its weight was used, it was the base's. Select one field at a time instead.",
                stacklevel=2,
            )
        self._met = False

    def _apply(self, fn: Any, recurse: bool = True) -> Switch:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        probe = fn(torch.empty(0))
        for twin, _, _ in self._twins:
            twin._apply(fn)  # type: ignore[no-untyped-call]
        self._twins = tuple((twin, rows.to(probe.device), acting) for twin, rows, acting in self._twins)
        return self

    def train(self, mode: bool = True) -> Switch:
        """Follow the host's mode."""
        for twin, _, _ in self._twins:
            twin.train(mode)
        super().train(mode)
        return self


def _twin(host: nn.Module, own: Mapping[str, Tensor]) -> nn.Module:
    """Return the same module with other tensors, and nobody's hooks; what is not in `own` is shared.

    Buffers are copied: running statistics of a batch that several fields share belong to none of them.
    """
    twin = copy.copy(host)
    hooks: dict[str, Any] = {name: OrderedDict() for name in _HOOKS}
    buffers = {name: None if buffer is None else buffer.clone() for name, buffer in host._buffers.items()}
    twin.__dict__.update(hooks, _parameters=dict(host._parameters), _buffers=buffers, _modules={})
    for name, value in own.items():
        like: Tensor = getattr(host, name)
        if name in buffers:
            buffers[name] = value.to(like, copy=True)
        else:
            twin._parameters[name] = follow(value, like)  # type: ignore[assignment]
    return twin


def follow(tensor: Tensor, like: Tensor) -> Tensor:
    """Bring a tensor that was not in the model to where, and to the type in which, its place is now."""
    if tensor.device == like.device and tensor.dtype == like.dtype:
        return tensor
    if not isinstance(tensor, nn.Parameter):
        return tensor.to(like)
    tensor.data, tensor.grad = tensor.data.to(like), None
    return tensor
