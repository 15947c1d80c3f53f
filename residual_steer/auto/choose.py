"""Which of the modules that were called are the residual blocks, and whether they are one stream."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import cast

from torch import nn

from .graph import Edge, depends, paths
from .place import Path
from .trace import Call, Value, is_marked

__all__ = ["Stack", "Step", "blocks_of", "stacks_of", "steps_of"]

LISTS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)


@dataclass(frozen=True)
class Step:
    """A call that took the stream from one place to another.

    Attributes:
        call: the call.
        enter: the stream in what the module was given.
        leave: the stream in what it returned.
    """

    call: Call
    enter: Value
    leave: Value

    @property
    def source(self) -> Edge:
        """Where the stream entered."""
        return cast(Edge, self.enter.edge)  # a step has both

    @property
    def end(self) -> Edge:
        """Where the stream left."""
        return cast(Edge, self.leave.edge)


@dataclass
class Stack:
    """Blocks through which one stream goes, in its order.

    Attributes:
        steps: one per call; a block may be called several times.
    """

    steps: list[Step] = field(default_factory=list)

    @property
    def blocks(self) -> dict[str, nn.Module]:
        """The blocks by name, in the order of their first call."""
        return {step.call.path: step.call.module for step in self.steps}

    def __str__(self) -> str:
        """Tell where the blocks are, and how many of what."""
        names, kinds = list(self.blocks), dict.fromkeys(type(block).__name__ for block in self.blocks.values())
        return f"{folder(names) or 'the model'} ({len(names)} × {', '.join(kinds)})"


def folder(names: Sequence[str]) -> str:
    """Return the module that holds all of these."""
    parts = [name.split(".")[:-1] for name in names]
    common = parts[0]
    for other in parts[1:]:
        common = [a for a, b in zip(common, other, strict=False) if a == b][: _agree(common, other)]
    return ".".join(common)


def _agree(one: Sequence[str], other: Sequence[str]) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def steps_of(calls: Sequence[Call]) -> tuple[dict[str, list[Step]], dict[str, str]]:
    """Find the modules of which every call is residual, and why others that keep a shape are not.

    Returns:
        The steps by the module's name, and reasons by the name of a module.
    """
    by_module: dict[str, list[Call]] = {}
    for call in calls:
        by_module.setdefault(call.path, []).append(call)
    found: dict[str, list[Step]] = {}
    reasons: dict[str, str] = {}
    for name, made in by_module.items():
        first, reason = _step(made[0])
        if first is None:
            if reason:
                reasons[name] = reason
            continue
        steps = [_step(call, (first.enter.path, first.leave.path))[0] for call in made]
        if None in steps:
            reasons[name] = "some of its calls are residual and others are not"
        else:
            found[name] = [step for step in steps if step is not None]
    return found, reasons


def _step(call: Call, places: tuple[Path, Path] | None = None) -> tuple[Step | None, str]:
    """Return the stream's way through a call, or why there is none."""
    reason = ""
    for leave in call.left:
        for enter in call.entered:
            if enter.shape != leave.shape or places not in (None, (enter.path, leave.path)):
                continue
            if enter.edge is None or leave.edge is None:
                reason = reason or "no gradient goes through it"
                continue
            found = paths(leave.edge, enter.edge)
            if found.residual:
                return Step(call, enter, leave), ""
            what = f"{found.opaque}, whose derivative torch does not know" if found.opaque else ""
            reason = reason or (f"it hands its input through {what}" if what else "its output is not its input + …")
    return None, reason


def blocks_of(found: Mapping[str, list[Step]], refused: Iterable[str], model: nn.Module) -> list[Step]:
    """Choose the blocks among the residual modules, of which some stand inside others, and return their steps.

    A module that does no more than call residual ones in turn is a stage, and they are the blocks; unless it stands in
    a list of its like, which hand one stream of one shape on. In all other cases the outer one is the block. What
    stands inside a layer that transformers marks as one, and that keeps its shape but is not residual, is no stream.

    Args:
        found: the residual modules.
        refused: names of modules that keep a shape and are not residual.
        model: holds them.
    """
    chosen: dict[str, list[Step]] = {}

    def pick(names: list[str]) -> None:
        for name in names:
            if any(name.startswith(f"{other}.") for other in names if other != name) or _is_lent(name, names):
                continue
            inner = [other for other in found if other.startswith(f"{name}.")]
            if inner and _is_stage(found[name][0], [found[other] for other in inner]) and not _is_layer(name):
                pick(inner)
            else:
                chosen[name] = found[name]

    def _is_lent(name: str, names: list[str]) -> bool:
        """Say whether a module stands outside of the others, and is called by them alone, as a part that they share."""
        others = [step.call for other in names if other != name for step in found[other]]
        return all(any(call.holds(step.call) for call in others) for step in found[name])

    def _is_layer(name: str) -> bool:
        if type(model.get_submodule(name)) is nn.Sequential:
            return False
        parent = model.get_submodule(name.rpartition(".")[0])
        if not isinstance(parent, LISTS) or len(parent) < 2:
            return False
        prefix = name.rpartition(".")[0]
        siblings = [f"{prefix}.{key}" if prefix else key for key, _ in parent.named_children()]
        if not all(other in found for other in siblings):
            return False
        steps = sorted((step for other in siblings for step in found[other]), key=lambda step: step.call.span)
        return len({step.enter.shape for step in steps}) == 1 and _in_turn(steps)

    closed = [name for name in refused if is_marked(model.get_submodule(name))]
    pick([name for name in found if not any(name.startswith(f"{other}.") for other in closed)])
    return sorted((step for steps in chosen.values() for step in steps), key=lambda step: step.call.span)


def _is_stage(outer: Step, inner: list[list[Step]]) -> bool:
    """Say whether a module adds nothing to the stream but what residual modules inside it add."""
    inside = [step for steps in inner for step in steps if outer.call.holds(step.call)]
    tops = [step for step in inside if not any(other.call.holds(step.call) for other in inside)]
    tops.sort(key=lambda step: step.call.span)
    if not tops:
        return False
    whole = _in_turn(tops) and paths(outer.end, tops[-1].end).plain
    return whole and paths(tops[0].source, outer.source).plain


def _in_turn(steps: list[Step]) -> bool:
    """Say whether each one reads what the one before it left, at most normalised."""
    return all(paths(later.source, earlier.end).plain for earlier, later in pairwise(steps))


def stacks_of(steps: Sequence[Step]) -> list[Stack]:
    """Part steps into streams: a step belongs to the stream whose last block its own stream was computed from.

    A stream that leaves another one in its course, and to whose end that one's end leads in turn, is no other: as in a
    network that goes around some of its blocks and takes up what they computed.
    """
    stacks: list[Stack] = []
    for step in steps:
        for stack in reversed(stacks):
            if depends(step.source, stack.steps[-1].end):
                stack.steps.append(step)
                break
        else:
            stacks.append(Stack([step]))
    whole: list[Stack] = []
    for stack in stacks:
        for other in whole:
            if _leaves_and_meets(stack, other):
                other.steps = sorted(other.steps + stack.steps, key=lambda step: step.call.span)
                break
        else:
            whole.append(stack)
    merged: dict[tuple[str, ...], Stack] = {}
    for stack in whole:  # one stack that is called for several inputs is one
        merged.setdefault(tuple(stack.blocks), Stack()).steps.extend(stack.steps)
    return list(merged.values())


def _leaves_and_meets(stack: Stack, other: Stack) -> bool:
    """Say whether a stream begins at a block of another one, and ends with what the other's end leads to."""
    if not depends(stack.steps[-1].end, other.steps[-1].end):
        return False
    return any(depends(stack.steps[0].source, step.end) for step in other.steps)
