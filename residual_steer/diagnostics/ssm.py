"""What the state-space mixers of a model compute for a batch: the step Δ of each token, the decay A of each state.

Δ is what `softplus` gives inside the mixer, limits put on it included. That is how every one of them defines it, and it
is looked at where it is computed: functions in the families' files would be seven formulas, with norms, multipliers
and orders of heads that releases change. It has to have Δ's shape, once, or nothing is measured.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from residual_steer._batches import Batch, require_finite
from residual_steer.backbone import Backbone, read_stream
from residual_steer.errors import SteerError
from residual_steer.recording import changed, watch

from .compare import Pair

__all__ = ["Steps", "steps_of"]

_FUSED = ("use_fast_path", "use_mem_eff_path")  # of `mamba_ssm`, whose fused functions show nothing


@dataclass(frozen=True)
class Steps:
    """What one SSM computed for a batch.

    Attributes:
        block: index of its block.
        delta: Δ, `(rows, length, channels)`.
        decay: A, `(channels, states)`, in fp64; Mamba-2 has one decay for each head, its channel.
    """

    block: int
    delta: Tensor
    decay: Tensor


def steps_of(pair: Pair, side: str, batch: Batch) -> list[Steps]:
    """Run a batch through the model of a side and return what each SSM computed."""
    mixers = _mixers(pair.backbones[side])
    with pair.on(side) as model, contextlib.ExitStack() as stack:
        for name in _FUSED:
            stack.enter_context(changed([mixer for _, mixer in mixers if hasattr(mixer, name)], name, False))
        seen = _Softplus()
        for _, mixer in mixers:
            stack.enter_context(watch([mixer], seen.enter, first=True))
            stack.enter_context(watch([mixer], after=seen.leave))
        stack.enter_context(seen)
        batch.run(model)
        steps = [Steps(index, _delta(mixer, seen, batch.rows), _decay(mixer)) for index, mixer in mixers]
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


@dataclass
class _Call:
    """The calls of a mixer: how many tokens entered, and what softplus gave in it."""

    length: int = 0
    seen: list[Tensor] = field(default_factory=list)


class _Softplus(TorchFunctionMode):
    """Look at every softplus inside a mixer, and at the limits that are put on its result."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[nn.Module, _Call] = {}
        self._running: list[_Call] = []
        self._last: Tensor | None = None

    def enter(self, mixer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = self.calls.setdefault(mixer, _Call())
        call.length = read_stream(args, kwargs).shape[1]
        self._running.append(call)

    def leave(self, *_: Any) -> None:
        self._running.pop()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if self._running:
            seen = self._running[-1].seen
            if func is F.softplus:
                seen.append(output.detach())
                self._last = output
            elif func in (torch.clamp, Tensor.clamp) and seen and args and args[0] is self._last:
                seen[-1] = output.detach()
        return output


def _delta(mixer: nn.Module, watched: _Softplus, rows: int) -> Tensor:
    """Return Δ as `(rows, length, channels)`, or raise if it is not the one result of that shape."""
    kind, call = type(mixer).__name__, watched.calls.get(mixer)
    if call is None or not call.seen:
        raise SteerError(
            f"Δ of this {kind} was not seen: compiled kernels compute it inside themselves. Move the model to the CPU, "
            "or measure it where they are not installed."
        )
    shape, channels, length = mixer.get_parameter("A_log").shape, len(_decay(mixer)), call.length
    wanted, found = (rows, length, channels), []
    by_head = len(shape) == 3 and len(call.seen) == shape[0]  # in Zamba, (rows, channels of the head, length) each
    for x in [torch.cat(call.seen, dim=1)] if by_head else call.seen:
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
        shapes = ", ".join(str(tuple(one.shape)) for one in call.seen)
        raise SteerError(
            f"Δ of this {kind} is the one result of softplus of the shape {wanted}, rows, length and channels; it has "
            f"{len(found)} of them, of {shapes}."
        )
    return found[0]


def _decay(mixer: nn.Module) -> Tensor:
    """Return A, `(channels, states)`, in fp64."""
    decay = -torch.exp(mixer.get_parameter("A_log").detach().double())
    return decay[:, None] if decay.dim() == 1 else decay.reshape(-1, decay.shape[-1])
