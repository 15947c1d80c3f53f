"""Labelled images, and VTAB-1k."""

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from hub_data import cache, datasets, transformers  # noqa: F401  # the fixture
from residual_steer import SteerError
from residual_steer.data import Pixels, images, vtab

Image = pytest.importorskip("PIL.Image")
SMALL = Pixels(size=4)


def picture(value, size=(6, 6), mode="RGB"):
    return Image.fromarray(np.full((*size, 3), value % 256, dtype=np.uint8)).convert(mode)


def rows_of(count, classes=10, image="image", **labels):
    """Rows in SVHN's schema, or another's, whose grey level is their number."""
    labels = labels or {"label": [i % classes for i in range(count)]}
    features = {name: datasets.ClassLabel(names=[f"{name}{i}" for i in range(classes)]) for name in labels}
    columns = {image: [picture(i) for i in range(count)], **labels}
    return datasets.Dataset.from_dict(columns, features=datasets.Features({image: datasets.Image(), **features}))


def unnamed(values, column="label"):
    columns = {"image": [picture(0)] * len(values), column: values}
    return datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())


def levels(data):
    """Return the grey levels that `Pixels` was given, and the labels."""
    assert all(image.std() < 1e-6 for image, _ in data)
    return [(round((image.mean().item() * 0.5 + 0.5) * 255), label) for image, label in data]


def test_images_of_cifar_100():
    fine, coarse = [(i * 7) % 100 for i in range(12)], [i % 20 for i in range(12)]
    rows = rows_of(12, 100, "img", fine_label=fine, coarse_label=coarse)
    data = images(rows, prepare=Pixels(size=8))
    assert (len(data), len(data.classes), data.classes[3]) == (12, 100, "fine_label3")
    assert levels(data)[5] == (5, 35)
    assert levels(images(rows, label="coarse_label", prepare=SMALL))[5] == (5, 5)
    x, y = next(iter(DataLoader(data, batch_size=4)))
    assert (x.shape, x.dtype, y.dtype) == ((4, 3, 8, 8), torch.float32, torch.int64)
    assert images(rows)[0][0].shape == (3, 224, 224)  # what ViT takes


def test_images_of_a_saved_data_set_in_another_format(tmp_path):
    datasets.DatasetDict(test=rows_of(4)).save_to_disk(tmp_path / "svhn")
    tensors, undecoded = rows_of(4).with_format("torch"), rows_of(4).cast_column("image", datasets.Image(decode=False))
    for data in (
        images(tmp_path / "svhn", "test", config="cropped_digits", prepare=SMALL),
        images(tensors, prepare=SMALL),
        images(undecoded, prepare=SMALL),
    ):
        assert levels(data) == [(i, i) for i in range(4)]


def test_images_in_folders(tmp_path):
    for split in ("train", "test"):
        for value, name in ((40, "dark"), (200, "light")):
            (tmp_path / split / name).mkdir(parents=True)
            picture(value, mode="L").save(tmp_path / split / name / "0.png")
    data = images(tmp_path, "test", prepare=SMALL)
    assert data.classes == ("dark", "light")
    assert levels(data) == [(40, 0), (200, 1)]
    (tmp_path / "train" / "dark" / "0.png").write_bytes(b"no picture")
    data = images(tmp_path)
    with pytest.raises(SteerError, match=r"the image of row 0 cannot be decoded: .*Leave it out"):
        data[0]
    assert data[1][1] == 1
    with pytest.raises(IndexError):
        data[2]


def test_classes_without_names_are_counted_over_all_splits():
    parts = datasets.DatasetDict(train=unnamed(["cow", "ape"], "class"), test=unnamed(["bee", "cow"], "class"))
    train, test = images(parts, "train"), images(parts, "test")
    assert train.classes == test.classes == ("ape", "bee", "cow")
    assert (train.labels, test.labels) == ([2, 0], [1, 2])
    assert images(unnamed([10, 1, 9])).labels == [2, 0, 1]


@pytest.mark.parametrize(
    ("rows", "options", "words"),
    [
        (lambda: rows_of(2).remove_columns("label"), {}, r"no column 'label'; its columns are image\."),
        (lambda: rows_of(2), {"label": "kind"}, r"no column 'kind'; its columns are image, label\."),
        (lambda: rows_of(2), {"image": "label"}, "`image` .* has image; received 'label'"),
        (lambda: rows_of(2).map(lambda row: {"more": row["image"]}), {}, "has image and more; received None"),
        (lambda: unnamed([0.5, 1.5]), {}, "a whole number or a string"),
        (lambda: unnamed([None, 1]), {}, "1 of 2 rows of .* have no 'label'"),
        (lambda: rows_of(2).map(lambda row: {"label": -1}), {}, "2 of 2 rows of .* have no 'label'"),
    ],
)
def test_images_errors(rows, options, words):
    with pytest.raises(SteerError, match=words):
        images(rows(), **options)


def test_pixels_are_those_of_vits_image_processor():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (37, 51, 3), dtype=np.uint8))
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    try:
        from transformers import ViTImageProcessorPil as Processor
    except ImportError:
        Processor = transformers.ViTImageProcessor
    reference = Processor(size={"height": 32, "width": 32}, image_mean=mean, image_std=std, resample=2)
    expected = torch.as_tensor(np.asarray(reference(image)["pixel_values"][0]))
    torch.testing.assert_close(Pixels(32, mean, std)(image), expected.float(), atol=1e-5, rtol=0)
    assert Pixels(4, (0.0,), (1.0,))(picture(51)).tolist() == torch.full((1, 4, 4), 0.2).tolist()
    assert SMALL(picture(51, mode="RGBA")).shape == (3, 4, 4)


@pytest.mark.parametrize(
    "arguments", [(0,), (8, (0.5, 0.5), (0.5, 0.5)), (8, (0.5,), (0.5,) * 3), (8, (0.5,), (0.0,)), (8, ("x",), (1.0,))]
)
def test_pixels_errors(arguments):
    with pytest.raises(SteerError, match="received"):
        Pixels(*arguments)


@pytest.fixture(scope="module")
def task():
    """A data set whose rows can be told apart: the label is the row's number."""
    return datasets.DatasetDict(train=rows_of(1200, 1200), test=rows_of(30, 1200))


def test_vtab_draws_a_thousand(task):
    parts = {name: vtab(task, name, prepare=SMALL) for name in ("train800", "val200", "train800val200", "test")}
    assert [len(part) for part in parts.values()] == [800, 200, 1000, 30]
    assert parts["train800"].labels + parts["val200"].labels == parts["train800val200"].labels
    assert len(set(parts["train800val200"].labels)) == 1000
    assert parts["test"].labels == list(range(30))
    assert max(parts["train800"].labels) > 1100  # from all of the train split
    assert vtab(task, "val200").labels == parts["val200"].labels
    assert vtab(task, "val200", seed=1).labels != parts["val200"].labels
    assert all(level == label % 256 for level, label in levels(parts["val200"]))


def test_vtabs_own_lists(tmp_path):
    (tmp_path / "images").mkdir()
    for i in range(3):
        picture(50 * i).save(tmp_path / "images" / f"{i} x.png")
    lists = tmp_path / "train800.txt"
    lists.write_text("images/2 x.png 4\nimages/0 x.png 1\n\n")
    assert levels(vtab(tmp_path, "train800", prepare=SMALL)) == [(100, 4), (0, 1)]
    refused = {f"images/{line}": "line 1 is" for line in ("9 x.png 4", "0 x.png", "0 x.png one")} | {"\n": "no image"}
    for text, words in refused.items():
        lists.write_text(text)
        with pytest.raises(SteerError, match=words):
            vtab(tmp_path, "train800")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"split": "train"}, "`split` is one of train800, val200, train800val200, test; received 'train'"),
        ({"seed": -1}, "`seed`.* received -1"),
        ({"split": "train800"}, "draws 1,000 images for training; the data set in memory has 20"),
        ({"split": "test"}, "has no split 'test'; it has train"),
        ({"split": "train800", "source": "nowhere"}, "no file or folder 'nowhere'"),
    ],
)
def test_vtab_errors(options, words):
    with pytest.raises(SteerError, match=words):
        vtab(**{"source": rows_of(20), **options})


def test_a_local_folder_of_a_tasks_name_is_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    datasets.DatasetDict(test=rows_of(3)).save_to_disk("cifar100")
    assert len(vtab("cifar100", "test")) == 3
