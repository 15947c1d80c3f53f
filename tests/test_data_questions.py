"""Text of the Hub or of local files, for causal language models: WikiText and SQuAD."""

import pytest
import torch
from torch.utils.data import DataLoader

from hub_data import WORDS, datasets, jsonl, question, transformers, word_tokenizer
from residual_steer import SteerError
from residual_steer.data import squad, squad_scores, wikitext


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    """What `datasets` prepares goes into a folder of the test's."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("prepared")))
    datasets.disable_progress_bars()


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer()


@pytest.fixture
def squad_folder(tmp_path):
    jsonl(tmp_path / "squad" / "train.jsonl", [question(i) for i in range(30)])
    jsonl(tmp_path / "squad" / "dev.jsonl", [question(i) for i in range(8)])
    return tmp_path / "squad"


def test_wikitext_is_the_text_in_windows(tokenizer):
    rows = datasets.Dataset.from_dict({"text": [" = The fox = \n", "", "the hen eats corn at dawn", "red barns"]})
    ids = tokenizer(" = The fox = \n\n\n\n\nthe hen eats corn at dawn\n\nred barns")["input_ids"]
    data = wikitext(rows, tokenizer=tokenizer, length=4)
    assert data.windows.flatten().tolist() == ids[: len(ids) // 4 * 4]
    assert torch.equal(data[0]["input_ids"], data[0]["labels"])
    assert len(wikitext(rows, tokenizer=tokenizer, length=4, limit=9)) == 2


def test_wikitext_reads_no_further_than_the_limit(tokenizer, monkeypatch):
    monkeypatch.setattr("residual_steer.data.text._PIECE", 2)
    rows = datasets.Dataset.from_dict({"text": ["the fox of a hen", "corn at dawn", None]})
    assert len(wikitext(rows, tokenizer=tokenizer, length=3, limit=6)) == 2
    with pytest.raises(SteerError, match="a row from 2 on is a NoneType"):
        wikitext(rows, tokenizer=tokenizer, length=3)


def test_wikitext_in_pieces_is_the_same_text(tokenizer, monkeypatch):
    rows = datasets.Dataset.from_dict({"text": [" ".join(WORDS[i % 7 : i % 7 + 4]) for i in range(50)]})
    whole = wikitext(rows, tokenizer=tokenizer, length=3).windows
    monkeypatch.setattr("residual_steer.data.text._PIECE", 7)
    assert torch.equal(wikitext(rows, tokenizer=tokenizer, length=3).windows, whole)


@pytest.mark.parametrize(
    ("rows", "options", "said"),
    [
        (["one"], {"length": 1}, "`length` is an integer of at least 2"),
        (["one"], {"length": 8, "limit": 4}, "`limit` is an integer of at least 8; received 4"),
        (["one"], {"length": 800}, "shorter `length`"),
        ([1, 2], {}, "does not hold text alone: a row from 0 on is a int"),
        (["a", None], {}, "does not hold text alone: a row from 0 on is a NoneType"),
    ],
)
def test_wikitext_errors(tokenizer, rows, options, said):
    with pytest.raises(SteerError, match=said):
        wikitext(datasets.Dataset.from_dict({"text": rows}), tokenizer=tokenizer, **options)


def test_squad_rows_are_prompts_with_their_answers(squad_folder, tokenizer):
    data = squad(squad_folder, tokenizer=tokenizer, length=60)
    assert len(data) == len(data.prompts) == len(data.references) == 30
    assert data.dropped == 0
    end = tokenizer.eos_token_id
    for i, row in enumerate(data):
        wanted = question(i)
        answer = wanted["answers"]["text"][0]
        prompt = f"{wanted['context']}\n\nQuestion: {wanted['question']}\nAnswer:"
        counts = row["labels"] != -100
        assert {name: (t.shape, t.dtype) for name, t in row.items()} == {
            "input_ids": ((60,), torch.int64),
            "labels": ((60,), torch.int64),
        }
        assert tokenizer.decode(data.prompts[i]) == prompt
        assert tokenizer.decode(row["labels"][counts]) == f" {answer}<end>"
        assert torch.equal(row["labels"][counts], row["input_ids"][counts])
        begin = len(data.prompts[i])
        assert row["input_ids"][:begin].tolist() == data.prompts[i].tolist()
        assert counts.nonzero().flatten().tolist() == list(range(begin, begin + int(counts.sum())))
        assert set(row["input_ids"][begin + int(counts.sum()) :].tolist()) == {end}
        assert data.references[i] == [answer, f"The {answer}"]


def test_a_models_loss_is_over_the_answers(squad_folder, tokenizer):
    config = transformers.GPT2Config(
        vocab_size=len(tokenizer), n_positions=60, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    data = squad(squad_folder, "validation", tokenizer=tokenizer, length=60)
    batch = next(iter(DataLoader(data, batch_size=4)))
    with torch.no_grad():
        together = model(**batch).loss
        total, count = 0.0, 0
        for i in range(4):
            answer = data[i]["labels"][data[i]["labels"] != -100]
            ids = torch.cat([data.prompts[i], answer])[None]  # without what fills the row
            chances = model(input_ids=ids).logits[0].log_softmax(-1)
            for k in range(len(answer)):
                total -= chances[len(data.prompts[i]) + k - 1, answer[k]].item()
                count += 1
    assert together.item() == pytest.approx(total / count, rel=1e-5)


def test_long_contexts_are_cut_around_the_answer(tokenizer):
    rows = datasets.Dataset.from_list([question(i, words=40) for i in range(60)])
    data = squad(rows, tokenizer=tokenizer, length=30, room=6)
    places = []
    for i, prompt in enumerate(data.prompts):
        wanted = question(i, words=40)
        context, _, rest = tokenizer.decode(prompt).partition("\n\nQuestion: ")
        assert rest == f"{wanted['question']}\nAnswer:"
        assert context in wanted["context"]
        assert len(prompt) == 30 - 6
        start, end = (wanted["context"].index(context) + n for n in (0, len(context)))
        first = wanted["answers"]["answer_start"][0]
        assert start <= first
        assert first + len(wanted["answers"]["text"][0]) <= end
        if 60 < first < len(wanted["context"]) - 60:
            places.append((first - start) / len(context))
    assert min(places) < 0.25  # not always in the same place, which could be guessed
    assert max(places) > 0.6
    again = squad(rows, tokenizer=tokenizer, length=30, room=6)
    assert all(torch.equal(a, b) for a, b in zip(data.prompts, again.prompts, strict=True))


def test_long_contexts_otherwise(tokenizer, caplog):
    long = [question(i, words=40) for i in range(5)]
    rows = datasets.DatasetDict(validation=datasets.Dataset.from_list([*long, question(9)]))
    data = squad(rows, "validation", tokenizer=tokenizer, length=30, room=6)
    for wanted, prompt in zip([*long, question(9)], data.prompts, strict=True):
        assert wanted["context"].startswith(tokenizer.decode(prompt).partition("\n\nQuestion: ")[0])
    fits = len(tokenizer(f"{question(9)['context']}\n\nQuestion: {question(9)['question']}\nAnswer:")["input_ids"])
    kept = squad(rows, "validation", tokenizer=tokenizer, length=fits + 6, room=6, long="drop")
    assert (len(kept), kept.dropped) == (1, 5)
    assert kept.references == [question(9)["answers"]["text"]]
    assert "5 of 6 rows of the data set in memory are too long, and left out" in caplog.text


def test_answers_beyond_the_room_are_cut(tokenizer):
    row = question(0)
    row["answers"] = {"text": [row["context"]], "answer_start": [0]}
    data = squad(datasets.Dataset.from_list([row]), tokenizer=tokenizer, length=60, room=3)
    assert int((data[0]["labels"] != -100).sum()) == 3


def test_limits_are_spread_over_the_split(squad_folder, tokenizer):
    data = squad(squad_folder, tokenizer=tokenizer, length=60, limit=3)
    assert data.references == [question(i)["answers"]["text"] for i in (0, 10, 20)]
    assert len(squad(squad_folder, tokenizer=tokenizer, length=60, limit=99)) == 30


def test_questions_in_pieces_are_the_same(squad_folder, tokenizer, monkeypatch):
    whole = squad(squad_folder, tokenizer=tokenizer, length=24, room=4).columns
    monkeypatch.setattr("residual_steer.data.text._PIECE", 7)
    pieces = squad(squad_folder, tokenizer=tokenizer, length=24, room=4).columns
    assert all(torch.equal(whole[name], pieces[name]) for name in whole)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda row: row | {"answers": {"text": [], "answer_start": []}}, "row 1 of .* is not in SQuAD's schema"),
        (
            lambda row: row | {"answers": {"text": ["a"], "answer_start": [5000]}},
            "row 1 of .* is not in SQuAD's schema",
        ),
        (lambda row: row | {"answers": {"text": ["a"], "answer_start": [-1]}}, "is not in SQuAD's schema"),
        (lambda row: row | {"answers": {"text": [""], "answer_start": [0]}}, "is not in SQuAD's schema"),
        (lambda row: row | {"context": None}, "row 1 of .* is not in SQuAD's schema"),
        (lambda row: row | {"question": None}, "is not in SQuAD's schema"),
    ],
)
def test_rows_that_are_not_squads(tokenizer, change, said):
    rows = datasets.Dataset.from_list([question(0), change(question(1))])
    with pytest.raises(SteerError, match=said):
        squad(rows, tokenizer=tokenizer)


@pytest.mark.parametrize("answers", ["dawn", ["dawn"], {"text": "dawn", "answer_start": 3}, {"text": ["dawn"]}])
def test_answers_of_another_type(tokenizer, answers):
    rows = datasets.Dataset.from_list([question(0) | {"answers": answers}])
    with pytest.raises(SteerError, match=r"answers is {'text': .* its answers are"):
        squad(rows, tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"length": 0}, "`length`"),
        ({"room": 0}, "`room`"),
        ({"limit": 0}, "`limit`"),
        ({"long": "middle"}, "`long` is one of answer, start, drop, None; received 'middle'"),
        ({"tokenizer": str.split}, "`tokenizer` is a fast tokenizer"),
        ({"length": 8, "room": 2}, r"none of 1 rows fits into 8 tokens\. Give a larger `length`"),
    ],
)
def test_squad_errors(tokenizer, options, said):
    with pytest.raises(SteerError, match=said):
        squad(datasets.Dataset.from_list([question(0)]), **{"tokenizer": tokenizer, **options})


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
    scores = squad_scores([prediction], [references])
    assert scores == {"exact_match": exact, "f1": pytest.approx(f1)}


def test_squad_scores_are_means():
    assert squad_scores(["a", "b b", "c"], [["a"], ["b"], ["d"]]) == {
        "exact_match": pytest.approx(1 / 3),
        "f1": pytest.approx((0 + 2 / 3 + 0) / 3),  # "a" is an article: right, without a word in common
    }


@pytest.mark.parametrize("arguments", [([], []), (["a"], []), ("a", ["b"]), (["a"], ["a"]), (["a"], [[]])])
def test_squad_scores_errors(arguments):
    with pytest.raises(SteerError, match="received"):
        squad_scores(*arguments)
