"""Windows of fixed length over one long sequence of tokens or bytes."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.data import Dataset

from residual_steer.errors import SteerError

__all__ = ["ByteBlocks", "TokenBlocks"]

_STRETCHES = 10


class TokenBlocks(Dataset[dict[str, Tensor]]):
    """Consecutive windows of a sequence, as a causal language model takes them.

    A window is `{"input_ids": (length,), "labels": (length,)}`, both int64 and equal: models shift the labels
    themselves. No token is in two windows; a rest shorter than a window is dropped. The sequence is cut into up to ten
    stretches and the end of each is validation, so that both splits see every part of it, and touch in few places.

    Args:
        ids: the sequence, `(tokens,)`.
        length: tokens of a window, at least 2.
        split: `"train"`, `"valid"` or `"all"`.
        share: share of the windows that is validation, between 0 and 1.

    Raises:
        SteerError: an argument outside these ranges, or too short a sequence for one window in the split.

    >>> blocks = TokenBlocks(torch.arange(100), length=10, split="valid")
    >>> len(blocks), blocks[0]["input_ids"][:3]
    (1, tensor([90, 91, 92]))
    """

    def __init__(self, ids: Tensor, length: int, split: str = "train", share: float = 0.1) -> None:
        if isinstance(length, bool) or not isinstance(length, int) or length < 2:
            raise SteerError(f"`length` is an integer of at least 2, one token and the next; received {length!r}.")
        if split not in ("train", "valid", "all"):
            raise SteerError(f"`split` is 'train', 'valid' or 'all'; received {split!r}.")
        if not 0 < share < 1:
            raise SteerError(f"`share`, of the windows that are validation, lies between 0 and 1; received {share!r}.")
        if ids.dim() != 1:
            raise SteerError(f"the tokens are one sequence, of shape (tokens,); received {tuple(ids.shape)}.")
        count = ids.numel() // length
        held_out = _held_out(count, share)
        keep = torch.ones_like(held_out) if split == "all" else held_out if split == "valid" else ~held_out
        self.length, self.split = length, split
        self.windows = ids[: count * length].view(count, length)[keep]
        if not len(self.windows):
            raise SteerError(
                f"{ids.numel():,} tokens have {count} windows of {length}, none of which is left for the split "
                f"{split!r}. Give a longer text or a shorter `length`."
            )

    def __len__(self) -> int:
        """Return the number of windows."""
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return a window; `input_ids` and `labels` do not share memory."""
        ids = self.windows[index].long()
        return {"input_ids": ids, "labels": ids.clone()}


class ByteBlocks(TokenBlocks):
    """The same over bytes: the vocabulary is 256, and a loss in nats divided by ln 2 is in bits per byte.

    Args:
        data: the bytes.
        length: bytes of a window, at least 2.
        split: `"train"`, `"valid"` or `"all"`.
        share: share of the windows that is validation.

    Raises:
        SteerError: as `TokenBlocks`.

    >>> from residual_steer.data import english_prose
    >>> ByteBlocks(english_prose(), length=128)[0]["input_ids"].shape
    torch.Size([128])
    """

    def __init__(self, data: bytes, length: int, split: str = "train", share: float = 0.1) -> None:
        if not isinstance(data, (bytes, bytearray)):
            raise SteerError(f"`data` is bytes; received {type(data).__name__}. Encode text: text.encode().")
        ids = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
        super().__init__(ids, length, split, share)


def _held_out(count: int, share: float) -> Tensor:
    """Say which of `count` windows are validation: the last `share` of each stretch."""
    stretches = max(1, min(_STRETCHES, int(count * share)))
    position = torch.arange(count) * stretches % max(1, count)
    return position >= (1 - share) * count - 1e-6
