"""What every machine has: Python's library, its language reference and names, scikit-learn's digits."""

import sys
import sysconfig

import pytest
import torch

from residual_steer import SteerError
from residual_steer.data import character_names, digits, english_prose, python_source


def test_python_source_is_code_and_always_the_same():
    source = python_source(500_000)
    assert len(source) == 500_000
    assert source == python_source(500_000) == python_source(1_000_000)[:500_000]
    assert source.count(b"\n    def ") > 500


def test_python_source_leaves_out_prose_tests_and_site_packages(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(tmp_path))
    with pytest.raises(SteerError, match="ships it"):
        python_source()
    for name in ["a.py", "b/c.py", "site-packages/d.py", "test/e.py", "pydoc_data/topics.py", "b/tests/f.py", "g.txt"]:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{name}\r\n")
    (tmp_path / "b" / "gone.py").symlink_to(tmp_path / "nowhere.py")
    assert python_source() == b"a.py\nb/c.py\n"


def test_english_prose_has_every_paragraph_once():
    prose = english_prose().decode()
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


def test_digits_are_images_with_labels_in_the_order_of_the_classes():
    pytest.importorskip("sklearn")
    images, labels = digits(range(5, 10)).tensors
    assert images.shape[1:] == (1, 8, 8)
    assert (images.dtype, labels.dtype) == (torch.float32, torch.int64)
    assert (images.min(), images.max()) == (-1, 1)
    assert labels.unique().tolist() == [0, 1, 2, 3, 4]
    nines, threes = digits([9], "valid").tensors[0], digits([3], "valid").tensors[0]
    images, labels = digits([9, 3], "valid").tensors
    assert torch.equal(images, torch.cat([nines, threes]))
    assert labels.tolist() == [0] * len(nines) + [1] * len(threes)


def test_digits_splits_are_stratified_disjoint_and_the_same_each_time():
    pytest.importorskip("sklearn")
    parts = {split: digits(split=split).tensors for split in ("train", "valid", "test", "all")}
    shares = {"train": 0.6, "valid": 0.2, "test": 0.2}
    images = torch.cat([parts[split][0] for split in shares]).flatten(1)
    assert len(images) == len(images.unique(dim=0)) == len(parts["all"][0]) == 1797
    for split, share in shares.items():
        counts = parts[split][1].bincount() / parts["all"][1].bincount()
        assert (counts - share).abs().max() < 0.01
    assert torch.equal(parts["train"][0], digits().tensors[0])


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: python_source(0), "`limit`.* received 0"),
        (lambda: digits([]), r"`classes`.* received \[\]"),
        (lambda: digits([3, 3]), r"`classes`.* received \[3, 3\]"),
        (lambda: digits([10]), r"`classes`.* received \[10\]"),
        (lambda: digits([-1]), r"`classes`.* received \[-1\]"),
        (lambda: digits(range(10), "dev"), "`split` .* train, valid, test, all; received 'dev'"),
    ],
)
def test_what_is_not_there_is_refused(make, words):
    with pytest.raises(SteerError, match=words):
        make()


@pytest.mark.parametrize(
    ("module", "make", "words"),
    [
        ("pydoc_data.topics", english_prose, "text of your own"),
        ("sklearn.datasets", digits, r"pip install .residual-steer\[all\]"),
    ],
)
def test_what_is_not_installed_is_named(monkeypatch, module, make, words):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(SteerError, match=words):
        make()
