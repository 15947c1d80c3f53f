"""WikiText, and other running text, as windows of tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from residual_steer.data.blocks import TokenBlocks
from residual_steer.data.checks import check_integer
from residual_steer.data.source import Source, check_columns, one_split, told_name
from residual_steer.errors import SteerError

__all__ = ["wikitext"]

_PIECE = 1000  # rows that are tokenized at once: WikiText-103 is half a GB


def wikitext(
    source: Source = "Salesforce/wikitext",
    split: str = "train",
    *,
    tokenizer: Callable[..., Any],
    length: int = 1024,
    config: str | None = "wikitext-2-raw-v1",
    column: str = "text",
    limit: int | None = None,
) -> TokenBlocks:
    r"""Return WikiText (Merity et al. 2016, arXiv 1609.07843), or any text in rows, in windows for a causal model.

    Rows are joined with an empty line between them, as in the usual measurement of perplexity on the raw text, and
    tokenized without special tokens, a thousand rows at a time. Windows do not overlap, and a rest shorter than a
    window is dropped, so a loss is per token of this tokenizer, each with at most `length` - 1 tokens before it.

    Args:
        source: a name on the Hub, or a local copy: see `splits`.
        split: one of the data set: here `"train"`, `"validation"` or `"test"`.
        tokenizer: of transformers, or whatever maps a text to a mapping with `input_ids`.
        length: tokens of a window, at least 2.
        config: `"wikitext-2-raw-v1"` (2 million words) or `"wikitext-103-raw-v1"` (103 million).
        column: where the text is.
        limit: tokens that are read at most, from the beginning; None reads all.

    Raises:
        SteerError: the source cannot be had, or has no such split or column, or no text for one window.
    """
    check_integer("length", length, 2)
    if limit is not None:
        check_integer("limit", limit, length)
    rows = one_split(source, split, config)
    check_columns(rows, [column], source)
    ids: list[int] = []
    for start in range(0, len(rows), _PIECE):
        texts = rows[start : start + _PIECE][column]
        wrong = next((text for text in texts if not isinstance(text, str)), None)
        if wrong is not None or None in texts:
            raise SteerError(
                f"the column {column!r} of {told_name(source)} does not hold text alone: a row from {start} on is a "
                f"{type(wrong).__name__}."
            )
        text = "\n\n".join(texts) + ("\n\n" if start + _PIECE < len(rows) else "")
        ids += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if limit is not None and len(ids) >= limit:
            break
    return TokenBlocks(torch.tensor(ids[:limit], dtype=torch.int64), length, "all")
