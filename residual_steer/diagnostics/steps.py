"""What the state-space mixers of a model compute for a batch: the step Δ of each token, the decay A of each state."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from residual_steer.backbone import Backbone, read_stream
from residual_steer.errors import SteerError
from residual_steer.passes import Batch, require_finite

from .pairs import Pair

__all__ = ["Steps", "steps_of"]


@dataclass(frozen=True)
class Steps:
    """What one SSM computed for a batch.

    Attributes:
        block: index of its block.
        delta: Δ, `(rows, length, channels)`.
        decay: A, `(channels, states)`, in fp64.
    """

    block: int
    delta: Tensor
    decay: Tensor


def _mixers(backbone: Backbone) -> list[tuple[int, nn.Module]]:
    """Return every SSM with the index of its block.

    Raises:
        SteerError: there is none.
    """
    found = [
        (index, part)
        for index, block in enumerate(backbone.blocks)
        for part in block.modules()
        if "A_log" in part._parameters
    ]
    if not found:
        kinds = ", ".join(dict.fromkeys(type(block).__name__ for block in backbone.blocks))
        raise SteerError(
            f"a memory length is that of a state that decays, and blocks of {kinds} have none. How widely attention "
            "spreads is residual_steer.diagnostics.attention_entropy."
        )
    return found


def steps_of(pair: Pair, side: str, batch: Batch) -> list[Steps]:
    """Run a batch through the model of a side and return what each SSM computed.

    Raises:
        SteerError: one computed no Δ in sight, or one that is not finite.
    """
    mixers = _mixers(pair.backbone(side))
    with pair.on(side) as model:
        with _Softplus([mixer for _, mixer in mixers]) as seen:
            batch.run(model)
        steps = [Steps(index, _delta(mixer, seen, batch.rows), _decay(mixer)) for index, mixer in mixers]
    for step in steps:
        require_finite(f"Δ of block {step.block}", step.delta)
    return steps


class _Softplus(TorchFunctionMode):
    """Look at every softplus inside a mixer, and at the limits that are put on its result."""

    def __init__(self, mixers: Sequence[nn.Module]) -> None:
        super().__init__()
        self._mixers, self._inside = mixers, list[nn.Module]()
        self._seen: dict[nn.Module, list[Tensor]] = {}
        self._lengths: dict[nn.Module, int] = {}
        self._last: Tensor | None = None

    def of(self, mixer: nn.Module) -> list[Tensor]:
        """Return what was seen in a mixer."""
        return self._seen.get(mixer, [])

    def length(self, mixer: nn.Module) -> int:
        """Return how many tokens a mixer was given."""
        return self._lengths[mixer]

    def __enter__(self) -> _Softplus:
        with contextlib.ExitStack() as stack:
            for mixer in self._mixers:
                stack.enter_context(self._within(mixer))
            super().__enter__()  # type: ignore[no-untyped-call]
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._stack.close()

    @contextlib.contextmanager
    def _within(self, mixer: nn.Module) -> Iterator[None]:
        """Know when a mixer is being called, and keep `mamba_ssm`'s from its fused path, which shows nothing."""

        def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._inside.append(mixer)
            self._lengths[mixer] = read_stream(args, kwargs).shape[1]

        def leave(*_: Any) -> None:
            self._inside.pop()

        switches = [name for name in ("use_fast_path", "use_mem_eff_path") if getattr(mixer, name, False)]
        handles = [
            mixer.register_forward_pre_hook(enter, prepend=True, with_kwargs=True),
            mixer.register_forward_hook(leave),
        ]
        try:
            for name in switches:
                setattr(mixer, name, False)
            yield
        finally:
            for name in switches:
                setattr(mixer, name, True)
            for handle in handles:
                handle.remove()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if self._inside:
            seen = self._seen.setdefault(self._inside[-1], [])
            if func is F.softplus:
                seen.append(output.detach())
                self._last = output
            elif func in (torch.clamp, Tensor.clamp) and seen and args and args[0] is self._last:
                seen[-1] = output.detach()
        return output


def _delta(mixer: nn.Module, watched: _Softplus, rows: int) -> Tensor:
    """Return Δ as `(batch, length, channels)`.

    Mamba-1 computes it as `(batch, channels, length)`, and in Zamba head by head; Mamba-2 as `(batch, length, heads)`,
    and `mamba_ssm`'s reference in chunks, `(batch, heads, chunks, length of one)`, of which it may fill up the last.

    Raises:
        SteerError: it was not seen.
    """
    kind, seen = type(mixer).__name__, watched.of(mixer)
    if not seen:
        raise SteerError(
            f"Δ of this {kind} was not seen: compiled kernels compute it inside themselves. Move the model to the CPU, "
            "or measure it where they are not installed."
        )
    if mixer.get_parameter("A_log").dim() > 1 or seen[0].dim() == 4:
        delta = torch.cat([one.flatten(2) for one in seen], dim=1).transpose(1, 2)[:, : watched.length(mixer)]
    else:
        delta = seen[0]
    channels = _decay(mixer).shape[0]
    if delta.shape != (rows, watched.length(mixer), channels):
        shapes = ", ".join(str(tuple(one.shape)) for one in seen)
        raise SteerError(f"Δ of a {kind} has {channels} channels for {rows} rows; this one computed {shapes}.")
    return delta


def _decay(mixer: nn.Module) -> Tensor:
    """Return A, `(channels, states)`, in fp64: one state for each head of Mamba-2."""
    decay = -torch.exp(mixer.get_parameter("A_log").detach().double())
    return decay[:, None] if decay.dim() == 1 else decay.reshape(-1, decay.shape[-1])
