"""The width of the blocks' stream, and the mixer and the feed-forward inside them, where they can be proved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from .trace import Call

__all__ = ["MIXERS", "MLPS", "leaves_and_parts", "part_of", "width_dimension"]

MIXERS = ("attn", "attention", "self_attn", "self_attention", "mixer", "mamba", "token_mixer", "linear_attn")
MLPS = ("mlp", "feed_forward", "ffn", "ff", "block_sparse_moe", "moe", "channel_mixer")


def leaves_and_parts(blocks: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Return what has to be watched inside blocks: modules with parameters of their own, and those with known names."""
    found: dict[str, nn.Module] = {}
    for name, block in blocks.items():
        for path, module in block.named_modules():
            if module._parameters or path in MIXERS or path in MLPS:
                found[f"{name}.{path}" if path else name] = module
    return found


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
    by_name: dict[str, list[Call]] = {}
    for call in calls:
        by_name.setdefault(call.path, []).append(call)

    def maps(part: str, width: int) -> bool:
        made = by_name.get(part, [])
        shapes = {_shape_through(call) for call in made}
        within = [call for call in calls if call.path == part or call.path.startswith(f"{part}.")]
        return bool(made) and all(
            shape is not None
            and shape[0] % rows == 0
            and shape[channels] == width
            and width_dimension(shape, within) == channels
            for shape in shapes
        )

    for name in names:
        if all(maps(f"{block}.{name}", width) for block, width in blocks.items()):
            return name
    return None


def _shape_through(call: Call) -> tuple[int, ...] | None:
    """Return the shape of what enters first and leaves first, None if these differ."""
    entered = [value for value in call.entered if isinstance(value.path[0], int) and len(value.path) == 1]
    entered += [value for value in call.entered if value.path == ("hidden_states",)]
    left = [value for value in call.left if value.path in ((), (0,))]
    return entered[0].shape if entered and left and entered[0].shape == left[0].shape else None


def width_dimension(shape: tuple[int, ...], calls: Sequence[Call]) -> int | None:
    """Say which dimension of a stream is its width, -1 or 1: the one that the first layers that read it count.

    Args:
        shape: of the stream.
        calls: of modules with parameters of their own, inside the block.

    Returns:
        None if that cannot be told.
    """
    if len(shape) == 2:
        return -1
    readers = [call for call in calls if any(value.shape == shape for value in call.entered)]
    for call in readers:
        if (dimension := _typed(call.module)) is not None:
            return dimension
    for call in readers:
        counted = _counted(call.module, shape)
        if len(counted) == 1 and not list(call.module.children()):
            return counted.pop()
    votes: set[int] = set()  # nothing reads the stream as it is; then what reads one of its dimensions
    for call in calls:
        entered = {value.shape for value in call.entered}
        dimension = _typed(call.module)
        for d in _counted(call.module, shape) if dimension is None else {dimension}:
            if not list(call.module.children()) and any(len(other) > 1 and other[d] == shape[d] for other in entered):
                votes.add(d)
    if not votes:
        votes = {d for call in calls if _is_norm(call.module) for d in _counted(call.module, shape)}
    if not votes:
        votes = {d for call in calls if _typed(call.module) is not None for d in _counted(call.module, shape)}
    return votes.pop() if len(votes) == 1 else None


def _is_norm(module: nn.Module) -> bool:
    return bool(module._parameters) and all(p is None or p.dim() == 1 for p in module._parameters.values())


def _typed(module: nn.Module) -> int | None:
    """Return the dimension that a layer of torch counts features in."""
    if isinstance(module, nn.Linear):
        return -1
    if isinstance(module, (nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase, nn.GroupNorm)):
        return 1
    return None


def _counted(module: nn.Module, shape: tuple[int, ...]) -> set[int]:
    """Return the dimensions of a stream that a layer's own parameters have the size of."""
    sizes = {size for parameter in module._parameters.values() if parameter is not None for size in parameter.shape}
    return {dimension for dimension in (-1, 1) if shape[dimension] in sizes and shape[-1] != shape[1]}
