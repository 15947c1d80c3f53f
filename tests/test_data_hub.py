"""Data sets of the Hub and of local files: small ones, in the schemas of the real ones, made here."""

import json

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from residual_steer import SteerError
from residual_steer.data import Pixels, images, plan, splits, squad, squad_scores, vtab, wikitext

datasets = pytest.importorskip("datasets")
transformers = pytest.importorskip("transformers")
Image = pytest.importorskip("PIL.Image")

WORDS = (
    "the fox of a hen eats corn at dawn in red barns and sleeps near old wells while dogs bark".split()  # noqa: SIM905
    + "Some Cows Like Green Hills When Rain Falls On Their Backs But Not Now Since Noon Was Dry Here".split()  # noqa: SIM905
)


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    """What `datasets` prepares goes into a folder of the test's."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("prepared")))
    datasets.disable_progress_bars()


@pytest.fixture(scope="module")
def tokenizer():
    """One token per word, with the space before it."""
    import tokenizers

    texts = [f"{word} {word.title()} {word}. {word}, {word}?" for word in WORDS] + [
        "Question: Answer:\n\nWho When 0123456789 ="
    ]
    model = tokenizers.ByteLevelBPETokenizer()
    model.train_from_iterator(texts * 3, vocab_size=2000, show_progress=False)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=model._tokenizer, eos_token="<end>")


def question(number, words=12):
    """A row of SQuAD: its answer is two words of its context."""
    context = " ".join(WORDS[(number + i) % len(WORDS)] for i in range(words))
    position = 1 + number % (words - 2)
    answer = " ".join(context.split()[position : position + 2])
    start = len(" ".join(context.split()[:position])) + 1
    asked = f"Who {WORDS[number % len(WORDS)]}?"
    answers = {"text": [answer, f"The {answer}"], "answer_start": [start, start]}
    return {"id": str(number), "title": "T", "context": context, "question": asked, "answers": answers}


def jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def squad_folder(tmp_path):
    jsonl(tmp_path / "squad" / "train.jsonl", [question(i) for i in range(30)])
    jsonl(tmp_path / "squad" / "dev.jsonl", [question(i) for i in range(8)])
    return tmp_path / "squad"


# Where data come from


def some_rows():
    return datasets.Dataset.from_dict({"text": ["one two", "", "three"]})


def save_to_disk(folder):
    datasets.DatasetDict({"train": some_rows(), "test": some_rows().select([0])}).save_to_disk(folder)


def save_parquet(folder):
    folder.mkdir()
    some_rows().to_parquet(folder / "train-00000-of-00001.parquet")
    some_rows().select([0]).to_parquet(folder / "test-00000-of-00001.parquet")


def save_json(folder):
    jsonl(folder / "train.jsonl", some_rows())
    (folder / "test.jsonl").write_text('{"text": "one two"}\n')


def save_under_config(folder):
    save_json(folder / "small")


@pytest.mark.parametrize("save", [save_to_disk, save_parquet, save_json, save_under_config])
def test_local_folders(tmp_path, save):
    save(tmp_path / "data")
    parts = splits(tmp_path / "data", "small")
    assert {name: list(rows["text"]) for name, rows in parts.items()} == {
        "train": ["one two", "", "three"],
        "test": ["one two"],
    }
    assert plan(str(tmp_path / "data")).download is False


def test_a_copy_of_a_repository_with_configurations(tmp_path):
    for name, text in (("small", "few"), ("large", "many")):
        jsonl(tmp_path / name / "train.jsonl", [{"text": text}])
    configs = [{"config_name": name, "data_dir": name} for name in ("small", "large")]
    (tmp_path / "README.md").write_text("---\n" + json.dumps({"configs": configs}) + "\n---\n")
    (tmp_path / "large").rename(tmp_path / "big")
    configs[1]["data_dir"] = "big"
    (tmp_path / "README.md").write_text("---\n" + json.dumps({"configs": configs}) + "\n---\n")
    assert splits(tmp_path, "large")["train"]["text"][0] == "many"
    with pytest.raises(SteerError, match="has the configurations small, large; received 'huge'"):
        splits(tmp_path, "huge")


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train-v1.parquet", "train"),
        ("validation.parquet", "validation"),
        ("squad_dev.parquet", "validation"),
        ("my-test-set.parquet", "test"),
        ("latest.parquet", "train"),
        ("anything.parquet", "train"),
    ],
)
def test_the_split_of_a_file_is_in_its_name(tmp_path, name, split):
    some_rows().to_parquet(tmp_path / name)
    assert list(splits(tmp_path / name)) == [split]


def test_a_lone_saved_data_set_is_the_split_it_says_it_is(tmp_path):
    some_rows().save_to_disk(tmp_path / "plain")
    datasets.Dataset.from_dict({"text": ["x"]}, split="validation").save_to_disk(tmp_path / "named")
    assert list(splits(tmp_path / "plain")) == ["train"]
    assert list(splits(tmp_path / "named")) == ["validation"]


def test_data_in_memory():
    rows = some_rows()
    assert splits(rows) == {"train": rows}
    assert splits(datasets.DatasetDict(test=rows))["test"] is rows
    assert str(plan(datasets.DatasetDict(test=rows))) == "data in memory: nothing to download; rows: test 3"
    for wrong in (7, None, {"train": [1, 2]}):
        for function in (splits, plan):
            with pytest.raises(SteerError, match=r"named by a path or by 'owner/name' on the Hub.*received"):
                function(wrong)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: path.mkdir(), "has none of these"),
        (lambda path: path.write_text("x"), "is none of these"),
    ],
)
def test_a_place_without_data(tmp_path, make, said):
    make(tmp_path / "data")
    with pytest.raises(SteerError, match=said) as caught:
        splits(tmp_path / "data")
    assert "a folder that `save_to_disk` wrote" in str(caught.value)


@pytest.mark.parametrize(("name", "content"), [("a.parquet", b"nonsense"), ("a.jsonl", b"{nonsense"), ("a.jsonl", b"")])
def test_damaged_files(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SteerError, match=r"the data in '.*a\.\w+' cannot be had: .*Look at the files\.") as caught:
        splits(tmp_path / name)
    assert "\n" not in str(caught.value)
    assert "error occurred while" not in str(caught.value)


@pytest.mark.parametrize(
    "name",
    ["nothing", "./no/where", "/no/where.parquet", "a/b/c", "~/none", "~nobody-here/data", "-a/b", "x" * 5000, ""],
)
def test_names_that_are_neither_here_nor_on_the_hub(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SteerError, match=r"no file or folder '.*', and it is no name on the Hub"):
        splits(name)


@pytest.mark.parametrize(
    "read",
    [
        lambda t: squad(tokenizer=t),
        lambda t: wikitext(tokenizer=t),
        lambda t: images("owner/pictures"),
        lambda t: vtab("cifar100"),
        lambda t: vtab("svhn", "test"),
        lambda t: plan("owner/name"),
    ],
)
def test_without_a_network(read, tokenizer):
    with pytest.raises(
        SteerError, match=r"the data set '[\w-]+/[\w-]+'.* cannot be had: the Hub was not asked"
    ) as caught:
        read(tokenizer)
    message = str(caught.value)
    assert "HF_HUB_OFFLINE" in message
    assert "save_to_disk(folder)" in message
    assert "\n" not in message


def test_what_was_wanted_is_said_with_its_configuration():
    with pytest.raises(SteerError, match=r"'ufldl-stanford/svhn' \(cropped_digits\) cannot be had") as caught:
        vtab("svhn")
    assert "datasets.load_dataset('ufldl-stanford/svhn', 'cropped_digits').save_to_disk(folder)" in str(caught.value)


def test_a_hub_that_does_not_answer(monkeypatch):
    def unreachable(*arguments, **options):
        raise ConnectionError("Couldn't reach 'owner/name' on the Hub (ConnectError)")

    monkeypatch.setattr(datasets, "load_dataset_builder", unreachable)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(SteerError, match="the Hub could not be reached, and it is not in the cache"):
        splits("owner/name")


def test_without_datasets(monkeypatch):
    import importlib

    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(SteerError, match=r"pip install .residual-steer\[datasets\]"):
        images("owner/name")


def test_splits_and_columns_that_are_not_there(tmp_path, tokenizer):
    save_parquet(tmp_path / "data")
    with pytest.raises(SteerError, match=r"has no split 'validation'; it has train, test\."):
        wikitext(tmp_path / "data", "validation", tokenizer=tokenizer)
    with pytest.raises(SteerError, match=r"has no column 'words'; its columns are text\."):
        wikitext(tmp_path / "data", column="words", tokenizer=tokenizer)
    with pytest.raises(
        SteerError, match=r"no column 'context' and none 'question' and none 'answers'; its columns are"
    ):
        squad(tmp_path / "data", tokenizer=tokenizer)
    with pytest.raises(SteerError, match=r"the split 'train' of the data set in memory has no rows"):
        wikitext(some_rows().select([]), tokenizer=tokenizer)
    with pytest.raises(SteerError, match=r"has no columns of images, and one is needed\. Its columns are text"):
        images(some_rows())


def test_one_folder_for_each_saved_configuration(tmp_path):
    for name in ("small", "large"):
        datasets.Dataset.from_dict({"text": [name]}).save_to_disk(tmp_path / name)
    assert list(splits(tmp_path, "large")["train"]["text"]) == ["large"]


def test_an_error_of_many_lines_becomes_one(monkeypatch):
    def several(*arguments, **options):
        raise ValueError("Config name is missing.\nPlease pick one among ['a', 'b']\n")

    monkeypatch.setattr(datasets, "load_dataset_builder", several)
    with pytest.raises(
        SteerError, match=r"ValueError: Config name is missing\. Please pick one among \['a', 'b'\]\. Give"
    ):
        splits("owner/name")


def test_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    save_json(tmp_path / "data")
    assert list(splits("~/data")) == ["train", "test"]


# Text


def test_wikitext_is_the_text_in_windows(tokenizer):
    rows = datasets.Dataset.from_dict({"text": [" = The fox = \n", "", "the hen eats corn at dawn", "red barns"]})
    ids = tokenizer(" = The fox = \n\n\n\n\nthe hen eats corn at dawn\n\nred barns")["input_ids"]
    data = wikitext(rows, tokenizer=tokenizer, length=4)
    assert data.windows.flatten().tolist() == ids[: len(ids) // 4 * 4]
    assert torch.equal(data[0]["input_ids"], data[0]["labels"])
    assert len(wikitext(rows, tokenizer=tokenizer, length=4, limit=9)) == 2


def test_wikitext_reads_no_further_than_the_limit(tokenizer, monkeypatch):
    monkeypatch.setattr("residual_steer.data.language._PIECE", 2)
    rows = datasets.Dataset.from_dict({"text": ["the fox of a hen", "corn at dawn", None]})
    assert len(wikitext(rows, tokenizer=tokenizer, length=3, limit=6)) == 2
    with pytest.raises(SteerError, match="a row from 2 on is a NoneType"):
        wikitext(rows, tokenizer=tokenizer, length=3)


def test_wikitext_in_pieces_is_the_same_text(tokenizer, monkeypatch):
    rows = datasets.Dataset.from_dict({"text": [" ".join(WORDS[i % 7 : i % 7 + 4]) for i in range(50)]})
    whole = wikitext(rows, tokenizer=tokenizer, length=3).windows
    monkeypatch.setattr("residual_steer.data.language._PIECE", 7)
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


# Questions


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
    monkeypatch.setattr("residual_steer.data.questions._PIECE", 7)
    pieces = squad(squad_folder, tokenizer=tokenizer, length=24, room=4).columns
    assert all(torch.equal(whole[name], pieces[name]) for name in whole)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda row: row | {"answers": {"text": [], "answer_start": []}}, "row 1 of .* is not in SQuAD's schema"),
        (lambda row: row | {"answers": {"text": ["a"], "answer_start": [5000]}}, "row 1 of .* does not stand in its"),
        (lambda row: row | {"answers": {"text": ["a"], "answer_start": [-1]}}, "does not stand in its context"),
        (lambda row: row | {"answers": {"text": [""], "answer_start": [0]}}, "does not stand in its context"),
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
        ({"long": "middle"}, "`long` is one of answer, start, drop or None; received 'middle'"),
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


# Images


def picture(value, size=(6, 6), mode="RGB"):
    return Image.fromarray(np.full((*size, 3), value % 256, dtype=np.uint8)).convert(mode)


def cifar(count):
    """Rows in CIFAR-100's schema, whose grey level is their number."""
    columns = {
        "img": [picture(i) for i in range(count)],
        "fine_label": [(i * 7) % 100 for i in range(count)],
        "coarse_label": [i % 20 for i in range(count)],
    }
    features = datasets.Features({
        "img": datasets.Image(),
        "fine_label": datasets.ClassLabel(names=[f"fine{i}" for i in range(100)]),
        "coarse_label": datasets.ClassLabel(names=[f"coarse{i}" for i in range(20)]),
    })  # fmt: skip
    return datasets.Dataset.from_dict(columns, features=features)


def svhn(count):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=10)})
    columns = {"image": [picture(i) for i in range(count)], "label": [i % 10 for i in range(count)]}
    return datasets.Dataset.from_dict(columns, features=features)


def level(image):
    """Return the grey level that `Pixels` was given."""
    assert image.std() < 1e-6
    return round((image.mean().item() * 0.5 + 0.5) * 255)


def test_images_of_cifar_100():
    data = images(cifar(12), prepare=Pixels(size=8))
    assert len(data) == 12
    assert len(data.classes) == 100
    assert data.classes[3] == "fine3"
    image, label = data[5]
    assert image.shape == (3, 8, 8)
    assert image.dtype == torch.float32
    assert (level(image), label) == (5, 35)
    coarse = images(cifar(12), label="coarse_label", prepare=Pixels(size=8))
    assert (coarse[5][1], len(coarse.classes)) == (5, 20)
    x, y = next(iter(DataLoader(data, batch_size=4)))
    assert x.shape == (4, 3, 8, 8)
    assert y.dtype == torch.int64


def test_images_default_to_what_vit_takes():
    assert images(svhn(1))[0][0].shape == (3, 224, 224)


def test_images_of_a_saved_data_set_in_another_format(tmp_path):
    datasets.DatasetDict(test=svhn(4)).save_to_disk(tmp_path / "svhn")
    data = images(tmp_path / "svhn", "test", config="cropped_digits", prepare=Pixels(size=4))
    assert [(level(image), label) for image, label in data] == [(i, i) for i in range(4)]
    tensors = images(svhn(4).with_format("torch"), prepare=Pixels(size=4))
    undecoded = images(svhn(4).cast_column("image", datasets.Image(decode=False)), prepare=Pixels(size=4))
    for other in (tensors, undecoded):
        assert [level(image) for image, _ in other] == [0, 1, 2, 3]


def test_images_in_folders(tmp_path):
    for split in ("train", "test"):
        for value, name in ((40, "dark"), (200, "light")):
            (tmp_path / split / name).mkdir(parents=True)
            picture(value, mode="L").save(tmp_path / split / name / "0.png")
    data = images(tmp_path, "test", prepare=Pixels(size=4))
    assert data.classes == ("dark", "light")
    assert [(level(image), label) for image, label in data] == [(40, 0), (200, 1)]


def test_classes_without_names_are_counted_over_all_splits():
    def part(labels):
        return datasets.Dataset.from_dict(
            {"image": [picture(0) for _ in labels], "class": labels},
            features=datasets.Features({"image": datasets.Image(), "class": datasets.Value("string")}),
        )

    parts = datasets.DatasetDict(train=part(["cow", "ape"]), test=part(["bee", "cow"]))
    train, test = images(parts, "train"), images(parts, "test")
    assert train.classes == test.classes == ("ape", "bee", "cow")
    assert (train.labels, test.labels) == ([2, 0], [1, 2])
    numbers = datasets.Dataset.from_dict({"image": [picture(0)] * 3, "label": [10, 1, 9]}).cast_column(
        "image", datasets.Image()
    )
    assert images(numbers).labels == [2, 0, 1]


def twice(row):
    return {"more": row["image"]}


@pytest.mark.parametrize(
    ("change", "options", "said"),
    [
        (lambda rows: rows.remove_columns("label"), {}, r"has no column 'label'; its columns are image\."),
        (lambda rows: rows, {"label": "kind"}, r"has no column 'kind'; its columns are image, label\."),
        (lambda rows: rows, {"image": "label"}, "the column 'label' of the data set in memory holds no images"),
        (lambda rows: rows.map(twice), {}, "2 columns of images, .* name it: `image`"),
        (lambda rows: rows.remove_columns("label").add_column("label", [0.5, 1.5]), {}, "a whole number or a string"),
        (
            lambda rows: rows.remove_columns("label").add_column("label", [None, 1]),
            {},
            "1 of 2 rows of .* have no 'label'",
        ),
        (lambda rows: rows.map(lambda row: {"label": -1}), {}, "2 of 2 rows of .* have no 'label'"),
    ],
)
def test_images_errors(change, options, said):
    with pytest.raises(SteerError, match=said):
        images(change(svhn(2)), **options)


def test_a_broken_image_is_named(tmp_path):
    for name, content in (("good", None), ("bad", b"no picture")):
        (tmp_path / name).mkdir()
        picture(3).save(tmp_path / name / "0.png")
        if content:
            (tmp_path / name / "0.png").write_bytes(content)
    data = images(tmp_path)
    assert data.classes == ("bad", "good")
    with pytest.raises(SteerError, match=r"the image of row 0 cannot be decoded: .*Leave it out"):
        data[0]
    assert data[1][1] == 1
    with pytest.raises(IndexError):
        data[2]


def test_pixels_are_those_of_vits_image_processor():
    levels = np.random.default_rng(0).integers(0, 256, (37, 51, 3), dtype=np.uint8)
    image = Image.fromarray(levels)
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    try:
        from transformers import ViTImageProcessorPil as Processor
    except ImportError:
        Processor = transformers.ViTImageProcessor
    reference = Processor(size={"height": 32, "width": 32}, image_mean=mean, image_std=std, resample=2)
    expected = torch.as_tensor(np.asarray(reference(image)["pixel_values"][0]))
    torch.testing.assert_close(Pixels(32, mean, std)(image), expected.float(), atol=1e-5, rtol=0)


def test_pixels_in_grey_and_with_transparency():
    assert Pixels(4, (0.0,), (1.0,))(picture(51)).tolist() == torch.full((1, 4, 4), 0.2).tolist()
    assert Pixels(4)(picture(51, mode="RGBA")).shape == (3, 4, 4)


@pytest.mark.parametrize(
    "arguments", [(0,), (8, (0.5, 0.5), (0.5, 0.5)), (8, (0.5,), (0.5,) * 3), (8, (0.5,), (0.0,)), (8, ("x",), (1.0,))]
)
def test_pixels_errors(arguments):
    with pytest.raises(SteerError, match="received"):
        Pixels(*arguments)


# VTAB-1k


@pytest.fixture(scope="module")
def task():
    """A data set in SVHN's schema whose rows can be told apart: the label is the row's number."""
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=1200)})

    def part(count, mode):
        rows = {"image": [picture(i, (2, 2)) for i in range(count)], "label": list(range(count))}
        return datasets.Dataset.from_dict(rows, features=features)

    return datasets.DatasetDict(train=part(1200, 0), test=part(30, 0))


def test_vtab_draws_a_thousand(task):
    parts = {name: vtab(task, name) for name in ("train800", "val200", "train800val200", "test")}
    assert {name: len(part) for name, part in parts.items()} == {
        "train800": 800,
        "val200": 200,
        "train800val200": 1000,
        "test": 30,
    }
    assert parts["train800"].labels + parts["val200"].labels == parts["train800val200"].labels
    assert len(set(parts["train800val200"].labels)) == 1000
    assert parts["test"].labels == list(range(30))
    assert max(parts["train800"].labels) > 1100  # from all of the train split
    assert vtab(task, "val200").labels == parts["val200"].labels
    assert vtab(task, "val200", seed=1).labels != parts["val200"].labels


def test_vtab_images_keep_their_labels(task):
    data = vtab(task, "val200", prepare=Pixels(size=2))
    for i in (0, 17, 199):
        image, label = data[i]
        assert level(image) == label % 256


def test_vtabs_own_lists(tmp_path):
    (tmp_path / "images").mkdir()
    for i in range(3):
        picture(50 * i).save(tmp_path / "images" / f"{i} x.png")
    (tmp_path / "train800.txt").write_text("images/2 x.png 4\nimages/0 x.png 1\n\n")
    data = vtab(tmp_path, "train800", prepare=Pixels(size=2))
    assert [(level(image), label) for image, label in data] == [(100, 4), (0, 1)]
    for line in ("images/9 x.png 4", "images/0 x.png", "images/0 x.png one"):
        (tmp_path / "train800.txt").write_text(line)
        with pytest.raises(SteerError, match="line 1 is"):
            vtab(tmp_path, "train800")
    (tmp_path / "train800.txt").write_text("\n")
    with pytest.raises(SteerError, match="lists no image"):
        vtab(tmp_path, "train800")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"split": "train"}, "`split` is one of train800, val200, train800val200 or test; received 'train'"),
        ({"seed": -1}, "`seed`"),
        ({"split": "train800", "source": svhn(20)}, "draws 1,000 images for training; the data set in memory has 20"),
        ({"split": "test", "source": svhn(20)}, "has no split 'test'; it has train"),
    ],
)
def test_vtab_errors(task, options, said):
    with pytest.raises(SteerError, match=said):
        vtab(**{"source": task, **options})


def test_a_local_folder_of_a_tasks_name_is_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    datasets.DatasetDict(test=cifar(3)).save_to_disk("cifar100")
    assert len(vtab("cifar100", "test")) == 3
