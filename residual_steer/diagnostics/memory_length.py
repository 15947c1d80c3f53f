"""How far back a state-space model remembers: the counterpart of attention entropy where there is no attention.

Δ is what `softplus` gives inside a mixer, limits put on it included. It is looked at where it is computed: functions in
the families' files would be seven formulas, with norms, multipliers and orders of heads that releases change.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from residual_steer._batches import Batch, require_finite
from residual_steer._undisturbed import changed, watch
from residual_steer.backbone import Backbone, read_stream
from residual_steer.errors import SteerError

from ._moments import Sums, exact
from ._results import Axes, Figure, Table, layer_table, lines
from .compare import SIDES, Pair, compare, places, require_tokens

__all__ = ["MemoryLength", "memory_length"]

_QUARTILES = {"low": ("lower quartile", 0.25), "middle": ("median", 0.5), "high": ("upper quartile", 0.75)}
_FUSED = ("use_fast_path", "use_mem_eff_path")  # of `mamba_ssm`, whose fused functions show nothing


@dataclass(frozen=True, eq=False)
class MemoryLength:
    """Effective memory lengths, in tokens. A layer is an SSM, in the order of the blocks.

    A state h of a selective SSM decays by h_t = exp(Δ_t·A)·h_{t−1} + …; Δ_t depends on the token, A < 0 does not. Its
    memory length is τ = −1 / mean_t(Δ_t·A), the mean being over all tokens of the data: over τ tokens of average Δ a
    state falls to 1/e.

    Attributes:
        blocks: the block of every layer: in a hybrid not every one has an SSM.
        frozen_states, adapted_states: τ of every state, `(layers, channels, states)`; in Mamba-2 channels are heads,
            with one state.
        frozen_step, adapted_step: the average Δ, `(layers, channels)`.
        equal: of every layer, whether both models had equal Δ, bit for bit, and equal A.
        tokens: how many were averaged over.
    """

    blocks: tuple[int, ...]
    frozen_states: Tensor
    adapted_states: Tensor
    frozen_step: Tensor
    adapted_step: Tensor
    equal: tuple[bool, ...]
    tokens: int

    @property
    def frozen(self) -> Tensor:
        """The memory length of each channel, that of its slowest state, `(layers, channels)`."""
        return self.frozen_states.amax(2)

    @property
    def adapted(self) -> Tensor:
        """The same of the adapted model."""
        return self.adapted_states.amax(2)

    @property
    def change(self) -> Tensor:
        """The median over channels of adapted / frozen, `(layers,)`: 1 is no change, 2 remembers twice as far."""
        return (self.adapted / self.frozen).median(1).values

    @property
    def untouched(self) -> int:
        """How many layers, from the first, decay exactly as in the frozen model."""
        return [*self.equal, False].index(False)

    def table(self) -> Table:
        """Return a row for every layer, with quartiles over channels."""
        columns: dict[str, tuple[str, Tensor | list[str]]] = {
            f"{side}_{key}": (f"{head}, {side}, tokens", values.quantile(share, dim=1))
            for side, values in zip(SIDES, (self.frozen, self.adapted), strict=True)
            for key, (head, share) in _QUARTILES.items()
        }
        columns["change"] = "adapted / frozen", self.change
        columns["equal"] = "equal decay", ["yes" if same else "no" for same in self.equal]
        note = (
            f"Of the slowest state of each of {self.frozen.shape[1]} channels, over {self.tokens} tokens; equal in the "
            f"first {self.untouched} of {len(self.blocks)} layers."
        )
        return layer_table("Effective memory length", self.blocks, columns, note)

    def plot(self, ax: Axes | None = None) -> Figure:
        """Draw the median of the channels over the layers."""
        series = {"frozen": self.frozen.median(1).values, "adapted": self.adapted.median(1).values}
        label = "memory length, median of channels, tokens"
        return lines(ax, "Effective memory length by layer", "layer", label, series, log=True)


def memory_length(model: nn.Module, loader: Iterable[Any], *, reference: nn.Module | None = None) -> MemoryLength:
    """Measure how far back each state of a Mamba remembers, frozen against adapted.

    That is Mamba, Mamba-2 and FalconMamba of transformers, the SSMs in its hybrids, and those of `mamba_ssm` where its
    reference functions run; layers of a gated DeltaNet (Qwen3-Next) are measured by their gate, without what the delta
    rule takes away. A is −exp(`A_log`); Δ is read where a mixer computes it, behind softplus and the limits of Mamba-2.
    Compiled CUDA kernels compute it inside themselves: on a GPU that has them, move the model to the CPU for this.

    Raises:
        SteerError: besides what all raise, a Δ that was not seen, layers of different shapes, or no state that decays:
            attention has an entropy.
    """
    sums = Sums()
    with compare(model, reference) as pair:
        for batch in pair.batches(loader):
            found = {side: _steps(pair, side, batch) for side in SIDES}
            shapes = [tuple(step.decay.shape) for steps in found.values() for step in steps]
            before, after = map(len, found.values())
            if len(set(shapes)) > 1 or before != after:
                raise SteerError(
                    f"memory lengths are compared layer by layer and state by state; there are {before} and {after} "
                    f"SSMs, with (channels, states) of {', '.join(map(str, dict.fromkeys(shapes)))}."
                )
            for layer, (one, other) in enumerate(zip(*found.values(), strict=True)):
                length, device = one.delta.shape[1], one.delta.device
                counts = batch.real((batch.rows, length), device)
                for side, step in zip(SIDES, (one, other), strict=True):
                    at = places(length, step.delta.shape[1], pair.prefix, device)
                    sums.add((side, layer), exact(step.delta.index_select(1, at)[counts]).sum(0))
                same = torch.equal(one.delta, other.delta) and torch.equal(one.decay, other.decay)
                sums.add(("differ", layer), torch.tensor(not same))
            sums.add("tokens", counts.sum())
    tokens = require_tokens(sums["tokens"])
    means: dict[str, Any] = {"equal": tuple((sums.layers("differ") == 0).tolist())}
    for side, steps in found.items():
        means[f"{side}_step"] = sums.layers(side) / tokens
        decay = torch.stack([step.decay.cpu() for step in steps])
        means[f"{side}_states"] = -1 / (means[f"{side}_step"][..., None] * decay)
    return MemoryLength(tuple(step.block for step in found["frozen"]), tokens=tokens, **means)


@dataclass(frozen=True)
class _Step:
    """What one SSM computed for a batch: Δ, `(rows, length, channels)`, and A, `(channels, states)` in fp64."""

    block: int
    delta: Tensor
    decay: Tensor


def _steps(pair: Pair, side: str, batch: Batch) -> list[_Step]:
    """Run a batch through the model of a side and return what each SSM computed."""
    mixers, seen = _mixers(pair.backbones[side]), _Softplus()
    with pair.on(side) as model, contextlib.ExitStack() as stack:
        for name in _FUSED:
            stack.enter_context(changed([mixer for _, mixer in mixers if hasattr(mixer, name)], name, False))
        stack.enter_context(watch([mixer for _, mixer in mixers], seen.enter, seen.leave, first=True))
        stack.enter_context(seen)
        batch.run(model)
        steps = [_Step(index, _delta(mixer, seen, batch.rows), _decay(mixer)) for index, mixer in mixers]
    for step in steps:
        require_finite(f"Δ of block {step.block}", step.delta)
    return steps


def _mixers(backbone: Backbone) -> list[tuple[int, nn.Module]]:
    """Return every SSM with the index of its block, or raise if there is none."""
    found = [
        (index, part)
        for index, block in enumerate(backbone.blocks)
        for part in block.modules()
        if any(name == "A_log" for name, _ in part.named_parameters(recurse=False))
    ]
    if not found:
        kinds = ", ".join(dict.fromkeys(type(block).__name__ for block in backbone.blocks))
        raise SteerError(
            f"a memory length is that of a state that decays, and blocks of {kinds} have none. How widely attention "
            "spreads is residual_steer.diagnostics.attention_entropy."
        )
    return found


class _Softplus(TorchFunctionMode):
    """Look at every softplus inside a mixer, and at the limits that are put on its result."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[nn.Module, list[Tensor]] = {}
        self.lengths: dict[nn.Module, int] = {}
        self._running: list[nn.Module] = []
        self._last: Tensor | None = None

    def enter(self, mixer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.seen.setdefault(mixer, [])
        self.lengths[mixer] = read_stream(args, kwargs).shape[1]
        self._running.append(mixer)

    def leave(self, *_: Any) -> None:
        self._running.pop()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if self._running:
            seen = self.seen[self._running[-1]]
            if func is F.softplus:
                seen.append(output.detach())
                self._last = output
            elif func in (torch.clamp, Tensor.clamp) and seen and args and args[0] is self._last:
                seen[-1] = output.detach()
        return output


def _delta(mixer: nn.Module, watched: _Softplus, rows: int) -> Tensor:
    """Return Δ as `(rows, length, channels)`, or raise if it is not the one result of that shape."""
    kind, seen = type(mixer).__name__, watched.seen.get(mixer)
    if not seen:
        raise SteerError(
            f"Δ of this {kind} was not seen: compiled kernels compute it inside themselves. Move the model to the CPU, "
            "or measure it where they are not installed."
        )
    shape, channels, length = mixer.get_parameter("A_log").shape, len(_decay(mixer)), watched.lengths[mixer]
    wanted, found = (rows, length, channels), []
    by_head = len(shape) == 3 and len(seen) == shape[0]  # in Zamba, (rows, channels of the head, length) each
    for x in [torch.cat(seen, dim=1)] if by_head else seen:
        delta = x
        if x.dim() == 4:  # in `mamba_ssm`'s reference, (rows, heads, chunks, length of one); the last is filled up
            delta = x.flatten(2).transpose(1, 2)[:, :length]
        elif len(shape) > 1 and x.shape == (rows, channels, length):  # Mamba-1, in either order by the release
            if channels == length:
                raise SteerError(
                    f"the {length} tokens and as many channels of this {kind} cannot be told apart. Give rows of "
                    "another length."
                )
            delta = x.transpose(1, 2)
        if delta.shape == wanted:
            found.append(delta)
    if len(found) != 1:
        shapes = ", ".join(str(tuple(one.shape)) for one in seen)
        raise SteerError(
            f"Δ of this {kind} is the one result of softplus of the shape {wanted}, rows, length and channels; it has "
            f"{len(found)} of them, of {shapes}."
        )
    return found[0]


def _decay(mixer: nn.Module) -> Tensor:
    """Return A, `(channels, states)`, in fp64."""
    decay = -torch.exp(mixer.get_parameter("A_log").detach().double())
    return decay[:, None] if decay.dim() == 1 else decay.reshape(-1, decay.shape[-1])
