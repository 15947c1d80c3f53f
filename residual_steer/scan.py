"""The selective scan of Mamba (Gu and Dao 2023, arXiv 2312.00752, eq. 2 and algorithm 2), where no kernel does it.

    h_t = exp(Δ_t·A) ⊙ h_{t-1} + (Δ_t·u_t) ⊗ B_t        y_t = C_t · h_t

A step is one operation on all channels and states, in buffers that stay in a processor's cache. Only the states at the
beginning of a chunk of steps are kept; the backward pass computes the others again, as the authors' kernel does. Time
and memory grow with the length, and nothing of length × channels × states is ever made.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, library

from .errors import SteerError

__all__ = ["selective_scan"]

CHUNK = 16  # steps at the least, between states that are kept
BUFFER = 3 * 2**18  # numbers in a buffer of a chunk, more than which leaves the cache


def selective_scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """Return y of the selective scan, h_0 = 0, without the gate and the skip connection.

    It is differentiable once, on any device and under `torch.compile`. It computes in fp32, or in fp64 where an input
    is fp64.

    Args:
        u: what enters, `(batch, length, channels)`.
        delta: Δ, the step sizes after their softplus, of u's shape.
        A: `(channels, states)`, negative.
        B: `(batch, length, states)`.
        C: `(batch, length, states)`.

    Returns:
        y, of u's shape and dtype.

    Raises:
        SteerError: shapes that do not fit.
    """
    fits = u.dim() == 3 and A.dim() == 2 and delta.shape == u.shape and A.shape[0] == u.shape[2]
    if not fits or B.shape != C.shape or B.shape != (*u.shape[:2], A.shape[1]):
        raise SteerError(
            "u and delta are (batch, length, channels), A (channels, states), B and C (batch, length, states); "
            f"received {', '.join(str(tuple(x.shape)) for x in (u, delta, A, B, C))}."
        )
    dtype = torch.float64 if torch.float64 in (u.dtype, delta.dtype, A.dtype, B.dtype, C.dtype) else torch.float32
    y, _ = torch.ops.residual_steer.selective_scan(*(x.to(dtype) for x in (u, delta, A, B, C)))
    result: Tensor = y.to(u.dtype)
    return result


def _exactly(kernel: Any) -> Any:
    """Let a kernel compute in the dtype of its tensors, also under autocast."""

    @functools.wraps(kernel)
    def run(u: Tensor, *rest: Any) -> Any:
        with torch.autocast(u.device.type, enabled=False):
            return kernel(u, *rest)

    return run


@library.custom_op("residual_steer::selective_scan", mutates_args=())
@_exactly
def _scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """Return y and the states that chunks begin with, `(chunks, batch, states, channels)`; arguments as above."""
    (rows, length, channels), states = u.shape, A.shape[1]
    steps, group = _cut(rows, states * channels)
    y, starts = u.new_empty(u.shape), u.new_empty(-(-length // steps), rows, states, channels)
    written = y.transpose(0, 1)
    for some in _ranges(rows, group):
        # (length, batch, …), so that a step is one piece of memory
        own_u, own_delta, own_B, own_C = (x[some].transpose(0, 1).contiguous() for x in (u, delta, B, C))
        chunk = _Chunk(A, steps, own_u.shape[1])
        before = A.new_zeros(own_u.shape[1], states, channels)
        for number, at in enumerate(_ranges(length, steps)):
            starts[number, some] = before
            h = chunk.run(own_u[at], own_delta[at], own_B[at], before)
            written[at, some] = torch.matmul(own_C[at].unsqueeze(2), h).squeeze(2)
            before = h[-1].clone()
    return y, starts


@_scan.register_fake
def _(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    rows, length, channels = u.shape
    steps, _ = _cut(rows, A.numel())
    return u.new_empty(u.shape), u.new_empty(-(-length // steps), rows, A.shape[1], channels)


@library.custom_op("residual_steer::selective_scan_backward", mutates_args=())
@_exactly
def _unscan(
    grad: Tensor, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, starts: Tensor, of_A: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of u, Δ, A (zero unless `of_A`), B and C; `grad` is that of y, `starts` as above."""
    # with g_t the gradient of h_t:  g_t = C_t ⊗ grad_t + exp(Δ_{t+1}·A) ⊙ g_{t+1}
    (rows, length, channels), states = u.shape, A.shape[1]
    steps, group = _cut(rows, states * channels)
    grads = [x.new_empty(x.shape) for x in (u, delta, B, C)]
    of_u, of_delta, of_B, of_C = (x.transpose(0, 1) for x in grads)
    grad_A = A.new_zeros(A.shape)
    for some in _ranges(rows, group):
        own, own_u, own_delta, own_B, own_C = (x[some].transpose(0, 1).contiguous() for x in (grad, u, delta, B, C))
        chunk = _Chunk(A, steps, own_u.shape[1])
        g = A.new_empty(steps, own_u.shape[1], states, channels)
        later: Tensor | None = None  # what reaches the last step of a chunk from those after it
        for number, at in reversed(list(enumerate(_ranges(length, steps)))):
            before = starts[number, some]
            h = chunk.run(own_u[at], own_delta[at], own_B[at], before)
            decay, size = chunk.decay[: len(h)], len(h)
            reached = torch.mul(own[at].unsqueeze(2), own_C[at].unsqueeze(3), out=g[:size])
            if later is not None:
                reached[-1].add_(later)
            parts, decays = reached.unbind(), decay.unbind()
            for t in range(size - 2, -1, -1):
                parts[t].addcmul_(decays[t + 1], parts[t + 1])
            later = decays[0] * parts[0]
            entered = torch.matmul(own_B[at].unsqueeze(2), reached).squeeze(2)  # the gradient of Δ·u
            moved = decay.mul_(reached)  # times the state before, it is the gradient of Δ·A
            moved[1:].mul_(h[:-1])
            moved[0].mul_(before)
            if of_A:
                grad_A += torch.einsum("lbnd,lbd->dn", moved, own_delta[at])
            of_u[at, some] = entered * own_delta[at]
            of_delta[at, some] = moved.mul_(chunk.A).sum(2).addcmul_(entered, own_u[at])
            of_B[at, some] = torch.matmul(reached, (own_delta[at] * own_u[at]).unsqueeze(3)).squeeze(3)
            of_C[at, some] = torch.matmul(h, own[at].unsqueeze(3)).squeeze(3)
    return grads[0], grads[1], grad_A, grads[2], grads[3]


@_unscan.register_fake
def _(
    grad: Tensor, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, starts: Tensor, of_A: bool
) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in (u, delta, A, B, C))


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, output[1])
    ctx.set_materialize_grads(False)


def _back(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 5
    found: tuple[Tensor, ...] = torch.ops.residual_steer.selective_scan_backward(
        grad, *ctx.saved_tensors, ctx.needs_input_grad[2]
    )
    return found


_scan.register_autograd(_back, setup_context=_keep)


class _Chunk:
    """The buffers of a chunk, of which a shorter one at the end uses a part."""

    def __init__(self, A: Tensor, steps: int, rows: int) -> None:
        self.A = A.t().contiguous()
        self.decay, self.h = (A.new_empty(steps, rows, *self.A.shape) for _ in range(2))

    def run(self, u: Tensor, delta: Tensor, B: Tensor, before: Tensor) -> Tensor:
        """Return the states of steps behind `before`, `(steps, batch, states, channels)`; `decay` becomes exp(Δ·A)."""
        decay, h = self.decay[: len(u)], self.h[: len(u)]
        torch.mul(delta.unsqueeze(2), self.A, out=decay).exp_()
        torch.mul((delta * u).unsqueeze(2), B.unsqueeze(3), out=h)
        for now, factor in zip(h.unbind(), decay.unbind(), strict=True):
            before = now.addcmul_(factor, before)
        return h


def _cut(rows: int, numbers: int) -> tuple[int, int]:
    """Return how many steps are a chunk, and how many rows are scanned together; a row's state has some `numbers`."""
    group = max(1, min(rows, BUFFER // (CHUNK * numbers)))
    return max(CHUNK, BUFFER // (group * numbers)), group


def _ranges(total: int, size: int) -> list[slice]:
    """Return slices of a size that cover `total`; the last may be shorter."""
    return [slice(begin, min(begin + size, total)) for begin in range(0, total, size)]
