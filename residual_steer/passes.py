"""Looking at a model while it runs over data: no gradients, evaluation mode, and everything left as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .backbone import Backbone
from .errors import SteerError
from .training import randomness
from .training.environment import to_device
from .training.losses import rows_of
from .training.modes import as_before

__all__ = ["Batch", "Streams", "batches", "has_two_stacks", "reading", "require_finite", "tokens_of", "uncompiled"]


@dataclass(frozen=True)
class Batch:
    """A batch on the model's device.

    Attributes:
        content: a dict, a pair `(x, y)`, or x alone.
        rows: how many.
        two_stacks: whether it is for an encoder-decoder.
    """

    content: Any
    rows: int
    two_stacks: bool = False

    @property
    def labels(self) -> Tensor | None:
        """The labels of the rows or tokens, None where there are none."""
        if isinstance(self.content, Mapping):
            labels = self.content.get("labels")
        else:
            labels = self.content[1] if isinstance(self.content, (tuple, list)) and len(self.content) == 2 else None
        return labels if isinstance(labels, Tensor) else None

    @property
    def mask(self) -> Tensor | None:
        """Which tokens are text and which are padding, `(batch, length)` of booleans; None where all count.

        In an encoder-decoder all do: the encoder's mask says nothing of the decoder's tokens, even where they happen
        to be as many.
        """
        if self.two_stacks:
            return None
        mask = self.content.get("attention_mask") if isinstance(self.content, Mapping) else None
        return mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None

    def real(self, shape: Sequence[int], device: torch.device) -> Tensor:
        """Return which tokens are not padding, booleans of a shape: `mask` where it has that shape, else all."""
        if self.mask is None or self.mask.shape != tuple(shape):
            return torch.ones(tuple(shape), dtype=torch.bool, device=device)
        return self.mask.to(device)

    def run(self, model: nn.Module, **more: Any) -> Any:
        """Call the model and return its output.

        Args:
            model: called with a dict as keywords, with x of a pair.
            **more: keywords besides.
        """
        if isinstance(self.content, Mapping):
            return model(**{**self.content, **more})
        x = self.content[0] if isinstance(self.content, (tuple, list)) else self.content
        return model(x, **more)


def uncompiled(model: nn.Module) -> nn.Module:
    """Return the model inside `torch.compile`'s, so that paths are those that it had before."""
    inner = model.__dict__.get("_modules", {}).get("_orig_mod")
    return inner if isinstance(inner, nn.Module) else model


@contextlib.contextmanager
def _eagerly(model: nn.Module) -> Iterator[None]:
    """Run what is compiled as it was written, by `torch.compile` around a part or by `compile` in place."""
    compiled = any(
        type(module).__name__ == "OptimizedModule" or getattr(module, "_compiled_call_impl", None) is not None
        for module in model.modules()
    )
    with torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def reading(model: nn.Module) -> Iterator[None]:
    """Look at a model in evaluation mode and without gradients; modes and random generators come back as they were.

    What is compiled runs as it was written meanwhile: its graph would not hear of hooks that are added now.
    """
    with as_before(model), randomness.apart(), torch.no_grad(), _eagerly(model):
        model.eval()
        yield


def has_two_stacks(model: nn.Module) -> bool:
    """Say whether an encoder-decoder of transformers is in a model; a stack of one has its config, and stands alone."""
    if not any(getattr(getattr(part, "config", None), "is_encoder_decoder", False) for part in model.modules()):
        return False
    names = [name.rpartition(".")[2] for name, _ in model.named_modules()]
    return all(any(name.endswith(stack) for name in names) for stack in ("encoder", "decoder"))


def batches(model: nn.Module, loader: Iterable[Any]) -> Iterator[Batch]:
    """Yield the batches of a loader on the model's device.

    Raises:
        SteerError: what is given is no loader, gives no batch, or a batch without a tensor.
    """
    if not isinstance(loader, Iterable) or isinstance(loader, (Tensor, Mapping, str)):
        raise SteerError(f"a loader gives batches when it is iterated over; received {type(loader).__name__}.")
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    two_stacks = has_two_stacks(model)
    empty = True
    for batch in loader:
        content = to_device(batch, device)
        parts = content.values() if isinstance(content, Mapping) else content
        found = isinstance(parts, Iterable) and any(isinstance(part, Tensor) for part in parts)
        if not found and not isinstance(content, Tensor):
            kind = type(batch).__name__
            raise SteerError(f"a batch is a dict with tensors, a pair (x, y), or x; this one is a {kind}.")
        empty = False
        yield Batch(content, rows_of(content), two_stacks)
    if empty:
        raise SteerError("the loader gave no batch. Give it data; `drop_last` drops a lone small batch.")


@dataclass
class Streams:
    """The residual stream at every block of a model, of its last call, while `with Streams(backbone) as streams:`.

    What leaves a block is what the next one reads: fields that act at the block have been added.

    Args:
        backbone: says where the stream is.
        indices: which blocks; None is all.

    Attributes:
        entering: by block index, z_l, `(batch, length, width)` or `(batch, channels, height, width)`, detached.
        leaving: z_{l+1} in the same way.
    """

    backbone: Backbone
    indices: Sequence[int] | None = None
    entering: dict[int, Tensor] = field(default_factory=dict)
    leaving: dict[int, Tensor] = field(default_factory=dict)

    def __enter__(self) -> Streams:
        """Begin to look."""
        chosen = range(len(self.backbone.blocks)) if self.indices is None else self.indices
        self._handles = []
        for index in chosen:
            block = self.backbone.blocks[index]
            self._handles += [
                block.register_forward_pre_hook(self._before(index), with_kwargs=True),
                block.register_forward_hook(self._after(index)),
            ]
        return self

    def __exit__(self, *_: object) -> None:
        """Take the hooks away; what was seen last stays."""
        for handle in self._handles:
            handle.remove()

    def _before(self, index: int) -> Any:
        def note(block: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            z = self.backbone.read(args, kwargs).detach()
            self.entering[index] = z.clone() if self.backbone.inplace else z

        return note

    def _after(self, index: int) -> Any:
        def note(block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            z = self.backbone.left(output).detach()
            self.leaving[index] = z.clone() if self.backbone.inplace else z  # the next block writes into it

        return note


def tokens_of(z: Tensor, channels: int = -1, batch: Batch | None = None) -> Tensor:
    """Return the tokens of a stream one below the other, `(tokens, width)`, those of padding left out.

    Args:
        z: `(batch, length, width)`, or `(batch, channels, height, width)` with `channels` = 1.
        channels: which dimension is the width.
        batch: which says what is padding; None where all tokens count.
    """
    rows = z.movedim(channels, -1)
    return rows.reshape(-1, rows.shape[-1]) if batch is None else rows[batch.real(rows.shape[:-1], z.device)]


def require_finite(what: str, tensor: Tensor) -> None:
    """Refuse NaN and infinity.

    Raises:
        SteerError: there is one.
    """
    finite = torch.isfinite(tensor)
    if not bool(finite.all()):
        wrong = int((~finite).sum())
        raise SteerError(f"{what} has {wrong} values of {tensor.numel()} that are NaN or infinite. Look at the data.")
