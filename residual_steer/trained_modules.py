"""The base tensors that fields train along, such as a classifier: every field has its own, as the base has.

A selection puts the tensors themselves in place, not their values: so each has its gradient and its optimizer state to
itself, and the base's are never written to. Beside a bf16 base and outside the blocks they are fp32, as fields are, and
the `forward` of their module sees them in bf16. Rows of one batch meet their own through a `Switch`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ._calls import running
from ._frozen import Attachment
from ._internals import cast_dtypes, compute_in, twin
from .errors import SteerError
from .routing import Mix, row_factor

Entry = tuple[str, nn.Module, str, Tensor]  # plain name, the module that has it, its name there, and the tensor
Versions = dict[str, Tensor]  # each field's own tensor for a place


@dataclass
class Heads:
    """The base tensors that fields train, by plain name."""

    base: dict[str, Tensor] = field(default_factory=dict)  # the base's own, as they were last seen in place
    own: dict[str, dict[str, Tensor]] = field(default_factory=dict)  # each field's
    there: dict[str, str | None] = field(default_factory=dict)  # whose are in place: "" is a sum's, None the base's
    inner: set[str] = field(default_factory=set)  # the fields that have tensors inside the blocks
    switches: list[Switch] = field(default_factory=list)  # where several fields can be computed in one batch

    def open(self, name: str, keys: Collection[str], entries: list[Entry], inside: Collection[int]) -> None:
        """Give a field copies of base tensors; tied ones stay tied. No switch can stand `inside`, in the blocks."""
        tensors = {key: tensor for key, _, _, tensor in entries}
        within = {id(tensor) for _, module, _, tensor in entries if id(module) in inside}
        chosen = {id(tensors[key]): tensors[key] for key in keys}
        made = {place: _copy(tensor, master=place not in within) for place, tensor in chosen.items()}
        if within & made.keys():
            self.inner.add(name)
        self.own[name] = {key: made[id(tensors[key])] for key in keys}
        self.base |= {key: tensors[key] for key in keys}
        standing = {id(switch.host) for switch in self.switches}
        for _, module, _, tensor in entries:
            if id(tensor) in made and id(module) not in {*inside, *standing} and Switch.fits(module):
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
        self.take_stock(entries)
        return dict(self.own.get(name, {}))

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
        self.take_stock(entries)
        versions: dict[int, Versions] = {}  # by the id of the tensor in place, which may go by several names
        groups: dict[int, list[Entry]] = {}
        having = mix.names if mix.rows is None else self.own
        for entry in entries:
            key, place = entry[0], id(entry[3])
            groups.setdefault(place, []).append(entry)
            for name in having if key in self.base else ():
                if key in self.own.get(name, {}):
                    versions.setdefault(place, {}).setdefault(name, self.own[name][key])
        switched = {} if mix.rows is None else self._by_row(mix, entries, versions)
        weights = {} if mix.differs else dict(zip(mix.names, mix.table[0], strict=True))
        plan = []
        for place, group in groups.items():
            keys = [key for key, *_ in group if key in self.base]
            if keys:
                _, module, local, tensor = group[0]
                owner, target = self._target(keys[0], versions.get(place, {}), weights)
                dtype = _dtype(module, local, tensor)
                plan.append((group, keys, owner, _follow(target, tensor.device, dtype, own=bool(owner)), dtype))
        for group, keys, owner, placed, dtype in plan:
            for _, module, local, tensor in group:
                if placed is not tensor:
                    setattr(module, local, placed)
                casts = {name: cast for name, cast in cast_dtypes(module).items() if name != local}
                compute_in(module, {**casts, local: dtype} if placed.dtype != dtype else casts)
                move(module, bool(owner))
            self.there.update(dict.fromkeys(keys, owner))
            if isinstance(placed, nn.Parameter) and placed.is_floating_point():
                placed.requires_grad_(bool(owner) and trains(str(owner)))
        for switch in self.switches:
            switch.select(mix, switched.get(id(switch.host), {}), trains)

    def take_stock(self, entries: list[Entry]) -> None:
        """Note what is in place now: somebody may have replaced it, as `.to()` does with buffers."""
        for key, _, _, tensor in entries:
            if key in self.base:
                owner = self.there.get(key)
                if owner is None:
                    self.base[key] = tensor
                elif key in self.own.get(owner, {}):
                    self.own[owner][key] = tensor

    def _target(self, key: str, own: Versions, weights: Mapping[str, float]) -> tuple[str | None, Tensor]:
        """Return whose tensor goes to a place, and the tensor; raise if several fields have statistics there."""
        base = self.base[key]
        found = [name for name in weights if name in own]
        if not found:
            return None, base
        first = own[found[0]]
        if len(found) == 1 and (weights[found[0]] == 1 or not isinstance(base, nn.Parameter)):
            return found[0], first
        if isinstance(base, nn.Parameter) and base.is_floating_point():
            like = base.detach().double()
            moves = (weights[name] * (own[name].detach().to(like) - like) for name in found)
            return "", nn.Parameter(sum(moves, like).to(base.dtype), requires_grad=False)
        if all(torch.equal(own[name].to(first), first) for name in found):
            return found[0], first
        raise SteerError(
            f"the fields {', '.join(found)} have different values of {key}, which cannot be summed. Use such fields by "
            "name, or row by row."
        )

    def _by_row(
        self, mix: Mix, entries: list[Entry], versions: Mapping[int, Versions]
    ) -> dict[int, dict[str, dict[str, Tensor]]]:
        """Return each field's tensors by host, field and name in the host, none if one field is in place; or raise."""
        found: dict[int, dict[str, dict[str, Tensor]]] = {}
        hosts = {id(switch.host) for switch in self.switches}
        for key, module, local, tensor in entries:
            for name, own in versions.get(id(tensor), {}).items():
                if id(module) in hosts and Switch.fits(module):
                    found.setdefault(id(module), {}).setdefault(name, {})[local] = own
                elif name in mix.names and not mix.differs:
                    return {}
                elif name in mix.names:
                    raise SteerError(
                        f"field {name!r} has its own value of {key}, in which the rows of one batch cannot differ: it "
                        "is used inside the blocks, by a module that has others inside it, or with a forward or a "
                        "weight that something else computes. Use such a field by name, for the whole batch."
                    )
        return found


class Switch(Attachment):
    """Stand on a base module of which fields have their own tensors, outside the blocks, and give every row its own."""

    def __init__(self, host: nn.Module) -> None:
        super().__init__(host, "steering_rows")
        self._twins: tuple[tuple[nn.Module, Tensor, bool], ...] = ()  # the module, its rows, whether there are any
        # First in line, so that whoever watches the host sees what the rows really get.
        self._handles = [host.register_forward_hook(self._after, with_kwargs=True, prepend=True)]

    @staticmethod
    def fits(host: nn.Module) -> bool:
        """Return whether a module has no children, its own forward, and no weight that a hook computes."""
        alone = all(isinstance(child, Switch) for child in host.children())
        return alone and not any(name == "forward" or isinstance(x, Tensor) for name, x in host.__dict__.items())

    def select(self, mix: Mix, tensors: Mapping[str, Mapping[str, Tensor]], trains: Callable[[str], bool]) -> None:
        """Give the rows of each field the host with that field's tensors, by their names in it."""
        here: dict[str, Tensor] = {**dict(self.host.named_parameters()), **dict(self.host.named_buffers())}
        dtypes = {name: _dtype(self.host, name, tensor) for name, tensor in here.items()}
        device, off, twins = next(iter(here.values())).device, (0.0,) * len(mix.table), []
        for name, own in tensors.items():
            placed = {
                local: _follow(value, here[local].device, dtypes[local], own=True) for local, value in own.items()
            }
            for parameter in placed.values():
                if isinstance(parameter, nn.Parameter) and parameter.is_floating_point():
                    parameter.requires_grad_(trains(name))
            rows = torch.tensor(mix.columns.get(name, off), device=device) != 0
            twins.append((twin(self.host, placed, {local: dtypes[local] for local in own}), rows, name in mix.names))
        self._twins = tuple(twins)

    def _after(self, host: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Any:
        """Choose every row's output; under `torch.compile` every field's is computed: other rows are the same graph."""
        if not self._twins:
            return output
        compiling = torch.compiler.is_compiling()
        call = running.calls[-1] if running.calls and not compiling else None
        batch = None if call is None else call.batch
        for other_host, rows, acting in self._twins:
            if not compiling and not acting:
                continue
            other = other_host(*args, **kwargs)
            entered = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
            fits = isinstance(output, Tensor) and bool(entered) and entered[0].dim() > 1 and output.dim() > 1
            if not fits or (batch is not None and output.shape[0] not in (1, batch)):
                shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
                raise SteerError(
                    f"the rows of this batch have their own {type(host).__name__}, whose output, {shape}, has not the "
                    f"batch's rows{f', {batch},' if batch else ''} in front. Use one field at a time."
                )
            size = batch if output.shape[0] == 1 and batch else output.shape[0]
            chosen = rows.repeat_interleave(row_factor(len(rows), size))
            output = torch.where(chosen.view(-1, *[1] * (output.dim() - 1)), other, output)
        if call is not None:
            call.met.add(id(self))
        return output

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
        device = fn(torch.empty(0)).device
        for other, _, _ in self._twins:
            other._apply(fn)  # type: ignore[no-untyped-call]
        self._twins = tuple((other, rows.to(device), acting) for other, rows, acting in self._twins)
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
