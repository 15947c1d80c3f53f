"""The base tensors that fields train along, such as a classifier: every field has its own, as the base has.

A selection puts the tensors themselves in place, not their values. So each has its gradient and its optimizer state to
itself, a backward pass finds those that the forward pass used, and the base's are never written to. Beside a bf16 base
and outside the blocks they are fp32, as fields are: updates smaller than bf16 resolves are not lost. The `forward` of
their module sees them in bf16.

Whole models that differ there cannot share a batch, but a module that comes after the blocks, or before them, can be
computed once for every field and its rows chosen: that is the `Switch` on it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ._internals import cast_dtypes, compute_in, twin
from .errors import SteerError
from .routing import Mix, row_factor
from .selection import current_call

__all__ = ["Entry", "Heads", "Switch", "master_dtype"]

Entry = tuple[str, nn.Module, str, Tensor]  # plain name, the module that has it, its name there, and the tensor


@dataclass
class Heads:
    """The base tensors that fields train.

    Attributes:
        base: the base's own, by plain name, as they were last seen in place.
        own: each field's, by field and plain name.
        there: whose are in place, by plain name: a field's, `""` for a sum; those of the base are not listed.
        inner: the fields that have tensors inside the blocks.
        switches: the module at each place that can be computed for several fields in one batch.
    """

    base: dict[str, Tensor] = field(default_factory=dict)
    own: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    there: dict[str, str] = field(default_factory=dict)
    inner: set[str] = field(default_factory=set)
    switches: list[Switch] = field(default_factory=list)

    def open(self, name: str, keys: Collection[str], entries: list[Entry], inside: Collection[int]) -> None:
        """Give a field copies of base tensors; the base's are in place, tied ones stay tied.

        Args:
            name: the field.
            keys: plain names.
            entries: the base's tensors.
            inside: ids of the modules inside the blocks, where no switch can stand.
        """
        tensors = {key: tensor for key, _, _, tensor in entries}
        within = {id(tensor) for _, module, _, tensor in entries if id(module) in inside}
        made = {  # tied ones once
            id(tensors[key]): _copy(tensors[key], master=id(tensors[key]) not in within) for key in keys
        }
        if any(id(tensors[key]) in within for key in keys):
            self.inner.add(name)
        self.own[name] = {key: made[id(tensors[key])] for key in keys}
        self.base |= {key: tensors[key] for key in keys}
        opened = {id(tensor) for tensor in self.base.values()}
        standing = {id(switch.host) for switch in self.switches}
        for _, module, _, tensor in entries:
            if id(tensor) in opened and id(module) not in {*inside, *standing} and Switch.fits(module):
                self.switches.append(Switch(module))
                standing.add(id(module))

    def close(self, name: str, entries: list[Entry]) -> None:
        """Forget a field's tensors; they are not in place."""
        self.own.pop(name, None)
        self.inner.discard(name)
        opened = {key for own in self.own.values() for key in own}
        self.base = {key: tensor for key, tensor in self.base.items() if key in opened}
        kept = {id(tensor) for key, _, _, tensor in entries if key in opened}
        needed = {id(module) for _, module, _, tensor in entries if id(tensor) in kept}
        for switch in [switch for switch in self.switches if id(switch.host) not in needed]:
            switch.detach()
            self.switches.remove(switch)

    def values(self, name: str, entries: list[Entry]) -> dict[str, Tensor]:
        """Return a field's tensors, as they are in place if they are."""
        here = {key: tensor for key, _, _, tensor in entries if self.there.get(key) == name}
        return {key: here.get(key, tensor) for key, tensor in self.own.get(name, {}).items()}

    def lost(self, names: Iterable[str], entries: list[Entry]) -> list[str]:
        """Return the base tensors that fields train and that are gone, or of another shape than they were."""
        shapes = {key: tensor.shape for key, _, _, tensor in entries}
        own = {key: tensor.shape for name in names for key, tensor in self.own.get(name, {}).items()}
        return [key for key, shape in own.items() if not shapes.get(key) == shape == self.base[key].shape]

    def select(
        self, mix: Mix, entries: list[Entry], trains: Callable[[str], bool], move: Callable[[nn.Module, bool], None]
    ) -> None:
        """Put in place what a mix asks for; everything that can fail comes before anything is changed.

        A field that acts alone has its own tensors in place. With weights, base + Σ w·(own − base) is, or a field's own
        where no other has its own and it weighs 1. Row by row, modules are computed for each field. Statistics `move`
        in a module where a field's own are in place.

        Raises:
            SteerError: rows cannot differ in what a field trained, or statistics cannot be summed.
        """
        if not self.base:
            return
        self._take_stock(entries)
        weights = dict(zip(mix.names, mix.table[0], strict=True)) if not mix.differs else {}
        switched = self._switched(mix, entries) if mix.rows is not None else None
        slots: dict[int, list[Entry]] = {}
        for entry in entries:
            slots.setdefault(id(entry[3]), []).append(entry)
        groups = [group for group in slots.values() if any(key in self.base for key, *_ in group)]
        targets = [self._target([key for key, *_ in group], weights) for group in groups]
        dtypes = [_dtype(module, local, tensor) for (_, module, local, tensor), *_ in groups]
        placings = [
            _follow(target, group[0][3].device, dtype, own=bool(owner))
            for group, (owner, target), dtype in zip(groups, targets, dtypes, strict=True)
        ]
        for group, (owner, _), placed, dtype in zip(groups, targets, placings, dtypes, strict=True):
            for _, module, local, tensor in group:
                if placed is not tensor:
                    setattr(module, local, placed)
                casts = {name: cast for name, cast in cast_dtypes(module).items() if name != local}
                compute_in(module, {**casts, local: dtype} if placed.dtype != dtype else casts)
            for key, *_ in group:
                if key in self.base:
                    self.there.pop(key, None)
                    if owner is not None:
                        self.there[key] = owner
            if isinstance(placed, nn.Parameter) and placed.is_floating_point():
                placed.requires_grad_(bool(owner) and trains(str(owner)))
            for _, module, _, _ in group:
                move(module, bool(owner))
        for switch in self.switches:
            switch.select(mix, (switched or {}).get(id(switch), {}), trains)

    def _take_stock(self, entries: list[Entry]) -> None:
        """Note what is in place now: somebody may have replaced it, as `.to()` does with buffers."""
        for key, _, _, tensor in entries:
            if key in self.base:
                owner = self.there.get(key)
                if owner is None:
                    self.base[key] = tensor
                elif key in self.own.get(owner, {}):
                    self.own[owner][key] = tensor

    def _target(self, keys: list[str], weights: Mapping[str, float]) -> tuple[str | None, Tensor]:
        """Return whose tensor goes to a place, and the tensor; a tied one goes by several names.

        Raises:
            SteerError: several fields have their own statistics there.
        """
        base = next(self.base[key] for key in keys if key in self.base)
        found: list[tuple[str, float, Tensor]] = []
        for each, weighs in weights.items():
            mine = [self.own[each][key] for key in keys if key in self.own.get(each, {})]
            found += [(each, weighs, tensor) for tensor in mine[:1]]
        if not found:
            return None, base
        name, weight, own = found[0]
        if len(found) == 1 and (weight == 1 or not isinstance(base, nn.Parameter)):
            return name, own
        if isinstance(base, nn.Parameter) and base.is_floating_point():
            like = base.detach().double()
            moves = (weighs * (tensor.detach().to(like) - like) for _, weighs, tensor in found)
            return "", nn.Parameter(sum(moves, like).to(base.dtype), requires_grad=False)
        if all(torch.equal(other.to(own), own) for _, _, other in found):
            return name, own
        raise SteerError(
            f"the fields {', '.join(name for name, _, _ in found)} have different values of {keys[0]}, which cannot be "
            "summed. Use such fields by name, or row by row."
        )

    def _switched(self, mix: Mix, entries: list[Entry]) -> dict[int, dict[str, dict[str, Tensor]]] | None:
        """Return the tensors of each field by switch and the host's name of them; None if one field is in place.

        Raises:
            SteerError: rows differ in a tensor of a module that cannot be computed for every field.
        """
        found: dict[int, dict[str, dict[str, Tensor]]] = {}
        switches = {id(switch.host): switch for switch in self.switches}
        ties: dict[int, list[str]] = {}
        for key, _, _, tensor in entries:
            ties.setdefault(id(tensor), []).append(key)
        for key, module, local, tensor in entries:
            for name, own in self.own.items():
                mine = [own[tied] for tied in ties[id(tensor)] if tied in own]
                if not mine:
                    continue
                if id(module) in switches and Switch.fits(module):
                    found.setdefault(id(switches[id(module)]), {}).setdefault(name, {})[local] = mine[0]
                elif name in mix.names:
                    if not mix.differs:
                        return None
                    raise SteerError(
                        f"field {name!r} has its own value of {key}, in which the rows of one batch cannot differ: it "
                        "is used inside the blocks, by a module that has others inside it, or with a forward or a "
                        "weight that something else computes. Use such a field by name, for the whole batch."
                    )
        return found


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
        if not tensors:
            self._twins = ()
            return
        device = next(iter((*self.host.parameters(), *self.host.buffers()))).device
        off = (0.0,) * len(mix.table)
        twins = []
        for name, own in tensors.items():
            for parameter in own.values():
                if isinstance(parameter, nn.Parameter) and parameter.is_floating_point():
                    parameter.requires_grad_(trains(name))
            rows = torch.tensor(mix.columns.get(name, off), device=device) != 0
            twins.append((self._twin(own), rows, name in mix.names))
        self._twins = tuple(twins)

    def _twin(self, own: Mapping[str, Tensor]) -> nn.Module:
        """Return the host with a field's tensors, where and in the types in which the host's own are now."""
        here: dict[str, Tensor] = {**dict(self.host.named_parameters()), **dict(self.host.named_buffers())}
        dtypes = {name: _dtype(self.host, name, here[name]) for name in own}
        placed = {name: _follow(value, here[name].device, dtypes[name], own=True) for name, value in own.items()}
        return twin(self.host, placed, dtypes)

    def _after(self, host: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Any:
        """Choose every row's output.

        Under `torch.compile` every field's is computed, so that other rows are not another graph.

        Raises:
            SteerError: what goes in or comes out has no rows.
        """
        if not self._twins:
            return output
        compiling = torch.compiler.is_compiling()
        call = None if compiling else current_call()
        batch = None if call is None else call.batch
        for other_host, rows, acting in self._twins:
            if not compiling and not acting:
                continue
            other = other_host(*args, **kwargs)
            self._check([x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)], output, batch)
            size = batch if output.shape[0] == 1 and batch else output.shape[0]
            chosen = rows.repeat_interleave(row_factor(len(rows), size))
            output = torch.where(chosen.view(-1, *[1] * (output.dim() - 1)), other, output)
        if call is not None:
            call.met.add(id(self))
        return output

    def _check(self, entered: list[Tensor], output: Any, batch: int | None) -> None:
        """Refuse a call that is not row by row: a table of positions, tokens picked out of the batch.

        Raises:
            SteerError: it is none.
        """
        fits = isinstance(output, Tensor) and bool(entered) and entered[0].dim() > 1 and output.dim() > 1
        if not fits or (batch is not None and output.shape[0] not in (1, batch)):
            shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise SteerError(
                f"the rows of this batch have their own {type(self.host).__name__}, whose output, {shape}, has not the "
                f"batch's rows{f', {batch},' if batch else ''} in front. Use one field at a time."
            )

    def settle(self, met: Collection[int]) -> None:
        """Warn if the model has run without calling the host: some kernels take a module's weight straight."""
        if any(acting for _, _, acting in self._twins) and id(self) not in met:
            warnings.warn(
                f"the rows of this batch have their own values of a {type(self.host).__name__} that this call did "
                "not go through; where its weight was used, it was the base's. Select one field at a time instead.",
                stacklevel=2,
            )

    def _apply(self, fn: Any, recurse: bool = True) -> Switch:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        probe = fn(torch.empty(0))
        for other, _, _ in self._twins:
            other._apply(fn)  # type: ignore[no-untyped-call]
        self._twins = tuple((other, rows.to(probe.device), acting) for other, rows, acting in self._twins)
        return self

    def train(self, mode: bool = True) -> Switch:
        """Follow the host's mode."""
        for other, _, _ in self._twins:
            other.train(mode)
        super().train(mode)
        return self


def master_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return in which type a parameter of `dtype` trains: fp32 for bf16 and fp16, itself otherwise."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def _copy(tensor: Tensor, *, master: bool) -> Tensor:
    """Return a field's own tensor; inside the blocks in the base's type, since others read it past its module there."""
    value = tensor.detach().clone()
    if not isinstance(tensor, nn.Parameter):
        return value
    return nn.Parameter(value.to(master_dtype(value.dtype)) if master else value, requires_grad=False)


def _dtype(module: nn.Module, local: str, tensor: Tensor) -> torch.dtype:
    """Return the type in which a module computes with a tensor."""
    return cast_dtypes(module).get(local, tensor.dtype)


def _follow(tensor: Tensor, device: torch.device, dtype: torch.dtype, *, own: bool) -> Tensor:
    """Bring a tensor to its place, to be computed with in `dtype`; a field's own may stay an fp32 master."""
    kept = own and isinstance(tensor, nn.Parameter) and tensor.dtype == master_dtype(dtype)
    if tensor.device == device and (tensor.dtype == dtype or kept):
        return tensor
    dtype = tensor.dtype if kept else dtype
    if not isinstance(tensor, nn.Parameter):
        return tensor.to(device, dtype)
    tensor.data, tensor.grad = tensor.data.to(device, dtype), None
    return tensor
