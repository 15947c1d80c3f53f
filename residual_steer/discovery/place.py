"""Where the stream stands: in a block's call, in what the block returns, and which of its dimensions is the width.

A `Place` is a plain value, not a closure, so that copies and pickles of a steered model carry it along.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from residual_steer.backbone import read_stream, write_stream
from residual_steer.errors import SteerError
from residual_steer.stream import dense, moved

from .trace import Call, Path

__all__ = ["MIXERS", "MLPS", "Place", "part_of", "readers_in", "width_dimension", "within"]

MIXERS = ("attn", "attention", "self_attn", "self_attention", "mixer", "mamba", "token_mixer", "linear_attn")
MLPS = ("mlp", "feed_forward", "ffn", "ff", "block_sparse_moe", "moe", "channel_mixer")
_COUNT_LAST = (nn.Linear, nn.MultiheadAttention)
_COUNT_SECOND = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
    *(nn.SyncBatchNorm, nn.GroupNorm),
)


@dataclass(frozen=True)
class Place:
    """Where the stream of a probed model stands; its methods are `Backbone.read` and `Backbone.write`."""

    enter: Path = ()  # an argument, by position or keyword, then positions inside it; () is where `read_stream` looks
    keyword: str | None = None  # what the argument is called where a call names it
    leave: Path = ()  # positions or keys in what a block returns; () is where `write_stream` looks
    rows: int = 0  # which dimension is the batch, which `read` moves to the front
    turned: tuple[int, ...] = ()  # numbers of dimensions at which the width stands second; `read` moves it to the end

    def read(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        """Return the stream that enters, or raise if the call has no tensor there."""
        if not self.enter:
            return self._turn(read_stream(args, kwargs))
        given: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
        key = self.keyword if self.keyword is not None and self.keyword in given else self.enter[0]
        return self._turn(dense(_at(given, (key, *self.enter[1:]), "entered")))

    def write(self, output: Any, f: Callable[[Tensor], Tensor]) -> Any:
        """Return the output with its stream z replaced by f(z), or raise if it has no tensor there."""

        def turned(z: Tensor) -> Tensor:
            new = f(self._turn(z))
            new = new.movedim(-1, 1) if new.dim() in self.turned else new
            return new.movedim(0, self.rows) if self.rows else new

        if not self.leave:
            return write_stream(output, turned)
        return _replaced(output, self.leave, moved(_at(output, self.leave, "left"), turned))

    def _turn(self, z: Tensor) -> Tensor:
        z = z.movedim(self.rows, 0) if self.rows else z
        return z.movedim(1, -1) if z.dim() in self.turned else z


def _at(tree: Any, path: Path, went: str) -> Tensor:
    """Return the stream at a place, or raise if a call is not like the one of the probe."""
    found = tree
    for key in path:
        try:
            found = found[key]
        except (KeyError, IndexError, TypeError):
            found = None
    if not isinstance(found, Tensor):
        raise SteerError(
            f"the stream {went} these blocks as {''.join(f'[{key!r}]' for key in path)} when they were probed; this "
            f"call has no tensor there, in a {type(tree).__name__}. Call the model as it was probed, or give "
            "find_backbone(model, example=batch) such a batch."
        )
    return found


def _replaced(tree: Any, path: Path, value: Tensor) -> Any:
    if not path:
        return value
    key, new = path[0], _replaced(tree[path[0]], path[1:], value)
    if isinstance(tree, Mapping):
        changed = copy.copy(tree)
        changed[key] = new  # type: ignore[index]
        return changed
    items = list(tree)
    items[int(key)] = new
    return type(tree)(*items) if hasattr(tree, "_fields") else type(tree)(items)


def readers_in(blocks: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Return what has to be watched inside blocks: modules with parameters of their own, and those with known names."""
    return {
        f"{name}.{path}" if path else name: module
        for name, block in blocks.items()
        for path, module in block.named_modules()
        if _sizes(module) or _typed(module) is not None or path in MIXERS or path in MLPS
    }


def within(name: str, calls: Sequence[Call]) -> list[Call]:
    """Return the calls of a module and of what it holds."""
    return [call for call in calls if call.path == name or call.path.startswith(f"{name}.")]


def part_of(
    names: Sequence[str], blocks: Mapping[str, int], calls: Sequence[Call], channels: int, rows: int
) -> str | None:
    """Return the first of `names` under which every block has a part that maps the stream's shape onto itself.

    `blocks` has the width of each by name; `calls` is what happened in them, and a call begins with `rows` rows.
    """

    def maps(part: str, width: int) -> bool:
        inside = within(part, calls)
        shapes = {_shape_through(call) for call in inside if call.path == part}
        return bool(shapes) and all(
            shape is not None
            and shape[0] % rows == 0
            and shape[channels] == width
            and width_dimension(shape, inside) == channels
            for shape in shapes
        )

    return next(
        (name for name in names if all(maps(f"{block}.{name}", width) for block, width in blocks.items())), None
    )


def _shape_through(call: Call) -> tuple[int, ...] | None:
    """Return the shape of what enters first and leaves first, None if these differ."""
    entered = [value for value in call.entered if isinstance(value.path[0], int) and len(value.path) == 1]
    entered += [value for value in call.entered if value.path == ("hidden_states",)]
    left = [value for value in call.left if value.path in ((), (0,))]
    return entered[0].shape if entered and left and entered[0].shape == left[0].shape else None


def width_dimension(shape: tuple[int, ...], calls: Sequence[Call]) -> int | None:
    """Return which dimension of a stream is its width, -1, 1 or None: the one that the first layers to read it count.

    `calls` are of modules inside the block that have parameters of their own.
    """
    if len(shape) == 2:
        return -1
    readers = [call.module for call in calls if any(value.shape == shape for value in call.entered)]
    if typed := [dimension for dimension in map(_typed, readers) if dimension is not None]:
        return typed[0]
    for reader in readers:
        if not list(reader.children()) and len(counted := _counted(reader, shape)) == 1:
            return counted.pop()
    # nothing reads the stream as it is; then what reads one of its dimensions, then norms, then layers of torch
    votes = {
        d
        for call in calls
        if not list(call.module.children())
        for d in (_counted(call.module, shape) if _typed(call.module) is None else {_typed(call.module)})
        if d is not None and any(len(value.shape) > 1 and value.shape[d] == shape[d] for value in call.entered)
    }
    norms = [call.module for call in calls if {len(size) for size in _sizes(call.module)} == {1}]
    for modules in (norms, [call.module for call in calls if _typed(call.module) is not None]):
        votes = votes or {dimension for module in modules for dimension in _counted(module, shape)}
    return votes.pop() if len(votes) == 1 else None


def _sizes(module: nn.Module) -> list[tuple[int, ...]]:
    """Return the shapes of a module's own parameters."""
    return [tuple(parameter.shape) for parameter in module.parameters(recurse=False)]


def _typed(module: nn.Module) -> int | None:
    """Return the dimension that a layer of torch counts features in."""
    return -1 if isinstance(module, _COUNT_LAST) else 1 if isinstance(module, _COUNT_SECOND) else None


def _counted(module: nn.Module, shape: tuple[int, ...]) -> set[int]:
    """Return the dimensions of a stream that a layer's own parameters have the size of."""
    sizes = {size for sizes in _sizes(module) for size in sizes}
    return {dimension for dimension in (-1, 1) if shape[dimension] in sizes and shape[-1] != shape[1]}
