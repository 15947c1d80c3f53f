"""Find the residual stream of a model, prove it on a probe, and describe it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from residual_steer._undisturbed import watch
from residual_steer.backbone import Backbone, compute_dtype, read_stream, write_stream
from residual_steer.errors import SteerError

from .candidates import Stack, Step, blocks_of, folder, stacks_of, steps_of
from .example import Example, examples, given
from .graph import depends, edge_of
from .place import MIXERS, MLPS, Place, part_of, readers_in, width_dimension, within
from .trace import LISTS, Call, Path, called, differentiable, is_marked, probed, suspects, tensors

__all__ = ["NoStreamError", "discover"]

DOMINANT = 4  # a stack with so many times the blocks of every other one is the stream
TRIES = 12  # inputs on which a model may fail


class NoStreamError(SteerError):
    """A probe ran, and what it showed is no residual stream."""


def discover(model: nn.Module, example: Any = None, *, dominant: bool = True) -> Backbone:
    """Return the stream that a run of a model proves, or raise; if it is `dominant`, small ones may stand beside it."""
    with torch.inference_mode(False), torch.random.fork_rng():
        torch.manual_seed(0)
        kept, name = [*model.parameters(), *model.buffers()], type(model).__name__
        if not kept:
            raise SteerError(f"{name} has no parameters, and so no residual stream to probe.")
        if any(tensor.is_meta for tensor in kept):
            raise SteerError("this model is on the meta device and has no values yet. Materialise it, then steer it.")
        device, dtype = kept[0].device, compute_dtype(model)
        failed: list[str] = []
        ran: set[tuple[Any, ...]] = set()
        refused: NoStreamError | None = None
        for made in [given(example)] if example is not None else examples(model):
            if len(failed) == TRIES:
                break
            if made.kind in ran:
                continue
            probe = made.on(device, dtype)
            try:
                return _Probe(model, probe, dominant).describe()
            except NoStreamError as error:
                refused = refused or error
                ran.add(made.kind)  # another size would show the same
            except Exception as error:  # a model may fail in any way on an input that is not its own
                failed.append(f"{probe}: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
    if refused is not None:
        raise refused
    tried = f" Tried {failed[0]}" + (f", and {len(failed) - 1} more." if len(failed) > 1 else ".") if failed else ""
    raise SteerError(
        f"auto proves the residual stream by running the model, and {name} did not run on what it was "
        "given. Give a batch: find_backbone(model, example=batch), a tensor, a tuple or a dict; what that returns goes "
        f"to steer(model, ...).{tried}"
    )


class _Probe:
    """One model and one input; its methods raise NoStreamError where these prove no stream."""

    def __init__(self, model: nn.Module, example: Example, dominant: bool) -> None:
        self._model, self._example, self._dominant = model, example, dominant

    def describe(self) -> Backbone:
        """Return the description that this input proves."""
        with probed(self._model):
            with torch.no_grad():  # first, so that what a model keeps from its first call is not in the graph
                self._run()
            with differentiable(self._model), called(suspects(self._model)) as calls:
                output = self._run()
            stack, left_out = self._stack(calls, output)
            with torch.no_grad(), called(readers_in(stack.blocks)) as inside:
                self._run()
            backbone = self._backbone(stack, inside, left_out)
            self._prove(backbone)
        return backbone

    def _run(self) -> Any:
        torch.manual_seed(0)
        return self._model(*self._example.args, **self._example.kwargs)

    def _stack(self, calls: Sequence[Call], output: Any) -> tuple[Stack, str]:
        """Return the blocks of the one stream, and words for what else there is."""
        found, reasons = steps_of(calls)
        outputs = [*([output] if isinstance(output, Tensor) else ()), *(tensor for _, tensor in tensors(output))]
        ends = [edge_of(tensor) for tensor in outputs]
        stacks = [
            stack
            for stack in stacks_of(blocks_of(found, reasons, self._model))
            if any(depends(end, stack.steps[-1].leave.edge) for end in ends)
        ]
        name = type(self._model).__name__
        if not stacks:
            listed = "; ".join(f"{path}: {reason}" for path, reason in list(reasons.items())[:4])
            raise NoStreamError(
                f"no residual stream was found in {name}: of {len({c.path for c in calls})} modules that could be "
                f"blocks, none returns its input + something of its input on the way to the model's output"
                f"{f' ({listed})' if listed else ''}."
            )
        lists = {path.rpartition(".")[0] for stack in stacks for path in stack.blocks}
        for path, reason in reasons.items():
            if path.rpartition(".")[0] in lists and is_marked(self._model.get_submodule(path)):
                raise NoStreamError(f"{path} stands in a list of residual blocks and is none: {reason}.")
        stacks.sort(key=lambda stack: len(stack.blocks), reverse=True)
        joined = self._encoder_decoder(stacks)
        if joined is not None:
            return joined, ""
        if len(stacks) > 1 and not (self._dominant and len(stacks[0].blocks) >= DOMINANT * len(stacks[1].blocks)):
            place = folder(stacks[0].blocks)
            part = place.rpartition(".")[0] or place
            how = f"Steer one of them, for example steer(model.{part}, ...)." if part else "Describe one by hand."
            raise NoStreamError(
                f"{name} has several residual streams, none of which goes on where another ends: "
                f"{', '.join(map(str, stacks))}. {how}"
            )
        return stacks[0], ", ".join(map(str, stacks[1:]))

    def _encoder_decoder(self, stacks: list[Stack]) -> Stack | None:
        """Return encoder and decoder one after the other, where the model says that these are what it has."""
        config = getattr(self._model, "config", None)
        if len(stacks) != 2 or not getattr(config, "is_encoder_decoder", False):
            return None
        encoder, decoder = sorted(stacks, key=lambda stack: stack.steps[0].call.span)
        joined = depends(decoder.steps[-1].leave.edge, encoder.steps[-1].leave.edge)
        return Stack(encoder.steps + decoder.steps) if joined else None

    def _backbone(self, stack: Stack, inside: Sequence[Call], left_out: str) -> Backbone:
        """Describe a stack by the rows, the width and the place of its stream."""
        first = {step.call.path: step for step in reversed(stack.steps)}
        steps = [first[name] for name in stack.blocks]
        widths: dict[str, int] = {}
        dimensions: dict[int, set[int]] = {}  # which one is the width, by how many there are
        for step in steps:
            shape = step.enter.shape
            dimension = width_dimension(shape, within(step.call.path, inside))
            if dimension is None:
                raise NoStreamError(
                    f"which dimension of the stream {shape} in {step.call.path} is its width could not be told: "
                    "no layer in it that reads the stream counts one of them."
                )
            widths[step.call.path] = shape[dimension]
            dimensions.setdefault(len(shape), set()).add(dimension)
        every = set().union(*dimensions.values())
        mixed = len(every) > 1
        if mixed and any(len(found) > 1 for found in dimensions.values()):
            raise NoStreamError("the stream has its width now in the second, now in the last of as many dimensions.")
        turned = tuple(number for number, found in dimensions.items() if found == {1}) if mixed else ()
        channels = -1 if mixed else every.pop()
        rows = self._rows(stack.steps)
        place = _place(steps, rows, turned)
        moves = bool(rows or turned)
        mixer, mlp = (
            None if moves else part_of(names, widths, inside, channels, self._example.rows) for names in (MIXERS, MLPS)
        )
        return Backbone(
            blocks=list(stack.blocks.values()),
            width=next(iter(widths.values())) if len(set(widths.values())) == 1 else tuple(widths.values()),
            mixer=mixer,
            mlp=mlp,
            read=place.read if moves or place.enter else read_stream,
            write=place.write if moves or place.leave else write_stream,
            channels=channels,
            inplace=any(step.enter.path in step.call.overwrote for step in stack.steps),
            name="auto",
            path=self._path(stack),
            origin=f"auto: proved on a probe of {self._example}" + (f"; left out: {left_out}" if left_out else ""),
        )

    def _rows(self, steps: Sequence[Step]) -> int:
        """Return which dimension is the batch."""
        rows = self._example.rows
        for dimension in (0, 1):
            if {step.enter.shape[dimension] for step in steps if len(step.enter.shape) > dimension + 1} == {rows}:
                return dimension
        if rows > 1 and all(step.enter.shape[0] % rows == 0 for step in steps):
            return 0
        raise NoStreamError(
            f"the stream {steps[0].enter.shape} in {steps[0].call.path} has not the batch's {rows} rows in front."
        )

    def _path(self, stack: Stack) -> str:
        """Return the module that holds all blocks and is no mere list of them, one with a config if there is one."""
        parts = folder(stack.blocks).split(".")
        above = [".".join(parts[:size]) for size in range(len(parts), -1, -1)]
        modules = {path: self._model.get_submodule(path) for path in above}
        proper = [path for path, module in modules.items() if not isinstance(module, LISTS)] or [""]
        return next((path for path, module in modules.items() if hasattr(module, "config")), proper[0])

    @torch.no_grad()
    def _prove(self, backbone: Backbone) -> None:
        """Run the model through the description: writing the same stream changes nothing, moving the last one does."""
        # as expected counts a run with hooks too, under which torch's own layers take another kernel
        expected, same = (self._written(backbone, f) for f in (lambda y, z: y, lambda y, z: y.clone()))
        if not _equal(same, expected):
            raise NoStreamError("the model computes something else when its own stream is put in its place.")
        moved = self._written(backbone, _moved, last=True)
        # blocks may carry more than their stream, as TNT's pixels beside patches, which nobody reads in the end
        if _equal(moved, expected) and any(bool(t.any()) for _, t in tensors(expected, depth=4)):  # no head of zeros
            raise NoStreamError(
                "the model computes the same when what leaves its last block is moved, so that this is not its stream."
            )

    def _written(self, backbone: Backbone, f: Callable[[Tensor, Tensor], Tensor], *, last: bool = False) -> Any:
        """Run the model with what leaves blocks, or the last one, replaced by f(what leaves, what entered)."""
        widths = dict(zip(backbone.blocks, backbone.widths, strict=True))

        def leave(block: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Any:
            z, width = backbone.read(args, kwargs), widths[block]
            if z.shape[backbone.channels] != width:
                raise NoStreamError(f"a block's stream is {tuple(z.shape)}, and its width should be {width}.")
            return backbone.write(output, lambda y: f(y, z))

        with watch(backbone.blocks[-1:] if last else backbone.blocks, after=leave):
            return self._run()


def _place(steps: Sequence[Step], rows: int, turned: tuple[int, ...]) -> Place:
    """Return where the stream stands, alike for all blocks."""
    entered = {_argument(step) for step in steps}
    left = {() if step.leave.path in ((), (0,)) else step.leave.path for step in steps}
    if len(entered) > 1 or len(left) > 1:
        places = {step.enter.path for step in steps}, {step.leave.path for step in steps}
        raise NoStreamError(f"the stream stands in other places from block to block: {places}.")
    ((enter, keyword),), (leave,) = entered, left
    return Place(enter, keyword, leave, rows, turned)


def _argument(step: Step) -> tuple[Path, str | None]:
    """Return where the stream enters, and the argument's name in the block's `forward`; () is `read_stream`'s place."""
    positions = sorted(value.path[0] for value in step.call.entered if isinstance(value.path[0], int))
    if step.enter.path == ((positions[0],) if positions else ("hidden_states",)):
        return (), None
    key, *rest = step.enter.path
    names = [
        name
        for name, parameter in inspect.signature(step.call.module.forward).parameters.items()
        if parameter.kind in {parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD}
    ]
    if isinstance(key, int):
        return (key, *rest), names[key] if key < len(names) else None
    return (names.index(key) if key in names else key, *rest), key


def _moved(y: Tensor, z: Tensor) -> Tensor:
    noise = torch.randn(y.shape, device=y.device).to(y.dtype)
    return y + z.abs().amax().nan_to_num().clamp(min=1) * noise


def _equal(one: Any, other: Any) -> bool:
    first, second = list(tensors(one, depth=4)), list(tensors(other, depth=4))
    return len(first) == len(second) and all(
        p == q and a.shape == b.shape and torch.equal(a.nan_to_num(), b.nan_to_num())
        for (p, a), (q, b) in zip(first, second, strict=True)
    )
