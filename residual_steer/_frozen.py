"""What steering freezes in the base: parameters, and the running statistics that a forward pass would move.

What others opened is theirs: adapters of another library train on, and a model that somebody froze already is left as
it is. Nothing is closed after the first field came; a parameter that was opened since trains, and is not saved with a
field.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from torch import Tensor, nn

from ._internals import version
from .backbone import can_train
from .errors import some

__all__ = ["Frozen", "Moving", "plain_name", "unsaved"]

_ADAPTERS = ("peft", "adapters", "pyreft", "pyvene")  # packages whose modules bring parameters of their own
_INSTANCE = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
_log = logging.getLogger("residual_steer")


def _foreign(model: nn.Module) -> set[int]:
    """Return the ids of the parameters that other adapters brought: their own, and those in their dicts by name."""
    found: set[int] = set()
    for module in model.modules():
        if type(module).__module__.partition(".")[0] in _ADAPTERS:
            dicts = [child for child in module.children() if isinstance(child, (nn.ModuleDict, nn.ParameterDict))]
            found |= {id(p) for child in dicts for p in child.parameters()}
            found |= {id(p) for p in module.parameters(recurse=False)}
    return found


@dataclass
class Frozen:
    """What was frozen in a model.

    Attributes:
        closed: names of the parameters that were closed.
        statistics: modules with running statistics, and the attribute that moves them with its value before steering.
    """

    closed: list[str] = field(default_factory=list)
    statistics: list[tuple[nn.Module, str, object]] = field(default_factory=list)

    def close(self, model: nn.Module, blocks: Iterable[nn.Module]) -> None:
        """Freeze a model that nobody froze yet, but for the parameters of other adapters.

        Where less than half of the numbers in the blocks require a gradient, somebody chose those that do.
        """
        inside = {id(p): p for block in blocks for p in block.parameters() if can_train(p)}.values()
        opened = sum(p.numel() for p in inside if p.requires_grad)
        if 2 * opened >= sum(p.numel() for p in inside):
            foreign = _foreign(model)
            for name, parameter in model.named_parameters():
                if parameter.requires_grad and id(parameter) not in foreign:
                    self.closed.append(plain_name(name))
                    parameter.requires_grad_(False)
        _log.info("froze %d tensors of a %s", len(self.closed), type(model).__name__)
        for module in model.modules():
            attribute = "momentum" if isinstance(module, _INSTANCE) else "track_running_stats"
            if getattr(module, "running_mean", None) is not None and hasattr(module, attribute):
                self.statistics.append((module, attribute, getattr(module, attribute)))
                self.move(module, any(p.requires_grad for p in module.parameters(recurse=False)))

    def move(self, module: nn.Module, on: bool) -> None:
        """Let the running statistics of a module move, if it has any, or hold them still."""
        for each, attribute, value in self.statistics:
            if each is module:  # without momentum an instance norm keeps what it has, and uses it in evaluation
                setattr(module, attribute, value if on else 0.0 if attribute == "momentum" else False)

    def reopen(self, model: nn.Module) -> None:
        """Put back what `close` changed."""
        there = {plain_name(name): parameter for name, parameter in model.named_parameters()}
        for name in self.closed:
            if name in there:
                there[name].requires_grad_(True)
        for module, attribute, value in self.statistics:
            setattr(module, attribute, value)


@dataclass
class Moving:
    """Stored buffers, watched during one call in training mode."""

    buffers: list[tuple[str, Tensor, int]]

    @classmethod
    def of(cls, buffers: Iterable[tuple[str, Tensor]]) -> Moving:
        """Note how often each was changed in place."""
        return cls([(name, tensor, version(tensor)) for name, tensor in buffers if not tensor.is_inference()])

    def warn(self, own: Collection[int]) -> None:
        """Warn of frozen buffers that the call moved: what `use(None)` gives back is then no more what it was."""
        moved = [name for name, tensor, before in self.buffers if version(tensor) != before and id(tensor) not in own]
        if moved:
            warnings.warn(
                f"a call in training mode changed {some(moved)}, which is frozen and not saved with a field. "
                "Call `eval()` on that module after `model.train()`, or train it along: `train=[...]`.",
                stacklevel=3,
            )


def unsaved(model: nn.Module, stored: Collection[int]) -> list[str]:
    """Return the parameters that train and are neither among those stored nor another adapter's."""
    theirs = _foreign(model)
    return [n for n, p in model.named_parameters() if p.requires_grad and id(p) not in stored and id(p) not in theirs]


def plain_name(name: str) -> str:
    """Drop what `torch.compile` puts into the name of a tensor of a compiled part: `_orig_mod.`."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod") if "_orig_mod" in name else name
