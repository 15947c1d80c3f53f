"""Labelled images, and VTAB-1k."""

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from hub_data import datasets, transformers
from residual_steer import SteerError
from residual_steer.data import Pixels, images, vtab

Image = pytest.importorskip("PIL.Image")


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    """What `datasets` prepares goes into a folder of the test's."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("prepared")))
    datasets.disable_progress_bars()


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
        (lambda rows: rows, {"image": "label"}, "in memory has image; received 'label'"),
        (lambda rows: rows.map(twice), {}, "`image` is a column of images, .* has image and more; received None"),
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
        ({"split": "train"}, "`split` is one of train800, val200, train800val200, test; received 'train'"),
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
