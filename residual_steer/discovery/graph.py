"""What the autograd graph tells of one call: whether a module hands its input on, and adds to it.

Fenced: `_sequence_nr` and `_input_metadata` of a graph's node are private to torch. Tried on torch 2.6 to 2.15.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.autograd.function import BackwardCFunction

__all__ = ["Edge", "Paths", "depends", "edge_of", "paths"]

Edge = tuple[Any, int]  # a node of the graph, None for a tensor without one, and which of its outputs

LANES = 4  # at most, in a stream of several lanes; fewer than a probe has tokens

# Operations by what they hand on unmixed: each of their operands, the first one, or the first one with a sum onto it.
_EACH, _FIRST, _ONTO_FIRST = (
    frozenset(names.split())
    for names in (
        "View UnsafeView ReshapeAlias Reshape Permute Transpose T MT Clone Alias ToCopy Contiguous Expand Squeeze "
        "Unsqueeze Slice Select Split SplitWithSizes SafeSplit UnsafeSplit Chunk Unbind Narrow Roll Flip AsStrided "
        "ConstantPadNd Unfold MaskedFill MaskedScatter Movedim Flatten Unflatten Cat Stack Where Identity LiftFresh "
        "Detach Index IndexSelect ToDtype ConvertElementType Im2Col Clamp NanToNum",
        "NativeLayerNorm NativeGroupNorm NativeBatchNorm NativeBatchNormLegit NativeBatchNormLegitNoTraining BatchNorm "
        "BatchNormImpl BatchNormImplIndex CudnnBatchNorm MiopenBatchNorm LayerNorm GroupNorm RmsNorm FusedRmsNorm "
        "NativeDropout Relu Relu6 Hardtanh LeakyRelu Prelu PreluKernel Elu Silu Gelu Mish Hardswish Softplus Threshold "
        "RreluWithNoise",
        "Addmm Baddbmm Addbmm Addmv Addcmul Addcdiv Sub IndexAdd",
    )
)


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


def edge_of(tensor: Tensor) -> Edge:
    """Return where the graph of a tensor begins."""
    return tensor.grad_fn, tensor.output_nr


def paths(left: Edge, entered: Edge) -> Paths:
    """Follow the stream back from where it left to where it entered.

    A module is residual if a path leads there of additions of something that depends on what entered, and besides them
    only of what keeps features in their places: reshaping, constant factors, norms, element-wise activations. That is
    the derivative I + g'(z) of z + g(z), read off exactly, whatever weights and input. Convolutions, matrix products,
    gates and pooling end a path, so a plain or a dense ConvNet has none.
    """
    oldest = _age(entered[0])
    known: dict[Any, bool] = {}
    residual = plain = False
    opaque = ""
    seen: set[tuple[Any, int, bool]] = set()
    pending = [(left, False)]
    while pending:
        (node, number), added = pending.pop()
        if node is None or (node, number, added) in seen:
            continue
        seen.add((node, number, added))
        if (node, number) == entered:
            residual, plain = residual or added, plain or not added
        elif _age(node) >= oldest:
            carried = _carried(node, entered, known)
            if carried is None and not opaque and depends((node, 0), entered, known):
                opaque = _name(node)
            pending.extend((edge, added or adds) for edge, adds in carried or ())
    return Paths(residual, plain, opaque if not residual else "")


def depends(left: Edge, entered: Edge, known: dict[Any, bool] | None = None) -> bool:
    """Return whether what left was computed from what entered; `known`, by node, is filled in."""
    if left == entered:
        return True
    known = {} if known is None else known
    oldest = _age(entered[0])
    order: list[tuple[Any, bool]] = [(left[0], False)]
    while order:
        node, done = order.pop()
        if done:
            known[node] = any(edge == entered or known.get(edge[0], False) for edge in node.next_functions)
        elif node not in known:
            known[node] = False
            if node is not None and _age(node) >= oldest:
                order.append((node, True))
                order.extend((child, False) for child, _ in node.next_functions)
    return known[left[0]]


def _carried(node: Any, entered: Edge, known: dict[Any, bool]) -> list[tuple[Edge, bool]] | None:
    """Return the operands that an operation hands on, and whether each gets something added; None if unknown."""
    if isinstance(node, BackwardCFunction) or "DifferentiableGraph" in node.name():
        return None
    name, operands = _name(node), list(node.next_functions)

    def reach_besides(index: int) -> bool:
        """Return whether an operand other than this one depends on what entered."""
        return any(depends(edge, entered, known) for i, edge in enumerate(operands) if i != index)

    if name in {"Add", "CopySlices"}:  # the second is an addition in place to a view
        return [(edge, reach_besides(i)) for i, edge in enumerate(operands)]
    if name in _ONTO_FIRST:
        return [(operands[0], reach_besides(0))]
    if name in {"Mul", "Div"}:
        sides = range(len(operands)) if name == "Mul" else range(1)
        return [(operands[i], False) for i in sides if not reach_besides(i) or _one_factor(operands, i)]
    if name == "Bmm":
        return [(operands[1], False)] if _mixes_lanes(operands) else []
    if name in _FIRST:
        return [(operands[0], False)]
    return [(edge, False) for edge in operands] if name in _EACH else []


def _one_factor(operands: list[Edge], index: int) -> bool:
    """Return whether the other operand is one number for a whole token or map, as in a norm."""
    shape, factor = _shape(operands[index]), _shape(operands[1 - index])
    if not shape or len(shape) != len(factor):
        return False
    return factor[-1] == 1 < shape[-1] or (factor[1:2] == (1,) and shape[1:2] > (1,))


def _mixes_lanes(operands: list[Edge]) -> bool:
    """Return whether a product mixes a few lanes of a stream, feature by feature, as hyper-connections do (mHC)."""
    weights, stream = map(_shape, operands)
    return len(weights) == len(stream) == 3 and weights[1] == weights[2] <= LANES < stream[2]


def _shape(edge: Edge) -> tuple[int, ...]:
    """Return the shape of what a node gave, () for none."""
    node, number = edge
    return () if node is None else tuple(node._input_metadata[number].shape)


def _age(node: Any) -> int:
    """Return the place of a node in the order in which the graph was made; parameters come last."""
    return int(node._sequence_nr())


def _name(node: Any) -> str:
    """Return an operation's name: `AddBackward0` is Add."""
    name: str = node.name().rpartition("::")[2]
    return name.partition("Backward")[0].lstrip("_")
