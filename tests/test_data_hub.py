"""Where data come from: local files in every format, and a Hub that cannot be reached."""

import json

import pytest

from hub_data import datasets, jsonl, word_tokenizer
from residual_steer import SteerError
from residual_steer.data import images, plan, splits, squad, vtab, wikitext


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    """What `datasets` prepares goes into a folder of the test's."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("prepared")))
    datasets.disable_progress_bars()


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer()


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
    with pytest.raises(SteerError, match=r"the data set '.*a\.\w+' cannot be had: .*Look at the files\.") as caught:
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
    with pytest.raises(SteerError, match=r"has none; received None\. Its columns are text"):
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
