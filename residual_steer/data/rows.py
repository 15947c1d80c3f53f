"""Rows of tokens with labels, as a causal language model of transformers takes them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.data import Dataset

__all__ = ["TokenRows"]


class TokenRows(Dataset[dict[str, Tensor]]):
    """Rows `{"input_ids": (length,), "labels": (length,)}`, and whatever else a model takes, all int64.

    Labels follow transformers' convention: `labels[i]` is predicted from `input_ids[:i]`, since the model shifts them
    itself, and -100 counts for nothing.

    Args:
        columns: tensors of shape `(rows, length)` by name, of any integer type.
    """

    def __init__(self, **columns: Tensor) -> None:
        self.columns = columns

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(next(iter(self.columns.values())))

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return a row; its tensors share no memory with the data set's."""
        return {name: column[index].to(torch.int64, copy=True) for name, column in self.columns.items()}
