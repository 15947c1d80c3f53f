"""Windows of tokens, and text of the Hub or of local files for causal language models: WikiText and SQuAD."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from hub_data import WORDS, cache, datasets, jsonl, question, texts, transformers, word_tokenizer  # noqa: F401  # fixture
from residual_steer import SteerError
from residual_steer.data import ByteBlocks, TokenBlocks, squad, squad_scores, wikitext

REFUSED = "is not in SQuAD's schema"


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer()


@pytest.fixture
def squad_folder(tmp_path):
    jsonl(tmp_path / "squad" / "train.jsonl", [question(i) for i in range(30)])
    jsonl(tmp_path / "squad" / "dev.jsonl", [question(i) for i in range(8)])
    return tmp_path / "squad"


def rows_of(questions):
    return datasets.Dataset.from_list(list(questions))


def test_byte_blocks_are_windows_of_the_data():
    item = ByteBlocks(bytes(range(256)) * 4, 16, "all")[3]
    assert list(item) == ["input_ids", "labels"]
    assert {(t.shape, t.dtype) for t in item.values()} == {((16,), torch.int64)}
    assert item["input_ids"].tolist() == item["labels"].tolist() == list(range(48, 64))
    assert item["input_ids"].data_ptr() != item["labels"].data_ptr()


@settings(deadline=None, max_examples=80)
@given(st.integers(2, 9), st.integers(0, 400), st.floats(0.02, 0.9))
def test_splits_do_not_overlap_and_lose_nothing(length, tokens, share):
    parts = []
    for split in ("train", "valid"):
        try:
            parts.append(TokenBlocks(torch.arange(tokens), length, split, share).windows.flatten().tolist())
        except SteerError:
            parts.append([])
    windows = tokens // length
    assert sorted(parts[0] + parts[1]) == list(range(windows * length))
    assert windows * share < 1 or abs(len(parts[1]) / length - windows * share) <= 10


def test_both_splits_see_every_part():
    data = bytes(200) + bytes([1] * 200)
    for split in ("train", "valid"):
        assert set(torch.stack([x["input_ids"] for x in ByteBlocks(data, 4, split)]).unique().tolist()) == {0, 1}


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ByteBlocks(b"x" * 100, 1), "`length`.* 2, .*received 1"),
        (lambda: ByteBlocks(b"x" * 100, 2.5), "`length`.* received 2.5"),
        (lambda: ByteBlocks(b"x" * 100, 4, "test"), "`split`.* train, valid, all; received 'test'"),
        (lambda: ByteBlocks(b"x" * 100, 4, "train", 1.0), "`share`.* received 1.0"),
        (lambda: ByteBlocks(b"x" * 3, 4), "3 tokens .* shorter `length`"),
        (lambda: ByteBlocks(b"", 4, "all"), "0 tokens .* shorter `length`"),
        (lambda: ByteBlocks("text", 4), "received str. Encode text"),
        (lambda: TokenBlocks(torch.zeros(2, 5), 2), r"\(2, 5\)"),
        (lambda: wikitext(texts("one"), tokenizer=word_tokenizer(), length=1), "`length`.* 2; received 1"),
        (lambda: wikitext(texts("one"), tokenizer=word_tokenizer(), length=8, limit=4), "`limit`.* 8; received 4"),
        (lambda: wikitext(texts("one"), tokenizer=word_tokenizer(), length=800), "shorter `length`"),
        (lambda: wikitext(texts(1, 2), tokenizer=word_tokenizer()), "text alone: a row from 0 on is a int"),
    ],
)
def test_windows_that_cannot_be(make, words):
    with pytest.raises(SteerError, match=words):
        make()


def test_wikitext_is_the_text_in_windows_whatever_the_pieces(tokenizer, monkeypatch):
    rows = texts(" = The fox = \n", "", "the hen eats corn at dawn", "red barns")
    ids = tokenizer(" = The fox = \n\n\n\n\nthe hen eats corn at dawn\n\nred barns")["input_ids"]
    many = texts(*(" ".join(WORDS[i % 7 : i % 7 + 4]) for i in range(50)))
    whole = wikitext(many, tokenizer=tokenizer, length=3).windows
    for piece in (1000, 3):
        monkeypatch.setattr("residual_steer.data.text._PIECE", piece)
        data = wikitext(rows, tokenizer=tokenizer, length=4)
        assert data.windows.flatten().tolist() == ids[: len(ids) // 4 * 4]
        assert torch.equal(data[0]["input_ids"], data[0]["labels"])
        assert len(wikitext(rows, tokenizer=tokenizer, length=4, limit=9)) == 2
        assert torch.equal(wikitext(many, tokenizer=tokenizer, length=3).windows, whole)


def test_wikitext_reads_no_further_than_the_limit(tokenizer, monkeypatch):
    monkeypatch.setattr("residual_steer.data.text._PIECE", 2)
    rows = texts("the fox of a hen", "corn at dawn", None)
    assert len(wikitext(rows, tokenizer=tokenizer, length=3, limit=6)) == 2
    with pytest.raises(SteerError, match="a row from 2 on is a NoneType"):
        wikitext(rows, tokenizer=tokenizer, length=3)


def test_squad_rows_are_prompts_with_their_answers(squad_folder, tokenizer):
    data = squad(squad_folder, tokenizer=tokenizer, length=60)
    assert len(data) == len(data.prompts) == len(data.references) == 30
    assert data.dropped == 0
    for i, row in enumerate(data):
        wanted, ids, labels = question(i), row["input_ids"], row["labels"]
        answer = wanted["answers"]["text"][0]
        counts, begin = labels != -100, len(data.prompts[i])
        end = begin + int(counts.sum())
        assert {(t.shape, t.dtype) for t in (ids, labels)} == {((60,), torch.int64)}
        prompt = f"{wanted['context']}\n\nQuestion: {wanted['question']}\nAnswer:"
        assert tokenizer.decode(data.prompts[i]) == tokenizer.decode(ids[:begin]) == prompt
        assert tokenizer.decode(labels[counts]) == f" {answer}<end>"
        assert torch.equal(labels[begin:end], ids[begin:end])
        assert counts[begin:end].all()
        assert set(ids[end:].tolist()) == {tokenizer.eos_token_id}
        assert data.references[i] == [answer, f"The {answer}"]


def test_a_models_loss_is_over_the_answers(squad_folder, tokenizer):
    config = transformers.GPT2Config(
        vocab_size=len(tokenizer), n_positions=60, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    data = squad(squad_folder, "validation", tokenizer=tokenizer, length=60)
    with torch.no_grad():
        together = model(**next(iter(DataLoader(data, batch_size=4)))).loss
        alone = []
        for prompt, row in zip(data.prompts[:4], data, strict=False):
            answer = row["labels"][row["labels"] != -100]
            chances = model(input_ids=torch.cat([prompt, answer])[None]).logits[0].log_softmax(-1)  # without filling
            alone.append(-chances[len(prompt) - 1 : -1].gather(1, answer[:, None]))
    torch.testing.assert_close(together, torch.cat(alone).mean())


def test_long_contexts_are_cut_around_the_answer(tokenizer, monkeypatch):
    rows = rows_of(question(i, words=40) for i in range(60))
    data = squad(rows, tokenizer=tokenizer, length=30, room=6)
    places = []
    for i, prompt in enumerate(data.prompts):
        wanted = question(i, words=40)
        context, _, rest = tokenizer.decode(prompt).partition("\n\nQuestion: ")
        assert rest == f"{wanted['question']}\nAnswer:"
        assert len(prompt) == 30 - 6
        start = wanted["context"].index(context)
        first = wanted["answers"]["answer_start"][0]
        assert start <= first
        assert first + len(wanted["answers"]["text"][0]) <= start + len(context)
        if 60 < first < len(wanted["context"]) - 60:
            places.append((first - start) / len(context))
    assert min(places) < 0.25  # not always in the same place, which could be guessed
    assert max(places) > 0.6
    monkeypatch.setattr("residual_steer.data.text._PIECE", 7)
    pieces = squad(rows, tokenizer=tokenizer, length=30, room=6)
    assert all(map(torch.equal, data.prompts, pieces.prompts))
    assert all(torch.equal(data.columns[name], pieces.columns[name]) for name in data.columns)


def test_long_contexts_otherwise(tokenizer, logged):
    long = [*(question(i, words=40) for i in range(5)), question(9)]
    rows = datasets.DatasetDict(validation=rows_of(long))
    data = squad(rows, "validation", tokenizer=tokenizer, length=30, room=6)
    for wanted, prompt in zip(long, data.prompts, strict=True):
        assert wanted["context"].startswith(tokenizer.decode(prompt).partition("\n\nQuestion: ")[0])
    fits = len(tokenizer(f"{long[5]['context']}\n\nQuestion: {long[5]['question']}\nAnswer:")["input_ids"])
    kept = squad(rows, "validation", tokenizer=tokenizer, length=fits + 6, room=6, long="drop")
    assert (len(kept), kept.dropped, kept.references) == (1, 5, [long[5]["answers"]["text"]])
    assert "5 of 6 rows of the data set in memory are too long, and left out" in logged.getvalue()


def test_answers_that_are_longer_than_the_room_or_the_context_left(tokenizer):
    row = question(0)
    row["answers"] = {"text": [row["context"]], "answer_start": [0]}
    data = squad(rows_of([row]), tokenizer=tokenizer, length=60, room=3)
    assert int((data[0]["labels"] != -100).sum()) == 3
    both = squad(rows_of([row, question(1)]), tokenizer=tokenizer, length=20, room=4)
    assert (both.dropped, both.references) == (1, [question(1)["answers"]["text"]])


def test_limits_are_spread_over_the_split(squad_folder, tokenizer):
    data = squad(squad_folder, tokenizer=tokenizer, length=60, limit=3)
    assert data.references == [question(i)["answers"]["text"] for i in (0, 10, 20)]
    assert len(squad(squad_folder, tokenizer=tokenizer, length=60, limit=99)) == 30


@pytest.mark.parametrize(
    "change",
    [
        {"answers": {"text": [], "answer_start": []}},
        {"answers": {"text": ["a"], "answer_start": [5000]}},
        {"answers": {"text": ["a"], "answer_start": [-1]}},
        {"answers": {"text": [""], "answer_start": [0]}},
        {"answers": {"text": [None], "answer_start": [0]}},
        {"context": None},
        {"question": None},
    ],
)
def test_rows_that_are_not_squads(tokenizer, change):
    with pytest.raises(SteerError, match=f"row 1 of .* {REFUSED}"):
        squad(rows_of([question(0), question(1) | change]), tokenizer=tokenizer)


@pytest.mark.parametrize("answers", ["dawn", ["dawn"], {"text": "dawn", "answer_start": 3}, {"text": ["dawn"]}])
def test_answers_of_another_type(tokenizer, answers):
    with pytest.raises(SteerError, match=f"row 0 of .* {REFUSED}.* its answers are .*dawn"):
        squad(rows_of([question(0) | {"answers": answers}]), tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"length": 0}, "`length`.* received 0"),
        ({"room": 0}, "`room`.* received 0"),
        ({"limit": 0}, "`limit`.* received 0"),
        ({"long": "middle"}, "`long` is one of answer, start, drop, None; received 'middle'"),
        ({"tokenizer": str.split}, "`tokenizer` is a fast tokenizer.* received method_descriptor"),
        ({"length": 8, "room": 2}, r"none of 1 rows fits into 8 tokens\. Give a larger `length`"),
    ],
)
def test_squad_errors(tokenizer, options, words):
    with pytest.raises(SteerError, match=words):
        squad(rows_of([question(0)]), **{"tokenizer": tokenizer, **options})


@pytest.mark.parametrize(
    ("prediction", "references", "exact", "f1"),
    [
        ("Denver Broncos", ["Denver Broncos", "the Broncos"], 1, 1),
        ("the  Denver\tbroncos!", ["Denver Broncos"], 1, 1),
        ("Broncos", ["Denver Broncos"], 0, 2 / 3),  # precision 1, recall 1/2
        ("a cat and an owl", ["the cat"], 0, 0.5),  # "cat and owl" and "cat": 1/3 and 1
        ("cat cat", ["cat"], 0, 2 / 3),  # repeated words count once in common
        ("cat cat dog", ["cat cat"], 0, 0.8),
        ("", ["cat"], 0, 0),
        ("the", ["a"], 1, 0),  # both empty: equal, without a common word, as the official script has it
        ("state-of-the-art", ["stateoftheart"], 1, 1),
        ("in 1,066", ["1066", "year 1066"], 0, 2 / 3),
        ("theatre", ["atre"], 0, 0),  # articles are whole words
        ("fox", ["hen", "fox"], 1, 1),
        ("dog", ["hen", "fox"], 0, 0),
    ],
)
def test_squad_scores(prediction, references, exact, f1):
    assert squad_scores([prediction], [references]) == {"exact_match": exact, "f1": pytest.approx(f1)}
    means = {"exact_match": pytest.approx((exact + 1) / 2), "f1": pytest.approx((f1 + 1) / 2)}
    assert squad_scores([prediction, "b"], [references, ["b"]]) == means


@pytest.mark.parametrize("arguments", [([], []), (["a"], []), ("a", ["b"]), (["a"], ["a"]), (["a"], [[]])])
def test_squad_scores_errors(arguments):
    with pytest.raises(SteerError, match="received"):
        squad_scores(*arguments)
