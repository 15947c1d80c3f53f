"""Find the residual stream of a model, prove it on a probe, and describe it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from residual_steer.backbone import Backbone, Read, Write, read_stream, write_stream
from residual_steer.errors import SteerError

from .choose import LISTS, Stack, Step, blocks_of, folder, stacks_of, steps_of
from .example import Example, examples, given, kind_of
from .graph import depends, edge_of
from .guard import differentiable, undisturbed
from .parts import MIXERS, MLPS, leaves_and_parts, part_of, width_dimension
from .place import Enter, Layout, Leave, Path, tensors
from .trace import Call, called, is_marked, suspects

__all__ = ["discover"]

DOMINANT = 4  # a stack with so many times the blocks of every other one is the stream


class _NotProvedError(SteerError):
    """A probe ran, and what it showed is no residual stream."""


def discover(model: nn.Module, example: Any = None, *, dominant: bool = True) -> Backbone:
    """Find the residual blocks of a model by running it, and prove them.

    Args:
        model: any module on a real device; afterwards it is as it was.
        example: a batch for it: a tensor, a tuple of arguments or a dict of keywords. None makes a tiny one.
        dominant: whether a stream with many times the blocks of every other one is the one, and the others are left
            out; otherwise several are refused whatever their sizes.

    Returns:
        The description, named "auto".

    Raises:
        SteerError: no input is known that the model runs on, or no residual stream, or several, can be proved.
    """
    with torch.inference_mode(False), torch.random.fork_rng():
        torch.manual_seed(0)
        return _discover(model, example, dominant)


def _discover(model: nn.Module, example: Any, dominant: bool) -> Backbone:
    """Try one input after the other.

    Raises:
        SteerError: none of them proves a stream.
    """
    like, dtype = kind_of(model)
    failed: list[str] = []
    ran: set[tuple[Any, ...]] = set()
    refused: SteerError | None = None
    for made in [given(example)] if example is not None else examples(model):
        if made.kind in ran:
            continue
        probe = made.on(like, dtype)
        try:
            return _Probe(model, probe, dominant).describe()
        except _NotProvedError as error:
            refused = refused or error
            ran.add(made.kind)  # another size would show the same
        except Exception as error:  # a model may fail in any way on an input that is not its own
            failed.append(f"{probe}: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
        if len(failed) == 12:
            break
    if refused is not None:
        raise refused
    tried = f" Tried {failed[0]}" + (f", and {len(failed) - 1} more." if len(failed) > 1 else ".") if failed else ""
    raise SteerError(
        f"auto proves the residual stream by running the model, and {type(model).__name__} did not run on what it was "
        "given. Give a batch: find_backbone(model, example=batch), a tensor, a tuple or a dict; what that returns goes "
        f"to steer(model, ...).{tried}"
    )


class _Probe:
    """One model and one input."""

    def __init__(self, model: nn.Module, example: Example, dominant: bool) -> None:
        self._model, self._example, self._dominant = model, example, dominant

    def describe(self) -> Backbone:
        """Return the description that this input proves.

        Raises:
            SteerError: it proves none.
        """
        with undisturbed(self._model):
            with torch.no_grad():  # first, so that what a model keeps from its first call is not in the graph
                expected = self._run()
            with differentiable(self._model), called(suspects(self._model)) as calls:
                output = self._run()
            stack, left_out = self._stack(calls, output)
            blocks = stack.blocks
            with torch.no_grad(), called(leaves_and_parts(blocks)) as inside:
                self._run()
            backbone = self._backbone(stack, inside, left_out)
            self._prove(backbone, expected)
        return backbone

    def _run(self) -> Any:
        torch.manual_seed(0)
        return self._model(*self._example.args, **self._example.kwargs)

    def _stack(self, calls: Sequence[Call], output: Any) -> tuple[Stack, str]:
        """Return the blocks of the one stream, and words for what else there is.

        Raises:
            _NotProvedError: there is no stream, or there are several.
        """
        found, reasons = steps_of(calls)
        ends = [edge for _, t in tensors(output) if (edge := edge_of(t)) is not None]
        ends += [edge for t in (output,) if isinstance(t, Tensor) and (edge := edge_of(t)) is not None]
        stacks = [
            stack
            for stack in stacks_of(blocks_of(found, reasons, self._model))
            if any(depends(end, stack.steps[-1].end) for end in ends)
        ]
        name = type(self._model).__name__
        if not stacks:
            told = "; ".join(f"{path}: {reason}" for path, reason in list(reasons.items())[:4])
            raise _NotProvedError(
                f"no residual stream was found in {name}: of {len({c.path for c in calls})} modules that could be "
                f"blocks, none returns its input + something of its input on the way to the model's output"
                f"{f' ({told})' if told else ''}."
            )
        lists = {path.rpartition(".")[0] for stack in stacks for path in stack.blocks}
        for path, reason in reasons.items():
            if path.rpartition(".")[0] in lists and is_marked(self._model.get_submodule(path)):
                raise _NotProvedError(f"{path} stands in a list of residual blocks and is none: {reason}.")
        stacks.sort(key=lambda stack: len(stack.blocks), reverse=True)
        joined = self._encoder_decoder(stacks)
        if joined is not None:
            return joined, ""
        if len(stacks) > 1 and not (self._dominant and len(stacks[0].blocks) >= DOMINANT * len(stacks[1].blocks)):
            listed = ", ".join(map(str, stacks))
            place = folder(list(stacks[0].blocks))
            part = place.rpartition(".")[0] or place
            how = f"Steer one of them, for example steer(model.{part}, ...)." if part else "Describe one by hand."
            raise _NotProvedError(
                f"{name} has several residual streams, none of which goes on where another ends: {listed}. {how}"
            )
        return stacks[0], ", ".join(map(str, stacks[1:]))

    def _encoder_decoder(self, stacks: list[Stack]) -> Stack | None:
        """Return encoder and decoder one after the other, where the model says that these are what it has."""
        config = getattr(self._model, "config", None)
        if len(stacks) != 2 or not getattr(config, "is_encoder_decoder", False):
            return None
        encoder, decoder = sorted(stacks, key=lambda stack: stack.steps[0].call.span)
        if not depends(decoder.steps[-1].end, encoder.steps[-1].end):
            return None
        return Stack(encoder.steps + decoder.steps)

    def _backbone(self, stack: Stack, inside: Sequence[Call], left_out: str) -> Backbone:
        """Describe a stack.

        Raises:
            _NotProvedError: rows, width or place of the stream cannot be told.
        """
        first = {step.call.path: step for step in reversed(stack.steps)}
        steps = [first[name] for name in stack.blocks]
        dimensions = [self._dimension(step, inside) for step in steps]
        rows = self._rows(stack.steps)
        mixed = len(set(dimensions)) > 1
        turned = tuple({len(s.enter.shape) for s, d in zip(steps, dimensions, strict=True) if d == 1}) if mixed else ()
        if any((len(s.enter.shape) in turned) != (d == 1) for s, d in zip(steps, dimensions, strict=True) if mixed):
            raise _NotProvedError("the stream has its width now in the second, now in the last of as many dimensions.")
        channels = -1 if mixed else dimensions[0]
        layout = Layout(rows, turned)
        read, write = self._places(steps, layout)
        widths = tuple(s.enter.shape[d] for s, d in zip(steps, dimensions, strict=True))
        by_name = dict(zip(stack.blocks, widths, strict=True))
        return Backbone(
            blocks=list(stack.blocks.values()),
            width=_one(widths),
            mixer=None if turned or rows else part_of(MIXERS, by_name, inside, channels, self._example.rows),
            mlp=None if turned or rows else part_of(MLPS, by_name, inside, channels, self._example.rows),
            read=read,
            write=write,
            channels=channels,
            inplace=any(step.enter.path in step.call.overwrote for step in stack.steps),
            name="auto",
            path=self._path(list(stack.blocks)),
            origin=f"auto: proved on a probe of {self._example}" + (f"; left out: {left_out}" if left_out else ""),
        )

    def _dimension(self, step: Step, inside: Sequence[Call]) -> int:
        """Return which dimension is the width.

        Raises:
            _NotProvedError: that cannot be told.
        """
        name = step.call.path
        own = [call for call in inside if call.path == name or call.path.startswith(f"{name}.")]
        dimension = width_dimension(step.enter.shape, own)
        if dimension is None:
            raise _NotProvedError(
                f"which dimension of the stream {step.enter.shape} in {name} is its width could not be told: no layer "
                "in it that reads the stream counts one of them."
            )
        return dimension

    def _rows(self, steps: Sequence[Step]) -> int:
        """Return which dimension is the batch.

        Raises:
            _NotProvedError: that cannot be told.
        """
        rows = self._example.rows
        for dimension in (0, 1):
            if {step.enter.shape[dimension] for step in steps if len(step.enter.shape) > dimension + 1} == {rows}:
                return dimension
        if rows > 1 and all(step.enter.shape[0] % rows == 0 for step in steps):
            return 0
        raise _NotProvedError(
            f"the stream {steps[0].enter.shape} in {steps[0].call.path} has not the batch's {rows} rows in front."
        )

    def _places(self, steps: Sequence[Step], layout: Layout) -> tuple[Read, Write]:
        """Return how the stream is read and written, alike for all blocks.

        Raises:
            _NotProvedError: it stands in different places.
        """
        entered = {None if _is_default(step) else self._argument(step) for step in steps}
        left = {() if step.leave.path in ((), (0,)) else step.leave.path for step in steps}
        if len(entered) > 1 or len(left) > 1:
            places = {step.enter.path for step in steps}, {step.leave.path for step in steps}
            raise _NotProvedError(f"the stream stands in other places from block to block: {places}.")
        (argument,), (leave,) = entered, left
        plain = layout == Layout()
        path, keyword = argument or ((), None)
        read: Read = read_stream if plain and not path else Enter(path, keyword, layout)
        write: Write = write_stream if plain and not leave else Leave(leave, layout)
        return read, write

    @staticmethod
    def _argument(step: Step) -> tuple[Path, str | None]:
        """Return where the stream enters, and the argument's name in the block's `forward`."""
        key, rest = step.enter.path[0], step.enter.path[1:]
        names = [
            name
            for name, parameter in inspect.signature(step.call.module.forward).parameters.items()
            if parameter.kind in {parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD}
        ]
        if isinstance(key, int):
            return (key, *rest), names[key] if key < len(names) else None
        return (names.index(key) if key in names else key, *rest), key

    def _path(self, names: list[str]) -> str:
        """Return the module that holds all blocks and is no mere list of them, one with a config if there is one."""
        parts = folder(names).split(".")
        above = [".".join(parts[:size]) for size in range(len(parts), -1, -1)]
        modules = [(path, self._model.get_submodule(path)) for path in above]
        proper = [path for path, module in modules if not isinstance(module, LISTS)] or [""]
        return next((path for path, module in modules if hasattr(module, "config")), proper[0])

    def _prove(self, backbone: Backbone, expected: Any) -> None:
        """Run the model through the description: writing the same stream changes nothing, writing another does.

        It does so behind the last block too. Blocks may carry something beside the stream, as TNT's pixels beside
        patches, which nobody reads in the end.

        Raises:
            _NotProvedError: it does not.
        """
        with torch.no_grad():
            same = self._written(backbone, lambda y, z: y.clone())
            moved = self._written(
                backbone, lambda y, z: y + z.abs().amax().nan_to_num().clamp(min=1) * _noise(y), last=True
            )
        if not _equal(same, expected):
            raise _NotProvedError("the model computes something else when its own stream is put in its place.")
        if _equal(moved, expected) and any(bool(t.any()) for _, t in tensors(expected, depth=4)):  # no head of zeros
            raise _NotProvedError(
                "the model computes the same when what leaves its last block is moved, so that this is not its stream."
            )

    def _written(self, backbone: Backbone, f: Any, last: bool = False) -> Any:
        handles = []
        for block, width in [*zip(backbone.blocks, backbone.widths, strict=True)][-1 if last else 0 :]:

            def after(_: nn.Module, args: Any, kwargs: Mapping[str, Any], output: Any, width: int = width) -> Any:
                z = backbone.read(args, kwargs)
                if z.shape[backbone.channels] != width:
                    raise _NotProvedError(f"a block's stream is {tuple(z.shape)}, and its width should be {width}.")
                return backbone.write(output, lambda y: f(y, z))

            handles.append(block.register_forward_hook(after, with_kwargs=True))
        try:
            return self._run()
        finally:
            for handle in handles:
                handle.remove()


def _is_default(step: Step) -> bool:
    """Say whether `read_stream` finds the stream of a call."""
    positions = sorted(value.path[0] for value in step.call.entered if isinstance(value.path[0], int))
    return step.enter.path == ((positions[0],) if positions else ("hidden_states",))


def _noise(like: Tensor) -> Tensor:
    return torch.randn(like.shape, device=like.device).to(like.dtype)


def _one(widths: tuple[int, ...]) -> int | tuple[int, ...]:
    return widths[0] if len(set(widths)) == 1 else widths


def _equal(one: Any, other: Any) -> bool:
    first, second = list(tensors(one, depth=4)), list(tensors(other, depth=4))
    return len(first) == len(second) and all(
        p == q and a.shape == b.shape and torch.equal(a.nan_to_num(), b.nan_to_num())
        for (p, a), (q, b) in zip(first, second, strict=True)
    )
