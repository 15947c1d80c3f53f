"""Where data come from: local files in every format, a Hub that is there, and one that cannot be reached."""

import json
import sys

import pytest

from apart import printed
from hub_data import cache, datasets, jsonl, texts, word_tokenizer  # noqa: F401  # the fixture
from hub_server import HubServer
from residual_steer import SteerError
from residual_steer.data import images, plan, splits, squad, vtab, wikitext

ROWS = ["one two", "", "three"]


def save_to_disk(folder):
    datasets.DatasetDict({"train": texts(*ROWS), "test": texts(ROWS[0])}).save_to_disk(folder)


def save_parquet(folder):
    folder.mkdir()
    texts(*ROWS).to_parquet(folder / "train-00000-of-00001.parquet")
    texts(ROWS[0]).to_parquet(folder / "test-00000-of-00001.parquet")


def save_json(folder):
    jsonl(folder / "train.jsonl", texts(*ROWS))
    jsonl(folder / "test.jsonl", texts(ROWS[0]))


def save_under_config(folder):
    save_json(folder / "small")


def contents(parts):
    return {name: list(rows["text"]) for name, rows in parts.items()}


@pytest.mark.parametrize("save", [save_to_disk, save_parquet, save_json, save_under_config])
def test_local_folders(tmp_path, save, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    save(tmp_path / "data")
    for place in (tmp_path / "data", "~/data"):
        assert contents(splits(place, "small")) == {"train": ROWS, "test": ROWS[:1]}
        assert plan(place).download is False


def test_a_copy_of_a_repository_with_configurations(tmp_path):
    for folder, text in (("small", "few"), ("big", "many")):
        jsonl(tmp_path / folder / "train.jsonl", [{"text": text}])
    configs = [{"config_name": name, "data_dir": folder} for name, folder in (("small", "small"), ("large", "big"))]
    (tmp_path / "README.md").write_text("---\n" + json.dumps({"configs": configs}) + "\n---\n")
    assert contents(splits(tmp_path, "large")) == {"train": ["many"]}
    with pytest.raises(SteerError, match="has the configurations small, large; received 'huge'"):
        splits(tmp_path, "huge")
    texts("saved").save_to_disk(tmp_path / "other")  # each configuration saved into a folder of its own
    assert contents(splits(tmp_path, "other")) == {"train": ["saved"]}


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train-v1", "train"),
        ("validation", "validation"),
        ("squad_dev", "validation"),
        ("my-test-set", "test"),
        ("latest", "train"),
        ("anything", "train"),
    ],
)
def test_the_split_of_a_file_is_in_its_name(tmp_path, name, split):
    texts(*ROWS).to_parquet(tmp_path / f"{name}.parquet")
    assert list(splits(tmp_path / f"{name}.parquet")) == [split]


def test_a_lone_saved_data_set_is_the_split_it_was(tmp_path):
    datasets.Dataset.from_dict({"text": ["x"]}, split="validation").save_to_disk(tmp_path / "named")
    assert list(splits(tmp_path / "named")) == ["validation"]


def test_data_in_memory():
    rows = texts(*ROWS)
    assert splits(rows) == {"train": rows}
    assert splits(datasets.DatasetDict(test=rows))["test"] is rows
    assert str(plan(datasets.DatasetDict(test=rows))) == "data in memory: nothing to download; rows: test 3"
    for wrong in (7, None, {"train": [1, 2]}):
        for function in (splits, plan):
            with pytest.raises(SteerError, match=r"'owner/name'.* received (int|NoneType|dict)"):
                function(wrong)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a", None, "a folder that `save_to_disk` wrote.* has none of these"),
        ("a", b"x", "a folder that `save_to_disk` wrote.* is none of these"),
        ("a.parquet", b"nonsense", r"a\.parquet' cannot be had: .*Look at the files\."),
        ("a.jsonl", b"{nonsense", r"a\.jsonl' cannot be had: .*Look at the files\."),
        ("a.jsonl", b"", r"a\.jsonl' cannot be had: .*Look at the files\."),
    ],
)
def test_a_place_without_data(tmp_path, name, content, words):
    (tmp_path / name).mkdir() if content is None else (tmp_path / name).write_bytes(content)
    with pytest.raises(SteerError, match=words) as caught:
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
    ("read", "name"),
    [
        (lambda: squad(tokenizer=word_tokenizer()), "'rajpurkar/squad'"),
        (lambda: wikitext(tokenizer=word_tokenizer()), r"'Salesforce/wikitext' \(wikitext-2-raw-v1\)"),
        (lambda: images("owner/pictures"), "'owner/pictures'"),
        (lambda: vtab("cifar100"), "'uoft-cs/cifar100'"),
        (lambda: vtab("svhn", "test"), r"'ufldl-stanford/svhn' \(cropped_digits\)"),
        (lambda: plan("owner/name"), "'owner/name'"),
    ],
)
def test_without_a_network(read, name):
    call = name.replace(r" \(", ", '").replace(r"\)", "'")
    words = rf"the data set {name} cannot be had: the Hub was not asked.*HF_HUB_OFFLINE.*load_dataset\({call}\)\.save"
    with pytest.raises(SteerError, match=words):
        read()


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ConnectionError("Couldn't reach it"), "the Hub could not be reached, and it is not in the cache"),
        (ValueError("It is missing.\nPlease pick 'a'.\n"), r"had: ValueError: It is missing\. Please pick 'a'\. Give"),
        (ValueError(), r"had: ValueError\. Give"),
    ],
)
def test_what_the_libraries_below_raise_becomes_one_line(monkeypatch, error, words):
    def load(*arguments, **options):
        raise error

    monkeypatch.setattr(datasets, "load_dataset_builder", load)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(SteerError, match=words):
        splits("owner/name")


def test_without_datasets(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(SteerError, match=r"pip install .residual-steer\[datasets\]"):
        images("owner/name")


@pytest.mark.parametrize(
    ("read", "words"),
    [
        (lambda data, t: wikitext(data, "validation", tokenizer=t), r"no split 'validation'; it has train, test\."),
        (lambda data, t: wikitext(data, column="words", tokenizer=t), r"no column 'words'; its columns are text\."),
        (lambda data, t: squad(data, tokenizer=t), "no column 'context' and none 'question' and none 'answers'; its"),
        (lambda data, t: wikitext(texts(), tokenizer=t), "'train' of the data set in memory has no rows"),
        (lambda data, t: images(data), r"has none; received None\. Its columns are text"),
    ],
)
def test_splits_and_columns_that_are_not_there(tmp_path, read, words):
    save_json(tmp_path / "data")
    with pytest.raises(SteerError, match=words):
        read(tmp_path / "data", word_tokenizer())


PROGRAM = """
import logging, sys
logging.basicConfig(format="%(name)s: %(message)s", stream=sys.stdout)
import datasets
datasets.logging.set_verbosity_error()
datasets.disable_progress_bars()
from residual_steer.data import plan, splits

def attempt(function, *arguments):
    try:
        return function(*arguments)
    except Exception as error:
        return f"{type(error).__name__}: {error}"

print(attempt(plan, "owner/texts", "small"))
parts = attempt(splits, "owner/texts", "small")
print(parts if isinstance(parts, str) else {name: list(rows["text"]) for name, rows in parts.items()})
print(attempt(plan, "owner/texts", "small"))
print(attempt(splits, "owner/nothing"))
print(attempt(splits, "owner/texts", "huge"))
"""


@pytest.fixture
def hub(tmp_path):
    """A Hub with a data set in the schema of WikiText: a README with sizes, and Parquet files."""
    sizes = [{"name": "train", "num_bytes": 30, "num_examples": 2}, {"name": "test", "num_bytes": 9, "num_examples": 1}]
    info = {"config_name": "small", "splits": sizes, "download_size": 1234567, "dataset_size": 39}
    parts = [{"split": name, "path": f"small/{name}-*"} for name in ("train", "test")]
    readme = {
        "dataset_info": [info | {"features": [{"name": "text", "dtype": "string"}]}],
        "configs": [{"config_name": "small", "data_files": parts}],
    }
    files = {"README.md": f"---\n{json.dumps(readme)}\n---\n# Texts\n".encode()}
    for name, rows in (("train", texts("one", "two")), ("test", texts("three"))):
        rows.to_parquet(tmp_path / "part")
        files[f"small/{name}-00000-of-00001.parquet"] = (tmp_path / "part").read_bytes()
    with HubServer() as server:
        server.add("datasets/owner/texts", files)
        yield server


def session(hub, home, offline=False):
    places = {"HF_ENDPOINT": hub.address, "HF_HOME": str(home), "HF_HUB_OFFLINE": str(int(offline))}
    return printed(PROGRAM, **places)[0].strip().splitlines()


def test_a_download_is_announced_and_read_from_the_cache_after(hub, tmp_path):
    rows = "{'train': ['one', 'two'], 'test': ['three']}"
    planned = "owner/texts (small): a download of 1.2 MB from the Hugging Face Hub; rows: train 2, test 1"
    cached = "owner/texts (small): nothing to download; rows: train 2, test 1"
    online = session(hub, tmp_path / "home")
    assert online[:4] == [planned, f"residual_steer.data.hub: {planned}", rows, cached]
    absent, unknown = online[4:]
    assert absent.startswith("SteerError: the data set 'owner/nothing' cannot be had: DatasetNotFoundError: ")
    assert unknown.startswith("SteerError: the data set 'owner/texts' (huge) cannot be had: ValueError: ")
    assert "Available: ['small']" in unknown

    asked = len(hub.asked)
    offline = session(hub, tmp_path / "home", offline=True)
    assert offline[:3] == [cached, rows, cached]  # and no line of a download
    assert "HF_HUB_OFFLINE is set" in offline[3]
    assert "(huge) cannot be had" in offline[4]
    assert len(hub.asked) == asked
