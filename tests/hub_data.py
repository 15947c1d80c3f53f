"""Small data sets in the schemas of the Hub's, and a tokenizer: what the tests of `residual_steer.data` share."""

import functools
import json

import pytest

datasets = pytest.importorskip("datasets")
transformers = pytest.importorskip("transformers")

WORDS = (
    "the fox of a hen eats corn at dawn in red barns and sleeps near old wells while dogs bark".split()  # noqa: SIM905
    + "Some Cows Like Green Hills When Rain Falls On Their Backs But Not Now Since Noon Was Dry Here".split()  # noqa: SIM905
)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """What `datasets` prepares goes into a folder of the test's."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("prepared")))
    datasets.disable_progress_bars()


@functools.cache
def word_tokenizer():
    """Return a fast tokenizer with a token for every word, with the space before it."""
    import tokenizers

    texts = [f"{word} {word.title()} {word}. {word}, {word}?" for word in WORDS]
    texts.append("Question: Answer:\n\nWho When 0123456789 =")
    model = tokenizers.ByteLevelBPETokenizer()
    model.train_from_iterator(texts * 3, vocab_size=2000, show_progress=False)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=model._tokenizer, eos_token="<end>")


def question(number, words=12):
    """A row of SQuAD: its answer is two words of its context."""
    context = [WORDS[(number + i) % len(WORDS)] for i in range(words)]
    position = 1 + number % (words - 2)
    answer = " ".join(context[position : position + 2])
    start = len(" ".join(context[:position])) + 1
    answers = {"text": [answer, f"The {answer}"], "answer_start": [start, start]}
    asked = f"Who {WORDS[number % len(WORDS)]}?"
    return {"id": str(number), "title": "T", "context": " ".join(context), "question": asked, "answers": answers}


def texts(*rows):
    return datasets.Dataset.from_dict({"text": list(rows)})


def jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
