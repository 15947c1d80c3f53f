"""SQuAD for causal language models (Rajpurkar et al. 2016, arXiv 1606.05250), and its two scores."""

from __future__ import annotations

import logging
import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from residual_steer.data._rows import TokenRows, check_integer
from residual_steer.data.hub import PIECE, Source, check_columns, named, one_split
from residual_steer.errors import SteerError
from residual_steer.training.losses import IGNORE

__all__ = ["Questions", "squad", "squad_scores"]

_log = logging.getLogger(__name__)

_LONG = ("answer", "start", "drop")


class Questions(TokenRows):
    """Questions on texts, with what their answers are scored against.

    Attributes:
        prompts: of each row, everything before its answer, int64 `(tokens,)` of any length: what `generate` takes.
        references: of each row, the answers that count as right.
        dropped: number of rows that were left out, being too long.
    """

    def __init__(
        self, columns: Mapping[str, Tensor], prompts: list[Tensor], references: list[list[str]], dropped: int
    ) -> None:
        super().__init__(**columns)
        self.prompts, self.references, self.dropped = prompts, references, dropped


def squad(
    source: Source = "rajpurkar/squad",
    split: str = "train",
    *,
    tokenizer: Callable[..., Any],
    length: int = 384,
    room: int = 32,
    long: str | None = None,
    limit: int | None = None,
) -> Questions:
    r"""Return SQuAD v1.1 (Rajpurkar et al. 2016, arXiv 1606.05250) as text that a causal model goes on with.

    A row is `{context}\n\nQuestion: {question}\nAnswer: {answer}` and the tokenizer's end of text, if it has one. Only
    the answer and that end have labels, the first answer where there are several. Rows are filled up to `length` at
    the right, where nothing that counts can see it, so that no attention mask is needed. No other special token is
    added.

    A context that does not fit is cut to the tokens that are left: to a part that holds the answer, at a place in it
    that is drawn from the row's number (in the middle it could be guessed), or to its beginning. The first uses the
    answer, so it is for training, and for losses that are compared among each other.

    Args:
        source: a name on the Hub, or a local copy with SQuAD's columns context, question and answers: see `splits`.
        split: one of the data set: here `"train"` or `"validation"`.
        tokenizer: a fast tokenizer of transformers.
        length: tokens of a row.
        room: tokens that are kept for the answer and the end; what goes beyond is cut.
        long: what becomes of a context that does not fit: `"answer"` cuts to a part with the answer, `"start"` to the
            beginning, `"drop"` leaves the row out. None is `"answer"` for the train split, and `"start"` for others.
        limit: rows that are read at most, evenly spread; None reads all.

    Returns:
        Dicts of `input_ids` and `labels`, both int64 `(length,)`, with `prompts` and `references`. Rows whose question
        leaves no token for the context are left out.

    Raises:
        SteerError: an argument outside these ranges, the source cannot be had, or has no such split or columns, a row
            is not in SQuAD's schema, or none is left.
    """
    check_integer("length", length, 2)
    check_integer("room", room, 1)
    if long not in (*_LONG, None):
        raise SteerError(f"`long` is one of {', '.join(_LONG)} or None; received {long!r}.")
    if not getattr(tokenizer, "is_fast", False):
        raise SteerError(
            "`tokenizer` is a fast tokenizer of transformers, which says where each token stands in the text; "
            f"received {type(tokenizer).__name__}. transformers.AutoTokenizer gives one."
        )
    rows = one_split(source, split)
    check_columns(rows, ["context", "question", "answers"], source)
    if limit is not None and check_integer("limit", limit, 1) < len(rows):
        rows = rows.select([i * len(rows) // limit for i in range(limit)])
    layout = _Layout(tokenizer, length, room, long or ("answer" if split == "train" else "start"))
    made: list[tuple[list[int], list[int]]] = []
    references = []
    for start in range(0, len(rows), PIECE):
        texts = _texts(rows[start : start + PIECE], start, source)
        for text, row in zip(texts, layout.rows(texts, start), strict=True):
            if row is not None:
                made.append(row)
                references.append(text.answers)
    dropped = len(rows) - len(made)
    if not made:
        raise SteerError(f"none of {len(rows):,} rows fits into {length} tokens. Give a larger `length`.")
    if dropped:
        _log.warning("%d of %d rows of %s are too long, and left out", dropped, len(rows), named(source))
    return Questions(_filled(made, length, layout.filler), [torch.tensor(p) for p, _ in made], references, dropped)


def squad_scores(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Return SQuAD's exact match and F1, by the rules of its official script for v1.1.

    Both compare lower-case words without punctuation, without the articles a, an and the, and with single spaces. F1
    is the harmonic mean of precision and recall over words, counted with their repetitions. Each prediction is compared
    with the reference that suits it best.

    Args:
        predictions: one per question.
        references: for each of them, the answers that count as right.

    Returns:
        `exact_match` and `f1`, means from 0 to 1; the official script prints them in per cent.

    Raises:
        SteerError: there are none, not as many of both, or a question has no reference.

    >>> squad_scores(["The cat.", "a red dog"], [["cat"], ["dog", "cow"]])
    {'exact_match': 0.5, 'f1': 0.8333333333333333}
    """
    if isinstance(predictions, str) or len(predictions) != len(references) or not len(predictions):
        raise SteerError(
            f"there are as many predictions as lists of references, and at least one; received {len(predictions)} and "
            f"{len(references)}."
        )
    exact = f1 = 0.0
    for prediction, right in zip(predictions, references, strict=True):
        if isinstance(right, str) or not right:
            raise SteerError(f"the references of a question are a list of at least one answer; received {right!r}.")
        exact += max(_words(prediction) == _words(answer) for answer in right)
        f1 += max(_f1(_words(prediction), _words(answer)) for answer in right)
    return {"exact_match": exact / len(predictions), "f1": f1 / len(predictions)}


@dataclass(frozen=True)
class _Text:
    """One row as text; `span` is where its first answer stands in the context, in characters."""

    context: str
    question: str
    answers: list[str]
    span: tuple[int, int]


def _texts(columns: Mapping[str, list[Any]], first: int, source: Source) -> list[_Text]:
    """Return the texts of some rows, of which `first` is the first one's number, if they are in SQuAD's schema."""
    texts = []
    rows = zip(columns["context"], columns["question"], columns["answers"], strict=True)
    for number, (context, question, answers) in enumerate(rows, first):
        right: Any = answers.get("text") if isinstance(answers, Mapping) else None
        starts: Any = answers.get("answer_start") if isinstance(answers, Mapping) else None
        lists = isinstance(right, list) and isinstance(starts, list) and len(right) == len(starts) > 0
        if not lists or not all(isinstance(text, str) for text in (context, question, *right)):
            raise SteerError(
                f"row {number} of {named(source)} is not in SQuAD's schema: context and question are strings, answers "
                "is {'text': [at least one string], 'answer_start': [an integer each]}; its answers are "
                f"{answers!r:.200}."
            )
        start = starts[0]
        if not isinstance(start, int) or not right[0] or not 0 <= start <= len(context) - len(right[0]):
            raise SteerError(
                f"the first answer of row {number} of {named(source)} does not stand in its context: {right[0]!r} at "
                f"{start!r} of {len(context)} characters."
            )
        texts.append(_Text(context, question, right, (start, start + len(right[0]))))
    return texts


class _Layout:
    """How the parts of a row are tokenized and put together."""

    def __init__(self, tokenizer: Any, length: int, room: int, long: str) -> None:
        self.tokenizer, self.length, self.room, self.long = tokenizer, length, room, long
        end = tokenizer.eos_token_id
        self.end = [] if end is None else [end]
        pad = tokenizer.pad_token_id
        self.filler = pad if pad is not None else end if end is not None else 0

    def rows(self, texts: list[_Text], first: int) -> list[tuple[list[int], list[int]] | None]:
        """Return the tokens of prompts and answers; None for what is left out. `first` is the first row's number."""
        contexts = list(dict.fromkeys(text.context for text in texts))  # one serves several questions
        read = self._tokens(contexts, return_offsets_mapping=True)
        where = {context: i for i, context in enumerate(contexts)}
        questions = self._tokens([f"\n\nQuestion: {text.question}\nAnswer:" for text in texts])["input_ids"]
        answers = self._tokens([f" {text.answers[0]}" for text in texts])["input_ids"]
        made: list[tuple[list[int], list[int]] | None] = []
        for i, text in enumerate(texts):
            k = where[text.context]
            part = self._part(
                read["offset_mapping"][k], text.span, self.length - self.room - len(questions[i]), first + i
            )
            if part is None:
                made.append(None)
                continue
            prompt = read["input_ids"][k][part] + questions[i]
            made.append((prompt, (answers[i] + self.end)[: self.room]))
        return made

    def _tokens(self, texts: list[str], **options: Any) -> Any:
        return self.tokenizer(texts, add_special_tokens=False, verbose=False, **options)

    def _part(self, offsets: list[tuple[int, int]], span: tuple[int, int], most: int, number: int) -> slice | None:
        """Return which tokens of a context are kept, at most `most`; None if the row is left out."""
        if len(offsets) <= most:
            return slice(None)
        if most < 1 or self.long == "drop":
            return None
        if self.long == "start":
            return slice(0, most)
        inside = [i for i, (start, end) in enumerate(offsets) if start < span[1] and end > span[0]]
        if not inside or inside[-1] + 1 - inside[0] > most:
            return None
        lowest, highest = max(0, inside[-1] + 1 - most), min(inside[0], len(offsets) - most)
        start = int(np.random.default_rng(number).integers(lowest, highest + 1))
        return slice(start, start + most)


def _filled(rows: list[tuple[list[int], list[int]]], length: int, filler: int) -> dict[str, Tensor]:
    """Return inputs and labels of all rows, `(rows, length)`; int32, to take half the memory."""
    ids = torch.full((len(rows), length), filler, dtype=torch.int32)
    labels = torch.full_like(ids, IGNORE)
    for i, (prompt, answer) in enumerate(rows):
        end = len(prompt) + len(answer)
        ids[i, :end] = torch.tensor(prompt + answer)
        labels[i, len(prompt) : end] = torch.tensor(answer)
    return {"input_ids": ids, "labels": labels}


def _words(text: str) -> list[str]:
    """Return the lower-case words of a text without punctuation and articles."""
    text = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def _f1(predicted: list[str], right: list[str]) -> float:
    common = sum((Counter(predicted) & Counter(right)).values())
    return 2 * common / (len(predicted) + len(right)) if common else 0.0
