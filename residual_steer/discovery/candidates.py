"""Which of the modules that were called are the residual blocks, and whether they are one stream."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise, takewhile

from torch import nn

from .graph import depends, paths
from .trace import LISTS, Call, Path, Value, is_marked

__all__ = ["Stack", "Step", "blocks_of", "folder", "stacks_of", "steps_of"]


@dataclass(frozen=True)
class Step:
    """A call that took the stream from one place, in what the module was given, to another, in what it returned."""

    call: Call
    enter: Value
    leave: Value


@dataclass
class Stack:
    """Blocks through which one stream goes, in its order: one step per call, of which a block may have several."""

    steps: list[Step] = field(default_factory=list)

    @property
    def blocks(self) -> dict[str, nn.Module]:
        """The blocks by name, in the order of their first call."""
        return {step.call.path: step.call.module for step in self.steps}

    def __str__(self) -> str:
        """Return where the blocks are, and how many of what."""
        kinds = dict.fromkeys(type(block).__name__ for block in self.blocks.values())
        return f"{folder(self.blocks) or 'the model'} ({len(self.blocks)} × {', '.join(kinds)})"


def folder(names: Iterable[str]) -> str:
    """Return the module that holds all of these."""
    levels = zip(*(name.split(".")[:-1] for name in names), strict=False)
    return ".".join(level[0] for level in takewhile(lambda level: len(set(level)) == 1, levels))


def _ordered(steps: Iterable[Step]) -> list[Step]:
    return sorted(steps, key=lambda step: step.call.span)


def _is_inside(name: str, others: Iterable[str]) -> bool:
    return any(name.startswith(f"{other}.") for other in others)


def steps_of(calls: Sequence[Call]) -> tuple[dict[str, list[Step]], dict[str, str]]:
    """Return, by name, the steps of modules whose every call is residual, and why others that keep a shape are not."""
    by_module: dict[str, list[Call]] = {}
    for call in calls:
        by_module.setdefault(call.path, []).append(call)
    found: dict[str, list[Step]] = {}
    reasons: dict[str, str] = {}
    for name, made in by_module.items():
        first = _step(made[0])
        if isinstance(first, Step):
            places = first.enter.path, first.leave.path
            steps = [step for call in made if isinstance(step := _step(call, places), Step)]
            if len(steps) == len(made):
                found[name] = steps
            else:
                reasons[name] = "some of its calls are residual and others are not"
        elif first:
            reasons[name] = first
    return found, reasons


def _step(call: Call, places: tuple[Path, Path] | None = None) -> Step | str:
    """Return the stream's way through a call, or why there is none; "" if nothing keeps its shape."""
    reason = ""
    for leave in call.left:
        for enter in call.entered:
            if enter.shape != leave.shape or places not in (None, (enter.path, leave.path)):
                continue
            if enter.edge[0] is None or leave.edge[0] is None:
                reason = reason or "no gradient goes through it"
                continue
            found = paths(leave.edge, enter.edge)
            if found.residual:
                return Step(call, enter, leave)
            opaque = f"it hands its input through {found.opaque}, whose derivative torch does not know"
            reason = reason or (opaque if found.opaque else "its output is not its input + …")
    return reason


def blocks_of(found: Mapping[str, list[Step]], refused: Iterable[str], model: nn.Module) -> list[Step]:
    """Choose the blocks among the residual modules, of which some stand inside others, and return their steps.

    A module that does no more than call residual ones in turn is a stage, and they are the blocks; unless it stands in
    a list of its like, which hand one stream of one shape on. In all other cases the outer one is the block. What
    stands inside a layer that transformers marks as one, and that keeps its shape but is not residual (`refused`), is
    no stream.
    """
    chosen: list[Step] = []

    def pick(names: list[str]) -> None:
        for name in names:
            if _is_inside(name, names) or is_lent(name, names):
                continue
            inner = [other for other in found if _is_inside(other, [name])]
            steps = [step for other in inner for step in found[other]]
            if _is_stage(found[name][0], steps) and not _is_layer(name, found, model):
                pick(inner)
            else:
                chosen.extend(found[name])

    def is_lent(name: str, names: list[str]) -> bool:
        """Return whether a module stands outside of the others, and is called by them alone, as a part they share."""
        others = [step.call for other in names if other != name for step in found[other]]
        return all(any(call.holds(step.call) for call in others) for step in found[name])

    closed = [name for name in refused if is_marked(model.get_submodule(name))]
    pick([name for name in found if not _is_inside(name, closed)])
    return _ordered(chosen)


def _is_layer(name: str, found: Mapping[str, list[Step]], model: nn.Module) -> bool:
    """Return whether a module stands in a list of residual ones that hand one stream of one shape on."""
    prefix = name.rpartition(".")[0]
    parent = model.get_submodule(prefix)
    siblings = [f"{prefix}.{key}" if prefix else key for key, _ in parent.named_children()]
    if type(model.get_submodule(name)) is nn.Sequential or not isinstance(parent, LISTS) or len(parent) < 2:
        return False
    if not all(other in found for other in siblings):
        return False
    steps = _ordered(step for other in siblings for step in found[other])
    return len({step.enter.shape for step in steps}) == 1 and _in_turn(steps)


def _is_stage(outer: Step, inner: Iterable[Step]) -> bool:
    """Return whether a module adds nothing to the stream but what residual modules inside it add."""
    inside = [step for step in inner if outer.call.holds(step.call)]
    tops = _ordered(step for step in inside if not any(other.call.holds(step.call) for other in inside))
    if not tops or not _in_turn(tops):
        return False
    return paths(outer.leave.edge, tops[-1].leave.edge).plain and paths(tops[0].enter.edge, outer.enter.edge).plain


def _in_turn(steps: list[Step]) -> bool:
    """Return whether each one reads what the one before it left, at most normalised."""
    return all(paths(later.enter.edge, earlier.leave.edge).plain for earlier, later in pairwise(steps))


def stacks_of(steps: Sequence[Step]) -> list[Stack]:
    """Part steps into streams: a step belongs to the stream whose last block its own stream was computed from.

    A stream that leaves another one in its course, and to whose end that one's end leads in turn, is no other: as in a
    network that goes around some of its blocks and takes up what they computed.
    """
    stacks: list[Stack] = []
    for step in steps:
        before = next((s for s in reversed(stacks) if depends(step.enter.edge, s.steps[-1].leave.edge)), None)
        if before is None:
            stacks.append(before := Stack())
        before.steps.append(step)
    whole: list[Stack] = []
    for stack in stacks:
        for other in whole:
            begins = any(depends(stack.steps[0].enter.edge, step.leave.edge) for step in other.steps)
            if begins and depends(stack.steps[-1].leave.edge, other.steps[-1].leave.edge):
                other.steps = _ordered(other.steps + stack.steps)
                break
        else:
            whole.append(stack)
    merged: dict[tuple[str, ...], Stack] = {}
    for stack in whole:  # one stack that is called for several inputs is one
        merged.setdefault(tuple(stack.blocks), Stack()).steps.extend(stack.steps)
    return list(merged.values())
