"""The width of the blocks' stream, and the mixer and the feed-forward inside them, where they can be proved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from .trace import Call

__all__ = ["MIXERS", "MLPS", "leaves_and_parts", "part_of", "width_dimension", "within"]

MIXERS = ("attn", "attention", "self_attn", "self_attention", "mixer", "mamba", "token_mixer", "linear_attn")
MLPS = ("mlp", "feed_forward", "ffn", "ff", "block_sparse_moe", "moe", "channel_mixer")


def leaves_and_parts(blocks: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Return what has to be watched inside blocks: modules with parameters of their own, and those with known names."""
    found: dict[str, nn.Module] = {}
    for name, block in blocks.items():
        for path, module in block.named_modules():
            if _sizes(module) or _typed(module) is not None or path in MIXERS or path in MLPS:
                found[f"{name}.{path}" if path else name] = module
    return found


def within(name: str, calls: Sequence[Call]) -> list[Call]:
    """Return the calls of a module and of what it holds."""
    return [call for call in calls if call.path == name or call.path.startswith(f"{name}.")]


def part_of(
    names: Sequence[str], blocks: Mapping[str, int], calls: Sequence[Call], channels: int, rows: int
) -> str | None:
    """Return the first name under which every block has a part that maps tensors of the stream's width onto themselves.

    Args:
        names: where such a part often stands.
        blocks: the width of each, by name.
        calls: what happened inside them.
        channels: which dimension is the width.
        rows: of the batch, which stand in front.
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

    Args:
        shape: of the stream.
        calls: of modules with parameters of their own, inside the block.
    """
    if len(shape) == 2:
        return -1
    readers = [call for call in calls if any(value.shape == shape for value in call.entered)]
    for call in readers:
        if (dimension := _typed(call.module)) is not None:
            return dimension
    for call in readers:
        if not list(call.module.children()) and len(counted := _counted(call.module, shape)) == 1:
            return counted.pop()
    # nothing reads the stream as it is; then what reads one of its dimensions, then norms, then layers of torch
    votes = {
        d
        for call in calls
        if not list(call.module.children())
        for d in (_counted(call.module, shape) if _typed(call.module) is None else {_typed(call.module)})
        if d is not None and any(len(value.shape) > 1 and value.shape[d] == shape[d] for value in call.entered)
    }
    votes = votes or {d for call in calls if _is_norm(call.module) for d in _counted(call.module, shape)}
    votes = votes or {d for call in calls if _typed(call.module) is not None for d in _counted(call.module, shape)}
    return votes.pop() if len(votes) == 1 else None


def _sizes(module: nn.Module) -> list[tuple[int, ...]]:
    """Return the shapes of a module's own parameters."""
    return [tuple(parameter.shape) for parameter in module.parameters(recurse=False)]


def _is_norm(module: nn.Module) -> bool:
    return bool(_sizes(module)) and all(len(size) == 1 for size in _sizes(module))


def _typed(module: nn.Module) -> int | None:
    """Return the dimension that a layer of torch counts features in."""
    if isinstance(module, (nn.Linear, nn.MultiheadAttention)):
        return -1
    channels_first = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    norms = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
    return 1 if isinstance(module, (*channels_first, *norms, nn.SyncBatchNorm, nn.GroupNorm)) else None


def _counted(module: nn.Module, shape: tuple[int, ...]) -> set[int]:
    """Return the dimensions of a stream that a layer's own parameters have the size of."""
    sizes = {size for sizes in _sizes(module) for size in sizes}
    return {dimension for dimension in (-1, 1) if shape[dimension] in sizes and shape[-1] != shape[1]}
