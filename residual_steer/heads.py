"""The base tensors that fields train along, such as a classifier: every field has its own, as the base has.

A selection puts the tensors themselves in place, not their values. So each has its gradient and its optimizer state to
itself, a backward pass finds those that the forward pass used, and the base's are never written to.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .errors import SteerError
from .mix import Mix
from .switch import Switch, follow

__all__ = ["Entry", "Heads"]

Entry = tuple[str, nn.Module, str, Tensor]  # plain name, the module that has it, its name there, and the tensor


@dataclass
class Heads:
    """The base tensors that fields train.

    Attributes:
        base: the base's own, by plain name, as they were last seen in place.
        own: each field's, by field and plain name.
        there: whose are in place, by plain name: a field's, `""` for a sum; those of the base are not listed.
        switches: the module at each place that can be computed for several fields in one batch.
    """

    base: dict[str, Tensor] = field(default_factory=dict)
    own: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    there: dict[str, str] = field(default_factory=dict)
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
        made = {id(tensors[key]): _copy(tensors[key]) for key in keys}
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

    def select(self, mix: Mix, entries: list[Entry], trains: Callable[[str], bool]) -> None:
        """Put in place what a mix asks for; everything that can fail comes before anything is changed.

        A field that acts alone has its own tensors in place. With weights, base + Σ w·(own − base) is, or a field's own
        where no other has its own and it weighs 1. Row by row, modules are computed for each field.

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
        placings = [follow(target, group[0][3]) for group, (_, target) in zip(groups, targets, strict=True)]
        for group, (owner, _), placed in zip(groups, targets, placings, strict=True):
            if placed is not group[0][3]:
                for _, module, local, _ in group:
                    setattr(module, local, placed)
            for key, *_ in group:
                if key in self.base:
                    self.there.pop(key, None)
                    if owner is not None:
                        self.there[key] = owner
            if isinstance(placed, nn.Parameter) and placed.is_floating_point():
                placed.requires_grad_(bool(owner) and trains(str(owner)))
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


def _copy(tensor: Tensor) -> Tensor:
    value = tensor.detach().clone()
    return nn.Parameter(value, requires_grad=False) if isinstance(tensor, nn.Parameter) else value
