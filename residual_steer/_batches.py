"""What a loader gives, as a model is called with it: its rows, its labels, and which tokens are padding."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .errors import SteerError


@dataclass(frozen=True)
class Batch:
    """A batch on the model's device."""

    content: Any  # a dict, a pair `(x, y)`, or x alone
    two_stacks: bool = False  # whether it is for an encoder-decoder

    @property
    def rows(self) -> int:
        """How many rows: the first dimension of the first tensor."""
        return rows_of(self.content)

    @property
    def labels(self) -> Tensor | None:
        """The labels of the rows or tokens, None where there are none."""
        return labels_of(self.content)

    @property
    def mask(self) -> Tensor | None:
        """Which tokens are text and which are padding, `(batch, length)` of booleans; None where all count.

        In an encoder-decoder all do: the encoder's mask is not that of the decoder's tokens.
        """
        mask = self.content.get("attention_mask") if isinstance(self.content, Mapping) else None
        return mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 and not self.two_stacks else None

    def real(self, shape: Sequence[int], device: torch.device) -> Tensor:
        """Return which tokens are not padding, booleans of a shape.

        Warns:
            UserWarning: there is padding, but the mask is of other tokens, so that all of them count.
        """
        mask = self.mask
        if mask is not None and mask.shape == tuple(shape):
            return mask.to(device)
        if mask is not None and not bool(mask.all()):
            warnings.warn(
                f"the attention mask leaves out padding among {tuple(mask.shape)} tokens, and the tokens here are "
                f"{tuple(shape)}: all of them count, padding too.",
                stacklevel=2,
            )
        return torch.ones(tuple(shape), dtype=torch.bool, device=device)

    def run(self, model: nn.Module) -> Any:
        """Call a model on what it is given, and return its output."""
        return call(model, self.content)


def call(model: nn.Module, content: Any) -> Any:
    """Call a model, with a dict as keywords, with x of a pair; where it cannot be, the error says what was given."""
    try:
        if isinstance(content, Mapping):
            return model(**content)
        return model(content[0] if isinstance(content, (tuple, list)) else content)
    except SteerError:
        raise
    except (AttributeError, IndexError, TypeError, ValueError) as error:
        parts = content.items() if isinstance(content, Mapping) else [("x", content)]
        given = ", ".join(f"{key}: {shown(part)}" for key, part in parts) or "nothing"
        raise SteerError(
            f"this {type(model).__name__} cannot be run on {given} ({type(error).__name__}: {error}). A batch holds "
            "tensors, no lists or arrays, of ids and labels that the model knows, and is no longer than it reads."
        ) from error


def shown(part: Any) -> str:
    """Return what a part of a batch is, for a message: type, shape and, of whole numbers, range of a tensor."""
    if isinstance(part, (tuple, list)) and any(isinstance(one, Tensor) for one in part):
        return f"({', '.join(map(shown, part[:4]))})"
    if not isinstance(part, Tensor):
        return type(part).__name__
    words = f"{str(part.dtype).removeprefix('torch.')} {tuple(part.shape)}"
    whole = not part.is_floating_point() and not part.is_complex() and part.numel() and not part.is_meta
    return f"{words} from {int(part.min())} to {int(part.max())}" if whole else words


def check_loader(name: str, loader: Any, *, read: str = "") -> None:
    """Raise if what should give batches is no collection of them, or an iterator although it is `read` "twice"."""
    if not isinstance(loader, Iterable) or isinstance(loader, (Tensor, Mapping, str)):
        raise SteerError(
            f"`{name}` is a DataLoader, or a list of batches; received {type(loader).__name__}. One batch is [batch]."
        )
    if read and isinstance(loader, Iterator):
        raise SteerError(
            f"`{name}` is a DataLoader, or a list of batches: it is read {read}, which an iterator cannot be; received "
            f"{type(loader).__name__}."
        )


def _tensors(content: Any) -> list[Tensor]:
    """Return the tensors of a batch in their order."""
    parts = content.values() if isinstance(content, Mapping) else content
    parts = parts if isinstance(parts, Iterable) and not isinstance(parts, Tensor) else [parts]
    return [part for part in parts if isinstance(part, Tensor)]


def rows_of(content: Any) -> int:
    """Return the number of rows of a batch, the first dimension of its first tensor; 1 if there is none."""
    return next((len(tensor) for tensor in _tensors(content) if tensor.dim()), 1)


def labels_of(content: Any) -> Tensor | None:
    """Return `labels` of a dict, or y of a pair `(x, y)`; None where there are none."""
    if isinstance(content, Mapping):
        labels = content.get("labels")
    else:
        labels = content[1] if isinstance(content, (tuple, list)) and len(content) == 2 else None
    return labels if isinstance(labels, Tensor) else None


def to_device(content: Any, device: torch.device) -> Any:
    """Return a batch, its tensors moved, whatever they are nested in."""
    from accelerate.utils import send_to_device  # here, since it takes as long to import as this library

    return send_to_device(content, device)


def device_of(model: nn.Module) -> torch.device:
    """Return the device of a model's first parameter, the CPU where there is none."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def batches(model: nn.Module, loader: Iterable[Any]) -> Iterator[Batch]:
    """Yield the batches of a loader on the model's device; raise if it is none, or gives none with a tensor."""
    check_loader("loader", loader)
    device = device_of(model)
    given, two_stacks = None, has_two_stacks(model)
    for given in loader:
        if not _tensors(given):
            kind = type(given).__name__
            raise SteerError(f"a batch is a dict with tensors, a pair (x, y), or x; this one is a {kind}.")
        yield Batch(to_device(given, device), two_stacks)
    if given is None:
        raise SteerError("the loader gave no batch. Give it data; `drop_last` drops a lone small batch.")


def has_two_stacks(model: nn.Module) -> bool:
    """Return whether an encoder-decoder of transformers is in a model; a stack of one has its config, but is alone."""
    if not any(getattr(getattr(part, "config", None), "is_encoder_decoder", False) for part in model.modules()):
        return False
    names = [name.rpartition(".")[2] for name, _ in model.named_modules()]
    return all(any(name.endswith(stack) for name in names) for stack in ("encoder", "decoder"))


def tokens_of(z: Tensor, channels: int = -1, batch: Batch | None = None) -> Tensor:
    """Return the tokens of a stream one below the other, `(tokens, width)`, those of a batch's padding left out.

    It is `(batch, length, width)`, or `(batch, channels, height, width)` with `channels` = 1.
    """
    rows = z.movedim(channels, -1)
    return rows.reshape(-1, rows.shape[-1]) if batch is None else rows[batch.real(rows.shape[:-1], z.device)]


def require_finite(what: str, tensor: Tensor) -> None:
    """Raise a SteerError if a tensor has NaN or infinity."""
    wrong = int((~torch.isfinite(tensor)).sum())
    if wrong:
        raise SteerError(f"{what} has {wrong} values of {tensor.numel()} that are NaN or infinite. Look at the data.")
