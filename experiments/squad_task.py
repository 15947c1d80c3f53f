"""SQuAD as a task: questions for training, for choosing and for the result, and what a model answers to them."""

from __future__ import annotations

import argparse
import random
from collections import Counter
from typing import Any

import torch
from torch import Tensor

import residual_steer as rs
from residual_steer.data import Questions, squad
from residual_steer.data.hub import check_columns, one_split

ROOM = 32  # tokens of an answer at most


def hold_out(rows: Any, count: int) -> tuple[Any, Any]:
    """Part rows into those for training and about `count` others, so that no paragraph is on both sides."""
    sizes = Counter(rows["context"])
    order = list(sizes)
    random.Random(0).shuffle(order)
    held: set[str] = set()
    while sum(sizes[context] for context in held) < count and len(held) < len(order) - 1:
        held.add(order[len(held)])
    sides: tuple[list[int], list[int]] = ([], [])
    for i, context in enumerate(rows["context"]):
        sides[context in held].append(i)
    if not sides[1]:
        raise rs.SteerError("the train split has questions on one paragraph alone; none can be held out.")
    return rows.select(sides[0]), rows.select(sides[1])


def questions_of(options: argparse.Namespace, tokenizer: Any) -> dict[str, Questions]:
    """Return the questions for training, for choosing and for the result.

    As many are read for training as the steps take, evenly spread, so that none is read twice.

    Raises:
        SteerError: the data cannot be had, or are not in SQuAD's schema.
    """
    rows = one_split(options.data, "train")
    check_columns(rows, ["context"], options.data)
    train, valid = hold_out(rows, options.valid)
    form = {"tokenizer": tokenizer, "length": options.length, "room": ROOM}
    return {
        "train": squad({"train": train}, "train", limit=options.steps * options.batch, **form),
        "valid": squad({"validation": valid}, "validation", limit=options.valid, **form),
        "test": squad(options.data, "validation", limit=options.limit, **form),
    }


@torch.no_grad()
def answers(model: Any, tokenizer: Any, prompts: list[Tensor], batch: int) -> list[str]:
    """Return what a model answers: its most likely tokens, up to the end of text or of the line.

    Args:
        model: in evaluation mode.
        tokenizer: its own.
        prompts: token ids, `(tokens,)` each.
        batch: how many are decoded at once, filled up at the left.
    """
    from transformers import GenerationConfig

    filler = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    greedy = GenerationConfig(
        max_new_tokens=ROOM, do_sample=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=filler, use_cache=True
    )
    device = next(model.parameters()).device
    found = []
    for start in range(0, len(prompts), batch):
        rows = prompts[start : start + batch]
        longest = max(map(len, rows))
        ids = torch.stack([torch.cat([row.new_full((longest - len(row),), filler), row]) for row in rows])
        real = torch.stack([torch.arange(longest) >= longest - len(row) for row in rows]).long()
        out = model.generate(ids.to(device), attention_mask=real.to(device), generation_config=greedy)
        for row in out[:, longest:]:
            found.append(tokenizer.decode(row, skip_special_tokens=True).strip().partition("\n")[0])
    return found
