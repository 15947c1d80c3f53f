"""Text for causal language models: windows of tokens, WikiText, and SQuAD (arXiv 1606.05250) with its two scores."""

from __future__ import annotations

import logging
import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from residual_steer._batches import shown
from residual_steer._checks import check_choice, check_integer, check_number
from residual_steer.errors import SteerError
from residual_steer.training.losses import IGNORE

from .hub import Source, check_columns, named, one_split
from .synthetic import TokenRows

__all__ = ["ByteBlocks", "Questions", "TokenBlocks", "squad", "squad_scores", "wikitext"]

_log = logging.getLogger(__name__)

_PIECE = 1000  # rows that are tokenized at once: WikiText-103 is half a GB
_STRETCHES = 10
_LONG = ("answer", "start", "drop")


class TokenBlocks(Dataset[dict[str, Tensor]]):
    """Consecutive windows of a sequence, as a causal language model takes them.

    A window is `{"input_ids": (length,), "labels": (length,)}`, both int64 and equal: models shift the labels
    themselves. Windows do not overlap; a rest shorter than one is dropped. The end of each of up to ten stretches of
    the sequence is validation, so that both splits see every part of it, and touch in few places.

    Args:
        ids: the sequence, `(tokens,)`.
        length: tokens of a window, at least 2.
        split: `"train"`, `"valid"` or `"all"`.
        share: share of the windows that is validation, between 0 and 1.

    Raises:
        SteerError: an argument outside these ranges, no tensor of integers, or too short a sequence for one window in
            the split.
    """

    def __init__(self, ids: Tensor, length: int, split: str = "train", share: float = 0.1) -> None:
        check_integer("length", length, 2, meaning="one token and the next")
        check_choice("split", split, ("train", "valid", "all"))
        check_number("share", share, above=0, below=1, meaning="of the windows that are validation")
        if not isinstance(ids, Tensor) or ids.dim() != 1 or ids.is_floating_point() or ids.is_complex():
            raise SteerError(
                f"the tokens are one sequence, a tensor of integers of shape (tokens,); received {shown(ids)}."
            )
        count = ids.numel() // length
        stretches = max(1, min(_STRETCHES, int(count * share)))
        position = torch.arange(count) * stretches % max(1, count)  # in its stretch
        held_out = position >= (1 - share) * count - 1e-6
        keep = torch.ones_like(held_out) if split == "all" else held_out if split == "valid" else ~held_out
        self.length, self.split = length, split
        self.windows = ids[: count * length].view(count, length)[keep]
        if not len(self.windows):
            raise SteerError(
                f"{ids.numel():,} tokens have {count} windows of {length}, none of which is left for the split "
                f"{split!r}. Give a longer text or a shorter `length`."
            )

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = self.windows[index].long()
        return {"input_ids": ids, "labels": ids.clone()}


class ByteBlocks(TokenBlocks):
    """`TokenBlocks` of bytes: the vocabulary is 256, and a loss in nats divided by ln 2 is in bits per byte."""

    def __init__(self, data: bytes, length: int, split: str = "train", share: float = 0.1) -> None:
        if not isinstance(data, (bytes, bytearray)):
            raise SteerError(f"`data` is bytes; received {type(data).__name__}. Encode text: text.encode().")
        super().__init__(torch.from_numpy(np.frombuffer(bytearray(data), dtype=np.uint8)), length, split, share)


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

    Rows are joined with an empty line between them, as usual for perplexity on the raw text, and tokenized without
    special tokens. A loss is per token of this tokenizer, each with at most `length` - 1 before it.

    Args:
        source: a name on the Hub, or a local copy: see `splits`.
        split: one of the data set: here `"train"`, `"validation"` or `"test"`.
        tokenizer: of transformers, or whatever maps a text to a mapping with `input_ids`.
        length: tokens of a window, at least 2.
        config: `"wikitext-2-raw-v1"` (2 million words) or `"wikitext-103-raw-v1"` (103 million).
        column: where the text is.
        limit: tokens that are read at most; None reads all.

    Raises:
        SteerError: the source cannot be had, or has no such split or column, or no text for one window.
    """
    check_integer("length", length, 2)
    if not callable(tokenizer):
        raise SteerError(f"`tokenizer` is a tokenizer, not its name; received {tokenizer!r}.")
    if limit is not None:
        check_integer("limit", limit, length)
    rows = one_split(source, split, config)
    check_columns(rows, [column], source)
    ids: list[int] = []
    for start in range(0, len(rows), _PIECE):
        texts = rows[start : start + _PIECE][column]
        wrong = [type(text).__name__ for text in texts if not isinstance(text, str)]
        if wrong:
            raise SteerError(
                f"the column {column!r} of {named(source)} does not hold text alone: a row from {start} on is a "
                f"{wrong[0]}."
            )
        text = "\n\n".join(texts) + ("\n\n" if start + _PIECE < len(rows) else "")
        ids += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if limit is not None and len(ids) >= limit:
            break
    return TokenBlocks(torch.tensor(ids[:limit], dtype=torch.int64), length, "all")


class Questions(TokenRows):
    """Rows of `squad`, with what generation begins from and is scored against.

    Attributes:
        prompts: of each row, everything before its answer, int64 `(tokens,)` of any length.
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
    the first answer and that end have labels. Rows are filled up to `length` at the right, where nothing that counts
    can see it: no attention mask is needed. A row whose question leaves no token for the context is left out.

    Args:
        source: a name on the Hub, or a local copy with SQuAD's columns context, question and answers: see `splits`.
        split: one of the data set: here `"train"` or `"validation"`.
        tokenizer: a fast tokenizer of transformers.
        length: tokens of a row.
        room: tokens that are kept for the answer and the end; what goes beyond is cut.
        long: what becomes of a context that does not fit. `"answer"` cuts to a part with the answer, at a place in it
            that is drawn from the row's number (in the middle it could be guessed); it uses the answer, so it is for
            training. `"start"` cuts to the beginning, `"drop"` leaves the row out. None is `"answer"` for the train
            split, and `"start"` for others.
        limit: rows that are read at most, evenly spread; None reads all.

    Raises:
        SteerError: an argument outside these ranges, the source cannot be had, or has no such split or columns, a row
            is not in SQuAD's schema, or none is left.
    """
    check_integer("length", length, 2)
    check_integer("room", room, 1)
    long = check_choice("long", long, (*_LONG, None)) or ("answer" if split == "train" else "start")
    if not getattr(tokenizer, "is_fast", False):
        raise SteerError(
            "`tokenizer` is a fast tokenizer of transformers, which says where each token stands in the text; "
            f"received {type(tokenizer).__name__}. transformers.AutoTokenizer gives one."
        )
    fast: Any = tokenizer
    rows = one_split(source, split)
    check_columns(rows, ["context", "question", "answers"], source)
    if limit is not None and check_integer("limit", limit, 1) < len(rows):
        rows = rows.select([i * len(rows) // limit for i in range(limit)])

    def tokens(texts: list[str], **options: bool) -> Any:
        return fast(texts, add_special_tokens=False, verbose=False, **options)

    end = [] if fast.eos_token_id is None else [fast.eos_token_id]
    prompts: list[list[int]] = []
    answers: list[list[int]] = []
    references = []
    for first in range(0, len(rows), _PIECE):
        texts = _texts(rows[first : first + _PIECE], first, source)
        contexts = list(dict.fromkeys(text.context for text in texts))  # one serves several questions
        read = tokens(contexts, return_offsets_mapping=True)
        where = {context: i for i, context in enumerate(contexts)}
        asked = tokens([f"\n\nQuestion: {text.question}\nAnswer:" for text in texts])["input_ids"]
        answered = tokens([f" {text.answers[0]}" for text in texts])["input_ids"]
        for i, text in enumerate(texts):
            k = where[text.context]
            part = _part(read["offset_mapping"][k], text.span, length - room - len(asked[i]), long, first + i)
            if part is not None:
                prompts.append(read["input_ids"][k][part] + asked[i])
                answers.append((answered[i] + end)[:room])
                references.append(text.answers)
    if not prompts:
        raise SteerError(f"none of {len(rows):,} rows fits into {length} tokens. Give a larger `length`.")
    dropped = len(rows) - len(prompts)
    if dropped:
        _log.warning("%d of %d rows of %s are too long, and left out", dropped, len(rows), named(source))
    filler = next((i for i in (fast.pad_token_id, *end) if i is not None), 0)
    ids = torch.full((len(prompts), length), filler, dtype=torch.int32)  # half the memory of int64
    labels = torch.full_like(ids, IGNORE)
    for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        stop = len(prompt) + len(answer)
        ids[i, :stop] = torch.tensor(prompt + answer)
        labels[i, len(prompt) : stop] = torch.tensor(answer)
    return Questions({"input_ids": ids, "labels": labels}, list(map(torch.tensor, prompts)), references, dropped)


class _Text(NamedTuple):
    context: str
    question: str
    answers: list[str]
    span: tuple[int, int]  # where the first answer stands in the context, in characters


def _texts(columns: Mapping[str, list[Any]], first: int, source: Source) -> list[_Text]:
    """Return the texts of some rows, of which `first` is the first one's number, if they are in SQuAD's schema."""
    texts = []
    rows = zip(columns["context"], columns["question"], columns["answers"], strict=True)
    for number, (context, question, answers) in enumerate(rows, first):
        kept: Mapping[str, Any] = answers if isinstance(answers, Mapping) else {}
        right: Any = kept.get("text")
        starts: Any = kept.get("answer_start")
        fits = isinstance(right, list) and isinstance(starts, list) and len(right) == len(starts) > 0
        fits = fits and isinstance(starts[0], int) and all(isinstance(x, str) for x in (context, question, *right))
        if not fits or not 0 <= starts[0] < starts[0] + len(right[0]) <= len(context):
            raise SteerError(
                f"row {number} of {named(source)} is not in SQuAD's schema: context and question are strings, answers "
                "is {'text': [strings], 'answer_start': [an integer each]}, and the first one stands in its context at "
                f"its start; its answers are {answers!r:.200}."
            )
        texts.append(_Text(context, question, right, (starts[0], starts[0] + len(right[0]))))
    return texts


def _part(offsets: list[tuple[int, int]], span: tuple[int, int], most: int, long: str, number: int) -> slice | None:
    """Return which tokens of a context are kept, at most `most`; None if the row is left out."""
    if len(offsets) <= most:
        return slice(None)
    if most < 1 or long == "drop":
        return None
    if long == "start":
        return slice(0, most)
    inside = [i for i, (start, end) in enumerate(offsets) if start < span[1] and end > span[0]]
    if not inside or inside[-1] + 1 - inside[0] > most:
        return None
    lowest, highest = max(0, inside[-1] + 1 - most), min(inside[0], len(offsets) - most)
    start = int(np.random.default_rng(number).integers(lowest, highest + 1))
    return slice(start, start + most)


def squad_scores(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Return SQuAD's `exact_match` and `f1`, from 0 to 1, by the rules of its official script for v1.1.

    Both compare lower-case words without punctuation and the articles a, an and the. F1 is the harmonic mean of
    precision and recall over words, counted with their repetitions. The reference that suits a prediction best counts.

    Args:
        predictions: one per question.
        references: for each of them, the answers that count as right.

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
        if isinstance(right, str) or not right or not all(isinstance(each, str) for each in (prediction, *right)):
            raise SteerError(
                "a prediction is a string, and the references of a question are a list of at least one; received "
                f"{prediction!r} and {right!r}."
            )
        said, wanted = _words(prediction), [_words(answer) for answer in right]
        exact += said in wanted
        f1 += max(_f1(said, answer) for answer in wanted)
    return {"exact_match": exact / len(predictions), "f1": f1 / len(predictions)}


def _words(text: str) -> list[str]:
    """Return the lower-case words of a text without punctuation and articles."""
    return re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(str.maketrans("", "", string.punctuation))).split()


def _f1(predicted: list[str], right: list[str]) -> float:
    common = sum((Counter(predicted) & Counter(right)).values())
    return 2 * common / (len(predicted) + len(right)) if common else 0.0
