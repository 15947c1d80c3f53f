"""What the autograd graph tells of one call.

A module is residual if from what leaves it to what entered it leads a path of additions of something that depends on
what entered, and besides them only of what keeps features in their places: reshaping, constant factors, norms and
element-wise activations. That is the derivative I + g'(z) of z + g(z), read off exactly, whatever weights and input.
Convolutions, products of matrices, gates and pooling end a path, so a plain or a dense ConvNet has none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.autograd.function import BackwardCFunction

__all__ = ["Edge", "Paths", "depends", "edge_of", "paths"]

Edge = tuple[Any, int]  # a node of the graph, and which of its outputs

_PLACES = (
    "View",
    "UnsafeView",
    "ReshapeAlias",
    "Reshape",
    "Permute",
    "Transpose",
    "T",
    "MT",
    "Clone",
    "Alias",
    "ToCopy",
    "Contiguous",
    "Expand",
    "Squeeze",
    "Unsqueeze",
    "Slice",
    "Select",
    "Split",
    "SplitWithSizes",
    "SafeSplit",
    "Chunk",
    "Unbind",
    "Narrow",
    "Roll",
    "Flip",
    "AsStrided",
    "ConstantPadNd",
    "Unfold",
    "MaskedFill",
    "Movedim",
    "Flatten",
    "Unflatten",
    "Cat",
    "Stack",
    "Where",
    "Identity",
    "LiftFresh",
    "Detach",
    "Index",
    "IndexSelect",
    "UnsafeSplit",
    "ToDtype",
    "ConvertElementType",
    "Im2Col",
    "MaskedScatter",
    "Clamp",
    "NanToNum",
)
_NORMS = (
    "NativeLayerNorm",
    "NativeGroupNorm",
    "NativeBatchNorm",
    "CudnnBatchNorm",
    "MiopenBatchNorm",
    "FusedRmsNorm",
    "RmsNorm",
    "BatchNorm",
    "LayerNorm",
    "GroupNorm",
    "NativeDropout",
    "NativeBatchNormLegit",
    "NativeBatchNormLegitNoTraining",
    "BatchNormImpl",
    "BatchNormImplIndex",
)
_ACTIVATIONS = (
    "Relu",
    "Relu6",
    "Hardtanh",
    "LeakyRelu",
    "PreluKernel",
    "Prelu",
    "Elu",
    "Silu",
    "Gelu",
    "Mish",
    "Hardswish",
    "Softplus",
    "Threshold",
    "RreluWithNoise",
)
LANES = 4  # at most, in a stream of several lanes; fewer than a probe has tokens
_FIRST_IS_CARRIED = frozenset(_NORMS + _ACTIVATIONS)
_ANY_IS_CARRIED = frozenset(_PLACES)
_SUMS_ONTO_THE_FIRST = frozenset(("Addmm", "Baddbmm", "Addbmm", "Addmv", "Addcmul", "Addcdiv", "Sub", "IndexAdd"))


@dataclass(frozen=True)
class Paths:
    """What leads from what leaves a module to what entered.

    Attributes:
        residual: a path on which something that depends on what entered is added.
        plain: a path without such an addition: the stream is handed on, or at most normalised.
        opaque: an operation whose derivative torch does not know, on the only way there is; "" if there is none.
    """

    residual: bool = False
    plain: bool = False
    opaque: str = ""


def edge_of(tensor: Tensor) -> Edge | None:
    """Return where the graph of a tensor begins, None for one without."""
    return None if tensor.grad_fn is None else (tensor.grad_fn, tensor.output_nr)


def paths(left: Edge, entered: Edge) -> Paths:
    """Follow the stream back from where it left to where it entered."""
    oldest = _age(entered[0])
    known: dict[Any, bool] = {}
    residual = plain = False
    opaque = ""
    seen: set[tuple[Any, int, bool]] = set()
    pending = [(left, False)]
    while pending:
        (node, number), added = pending.pop()
        if (node, number, added) in seen:
            continue
        seen.add((node, number, added))
        if node is entered[0] and number == entered[1]:
            residual, plain = residual or added, plain or not added
            continue
        if _age(node) < oldest:
            continue
        carried = _carried(node, entered, known)
        if carried is None:
            opaque = opaque or (_name(node) if depends((node, 0), entered, known) else "")
            continue
        pending.extend((edge, added or adds) for edge, adds in carried if edge[0] is not None)
    return Paths(residual, plain, opaque if not residual else "")


def depends(left: Edge, entered: Edge, known: dict[Any, bool] | None = None) -> bool:
    """Say whether what left was computed from what entered.

    Args:
        left: a later point of the graph.
        entered: an earlier one.
        known: by node, what is known about it; filled in.
    """
    known = {} if known is None else known
    oldest = _age(entered[0])
    if left == entered:
        return True
    order: list[tuple[Any, bool]] = [(left[0], False)]
    while order:
        node, done = order.pop()
        if done:
            known[node] = any(_leads(edge, entered, known) for edge in node.next_functions)
        elif node not in known:
            known[node] = False
            if _age(node) >= oldest:
                order.append((node, True))
                order.extend((child, False) for child, _ in node.next_functions if child is not None)
    return known[left[0]]


def _leads(edge: Edge, entered: Edge, known: dict[Any, bool]) -> bool:
    return edge[0] is not None and ((edge[0] is entered[0] and edge[1] == entered[1]) or known.get(edge[0], False))


def _carried(node: Any, entered: Edge, known: dict[Any, bool]) -> list[tuple[Edge, bool]] | None:
    """Return the operands that an operation hands on, and whether it adds something that depends on what entered.

    None says that torch does not know the operation.
    """
    if isinstance(node, BackwardCFunction) or "DifferentiableGraph" in node.name():
        return None
    name, operands = _name(node), list(node.next_functions)

    def reach(indices: list[int]) -> bool:
        edges = [operands[i] for i in indices if operands[i][0] is not None]
        return any(edge == entered or depends(edge, entered, known) for edge in edges)

    others = [[i for i in range(len(operands)) if i != index] for index in range(len(operands))]
    if name in {"Add", "CopySlices"}:  # the second is an addition in place to a view
        return [(edge, reach(others[i])) for i, edge in enumerate(operands)]
    if name in _SUMS_ONTO_THE_FIRST:
        return [(operands[0], reach(others[0]))]
    if name in {"Mul", "Div"}:
        sides = range(len(operands)) if name == "Mul" else range(1)
        return [(operands[i], False) for i in sides if not reach(others[i]) or _one_factor(operands, i)]
    if name == "Bmm":
        return [(operands[1], False)] if _mixes_lanes(operands) else []
    if name in _FIRST_IS_CARRIED:
        return [(operands[0], False)]
    return [(edge, False) for edge in operands] if name in _ANY_IS_CARRIED else []


def _one_factor(operands: list[Edge], index: int) -> bool:
    """Say whether the other operand is one number for a whole token or map, as in a norm."""
    (node, number), (other, other_number) = operands[index], operands[1 - index]
    if node is None or other is None:
        return False
    shape, factor = _shape(node, number), _shape(other, other_number)
    return len(shape) == len(factor) and (factor[-1] == 1 < shape[-1] or (factor[1:2] == (1,) and shape[1:2] > (1,)))


def _mixes_lanes(operands: list[Edge]) -> bool:
    """Say whether a product mixes a few lanes of a stream, feature by feature, as hyper-connections do (mHC)."""
    (node, number), (other, other_number) = operands
    if node is None or other is None:
        return False
    _, rows, columns = _shape(node, number)
    return rows == columns <= LANES < _shape(other, other_number)[-1]


def _shape(node: Any, number: int) -> tuple[int, ...]:
    return tuple(node._input_metadata[number].shape)


def _age(node: Any) -> int:
    """Return the place of a node in the order in which the graph was made; parameters come last."""
    return int(node._sequence_nr())


def _name(node: Any) -> str:
    """Return an operation's name: `AddBackward0` is Add."""
    name: str = node.name().rpartition("::")[2]
    return name.partition("Backward")[0].lstrip("_")
