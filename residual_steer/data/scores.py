"""SQuAD's two scores (Rajpurkar et al. 2016, arXiv 1606.05250)."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

from residual_steer.errors import SteerError

__all__ = ["squad_scores"]


def squad_scores(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Return SQuAD's exact match and F1, by the rules of its official script for v1.1.

    Both compare lower-case words without punctuation, without the articles a, an and the, and with single spaces. F1
    is the harmonic mean of precision and recall over words, counted with their repetitions. Each prediction is held
    against the reference that suits it best.

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
        exact += max(_normal(prediction) == _normal(answer) for answer in right)
        f1 += max(_f1(prediction, answer) for answer in right)
    return {"exact_match": exact / len(predictions), "f1": f1 / len(predictions)}


def _normal(text: str) -> str:
    text = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def _f1(prediction: str, answer: str) -> float:
    said, right = _normal(prediction).split(), _normal(answer).split()
    common = sum((Counter(said) & Counter(right)).values())
    return 2 * common / (len(said) + len(right)) if common else 0.0
