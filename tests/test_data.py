import importlib
import subprocess
import sys
import sysconfig

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from residual_steer import SteerError
from residual_steer.data import ByteBlocks, TokenBlocks, character_names, digits, english_prose, python_source


@pytest.fixture
def missing(monkeypatch):
    """Make an import fail, as where the package is not installed."""

    def hide(hidden):
        real = importlib.import_module

        def import_module(name, *rest):
            if name == hidden:
                raise ImportError(name)
            return real(name, *rest)

        monkeypatch.setattr(importlib, "import_module", import_module)

    return hide


def test_python_source_is_code_and_always_the_same():
    source = python_source(500_000)
    assert len(source) == 500_000
    assert source == python_source(500_000) == python_source(1_000_000)[:500_000]
    assert source.count(b"\n    def ") > 500


def test_python_source_leaves_out_prose_tests_and_site_packages(tmp_path, monkeypatch):
    for name in ["a.py", "b/c.py", "site-packages/d.py", "test/e.py", "pydoc_data/topics.py", "b/tests/f.py", "g.txt"]:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{name}\n")
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(tmp_path))
    assert python_source() == b"a.py\nb/c.py\n"


def test_python_source_errors(tmp_path, monkeypatch):
    with pytest.raises(SteerError, match="received 0"):
        python_source(0)
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(tmp_path))
    with pytest.raises(SteerError, match="ships it"):
        python_source()


def test_english_prose_has_every_paragraph_once():
    prose = english_prose().decode()
    assert prose.encode() == english_prose()
    paragraphs = prose.split("\n\n")
    assert len(prose) > 200_000
    assert len(paragraphs) == len(set(paragraphs))
    assert prose.lower().count(" the ") > 2000


def test_names_of_characters_are_words_of_their_own():
    names = character_names().decode().split("\n")
    assert len(names) > 25_000
    assert len(set(names)) == len(names)
    assert "GREEK SMALL LETTER ALPHA WITH TONOS" in names
    assert not [name for name in names if not name or name.startswith(("CJK UNIFIED", "TANGUT IDEOGRAPH"))]


def test_english_prose_not_there(missing):
    missing("pydoc_data.topics")
    with pytest.raises(SteerError, match="text of your own"):
        english_prose()


def test_byte_blocks_are_windows_of_the_data():
    data = bytes(range(256)) * 4
    item = ByteBlocks(data, 16, "all")[3]
    assert set(item) == {"input_ids", "labels"}
    assert item["input_ids"].shape == item["labels"].shape == (16,)
    assert item["input_ids"].dtype == item["labels"].dtype == torch.int64
    assert item["input_ids"].tolist() == list(data[48:64])
    assert item["input_ids"].data_ptr() != item["labels"].data_ptr()


@settings(deadline=None, max_examples=80)
@given(st.integers(2, 9), st.integers(0, 400), st.floats(0.02, 0.9))
def test_splits_do_not_overlap_and_lose_nothing(length, tokens, share):
    ids = torch.arange(tokens)
    parts = []
    for split in ("train", "valid"):
        try:
            parts.append(TokenBlocks(ids, length, split, share).windows.flatten().tolist())
        except SteerError:
            parts.append([])
    train, valid = parts
    assert not set(train) & set(valid)
    assert sorted(train + valid) == list(range(tokens // length * length))
    windows = tokens // length
    if windows * share >= 1:
        assert abs(len(valid) / length - windows * share) <= 10


def test_both_splits_see_every_part():
    data = bytes(200) + bytes([1] * 200)
    for split in ("train", "valid"):
        assert set(torch.stack([x["input_ids"] for x in ByteBlocks(data, 4, split)]).unique().tolist()) == {0, 1}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((b"x" * 100, 1), "at least 2"),
        ((b"x" * 100, 2.5), "at least 2"),
        ((b"x" * 100, 4, "test"), "one of train, valid, all"),
        ((b"x" * 100, 4, "train", 1.0), "above 0 and below 1"),
        ((b"x" * 3, 4), "shorter `length`"),
        ((b"", 4, "all"), "shorter `length`"),
        (("text", 4), "Encode text"),
    ],
)
def test_byte_blocks_errors(arguments, said):
    with pytest.raises(SteerError, match=said):
        ByteBlocks(*arguments)


def test_token_blocks_refuse_a_batch():
    with pytest.raises(SteerError, match=r"\(2, 5\)"):
        TokenBlocks(torch.zeros(2, 5), 2)


def test_digits_shapes_and_range():
    pytest.importorskip("sklearn")
    data = digits(range(5, 10))
    images, labels = data.tensors
    assert images.shape[1:] == (1, 8, 8)
    assert images.dtype == torch.float32
    assert labels.dtype == torch.int64
    assert (images.min(), images.max()) == (-1, 1)
    assert labels.unique().tolist() == [0, 1, 2, 3, 4]


def test_digits_splits_are_stratified_disjoint_and_the_same_each_time():
    pytest.importorskip("sklearn")
    parts = {split: digits(split=split) for split in ("train", "valid", "test", "all")}
    assert sum(len(parts[s]) for s in ("train", "valid", "test")) == len(parts["all"]) == 1797
    rows = {s: {tuple(image.flatten().tolist()) for image, _ in part} for s, part in parts.items()}
    assert not rows["train"] & rows["valid"]
    assert not rows["train"] & rows["test"]
    assert not rows["valid"] & rows["test"]
    for split, share in (("train", 0.6), ("valid", 0.2), ("test", 0.2)):
        counts = parts[split].tensors[1].bincount() / parts["all"].tensors[1].bincount()
        assert (counts - share).abs().max() < 0.01
    assert torch.equal(parts["train"].tensors[0], digits().tensors[0])


def test_digits_labels_follow_the_order_of_the_classes():
    pytest.importorskip("sklearn")
    nines, threes = digits([9], "valid").tensors[0], digits([3], "valid").tensors[0]
    both = digits([9, 3], "valid")
    assert torch.equal(both.tensors[0], torch.cat([nines, threes]))
    assert both.tensors[1].tolist() == [0] * len(nines) + [1] * len(threes)


@pytest.mark.parametrize("arguments", [([],), ([3, 3],), ([10],), ([-1],), (range(10), "dev")])
def test_digits_errors(arguments):
    with pytest.raises(SteerError, match="received"):
        digits(*arguments)


def test_digits_without_scikit_learn(missing):
    missing("sklearn.datasets")
    with pytest.raises(SteerError, match=r"pip install .residual-steer\[all\]"):
        digits()


def test_importing_the_data_imports_nothing_heavy():
    code = (
        "import sys, residual_steer.data\n"
        "print(*{'sklearn', 'datasets', 'transformers', 'timm'}.intersection(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
