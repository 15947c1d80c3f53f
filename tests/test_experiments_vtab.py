"""VTAB-1k as a script, on tiny models and images in the schema of CIFAR-100, saved to folders here."""

import json

import numpy as np
import pytest
import torch

from experiments.problem import Arm
from experiments.results import Result
from scripts import LENGTH, WORDS, _prepared, entry, fail, no_training, rows_of, script  # noqa: F401

datasets = pytest.importorskip("datasets")
transformers = pytest.importorskip("transformers")
timm = pytest.importorskip("timm")
Image = pytest.importorskip("PIL.Image")
for package in ("peft", "tokenizers", "sklearn"):
    pytest.importorskip(package)


@pytest.fixture(scope="module")
def vtab_data(tmp_path_factory):
    """A data set in CIFAR-100's schema, a thousand images and a few of tiny size."""
    random = np.random.default_rng(0)
    features = datasets.Features({
        "img": datasets.Image(),
        "fine_label": datasets.ClassLabel(names=[f"fine{i}" for i in range(5)]),
        "coarse_label": datasets.ClassLabel(names=["coarse0", "coarse1"]),
    })  # fmt: skip

    def part(count):
        levels = random.integers(0, 256, (count, 6, 6, 3), dtype=np.uint8)
        labels = [i % 5 for i in range(count)]
        columns = {"img": [Image.fromarray(one) for one in levels], "fine_label": labels}
        return datasets.Dataset.from_dict({**columns, "coarse_label": [i % 2 for i in labels]}, features=features)

    folder = tmp_path_factory.mktemp("data") / "cifar100"
    datasets.DatasetDict(train=part(1010), test=part(20)).save_to_disk(folder)
    return folder


@pytest.fixture(scope="module")
def timm_folder(tmp_path_factory):
    shape = {"img_size": 16, "patch_size": 8, "depth": 2, "embed_dim": 32, "num_heads": 2}
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=3, **shape)
    folder = tmp_path_factory.mktemp("models") / "tiny-vit"
    timm.models.save_for_hf(model, folder, model_args=shape)
    return folder


@pytest.fixture(scope="module")
def transformers_folder(tmp_path_factory):
    shape = {"image_size": 16, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**shape, intermediate_size=32, num_labels=3))
    folder = tmp_path_factory.mktemp("models") / "their-vit"
    model.save_pretrained(folder)
    about = {"image_processor_type": "ViTImageProcessor", "image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    (folder / "preprocessor_config.json").write_text(json.dumps(about))
    return folder


@pytest.fixture(scope="module")
def vtab_run(timm_folder, vtab_data, tmp_path_factory):
    """The arguments of a run, and its result."""
    out = tmp_path_factory.mktemp("out")
    arguments = ["--model", timm_folder, "--data", vtab_data, "--out", out, "--rates", 2, "--seeds", 2]
    assert script("vtab", *arguments, "--steps", 2, "--batch", 8) == 0
    return arguments, Result.load(out / "vtab.json")


def test_vtab_keeps_to_the_protocol(vtab_run):
    _, result = vtab_run
    assert result.settings["images"] == {
        "cifar100": {"train800": 800, "val200": 200, "train800val200": 1000, "test": 20}
    }
    names = {record["method"] for record in result.records}
    assert len(names) == 8
    for name in names:
        runs = [record for record in result.records if record["method"] == name]
        chose = [run for run in runs if run["valid"] is not None]
        reported = [run for run in runs if run["test"] is not None]
        assert [run["seed"] for run in chose] == [0, 0]
        assert [run["seed"] for run in reported] == [0, 1]
        assert len(runs) == 4
        best = max(chose, key=lambda run: run["valid"]["accuracy"])["rate"]
        assert {run["rate"] for run in reported} == {best}


def test_vtab_tables(vtab_run):
    _, result = vtab_run
    ours, theirs = result.tables
    rows = rows_of(ours)
    sized = ["VPT-shallow", "VPT-deep", "LoRA", "AdaptFormer"]
    others = ["H-Res, rank 8", "H-Res, rank 32", "full fine-tuning"]
    assert list(rows) == ["head alone", *sized[:3], "LoRA, merged", *sized[3:], *others]
    budget, head = rows["H-Res, rank 8"]["trainable"], rows["head alone"]["trainable"]
    assert head == 32 * 5 + 5
    assert budget == head + 2 * (2 * 32 * 8 + 8 + 32)
    for name in sized:
        assert rows[name]["trainable"] == pytest.approx(budget, rel=0.15), name
    assert "where training takes the validation data too" in ours.notes[0]
    assert theirs.title.startswith("Published by others, not measured here")
    assert "None of these numbers is ours" in theirs.notes[0]
    assert rows_of(theirs)["VPT-Deep"] == {"method": "VPT-Deep", "parameters": 0.53, "cifar100": 78.8, "svhn": 78.1}
    assert [verdict.claim for verdict in result.verdicts] == [3]


@pytest.mark.usefixtures("no_training")
def test_a_second_call_of_vtab_trains_nothing(vtab_run):
    arguments, first = vtab_run
    assert script("vtab", *arguments, "--quick") == 0  # whose sizes are the same
    again = Result.load(arguments[5] / "vtab.json")
    assert again.tables == first.tables
    assert again.verdicts == ()
    with pytest.raises(AssertionError, match="made again"):
        script("vtab", *arguments, "--quick", "--draw", 1)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"--model": "vit_base_patch16_224.orig_in21k"}, "the model 'vit_base_patch16_224.orig_in21k' cannot be had: "),
        ({"--model": "vit_base_patch16_224.no_such"}, "Invalid pretrained tag"),
        ({"--model": "owner/nothing"}, "the model 'owner/nothing' cannot be had: "),
        ({"--data": "svhn"}, r"'ufldl-stanford/svhn' (cropped_digits) cannot be had"),
    ],
)
def test_vtab_says_what_is_missing(timm_folder, vtab_data, tmp_path, capsys, change, said):
    given = {"--model": timm_folder, "--data": vtab_data, "--out": tmp_path}
    line = fail(capsys, "vtab", "--quick", *(part for pair in (given | change).items() for part in pair))
    assert said in line


def test_random_weights_give_no_verdict(timm_folder, vtab_data, tmp_path, monkeypatch):
    from experiments import vtab

    made = []
    monkeypatch.setattr(vtab, "arms_of", lambda problem, rates: [Arm("head alone", "linear", (0.01,))])
    monkeypatch.setattr(vtab, "verdict", made.append)
    shape = ["--model", timm_folder, "--random-weights", "--steps", 1, "--batch", 200, "--seeds", 2]
    assert script("vtab", "--data", vtab_data, "--out", tmp_path, *shape) == 0
    result = Result.load(tmp_path / "vtab.json")
    assert result.settings["random_weights"] is True
    assert not made


def test_classifiers_of_both_libraries(timm_folder, transformers_folder):
    from experiments.hub import classifier

    ours, theirs = classifier(str(timm_folder), 7), classifier(str(transformers_folder), 7)
    assert (ours.head, theirs.head) == ("head", "classifier")
    assert (ours.prepare.size, theirs.prepare.size) == (16, 16)
    assert (theirs.prepare.mean, theirs.prepare.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    kept = timm.create_model(f"local-dir:{timm_folder}", pretrained=True).state_dict()
    assert torch.equal(ours.model.state_dict()["blocks.1.attn.qkv.weight"], kept["blocks.1.attn.qkv.weight"])
    kept = transformers.ViTForImageClassification.from_pretrained(transformers_folder).state_dict()
    same = {name for name, tensor in theirs.fresh(3).state_dict().items() if torch.equal(tensor, kept[name])}
    assert kept.keys() - same == {"classifier.weight", "classifier.bias"}
    one, again, other = (theirs.fresh(seed).state_dict()["classifier.weight"] for seed in (3, 3, 4))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert one.shape == (7, 32)
    untrained = classifier(str(transformers_folder), 7, random=True).model.state_dict()
    query = next(name for name in kept if name.endswith("weight") and "attention" in name)
    assert not torch.equal(untrained[query], kept[query])


POOR, FAIR, GOOD = [0.5, 0.51, 0.5], [0.7, 0.71, 0.7], [0.7, 0.709, 0.702]


@pytest.mark.parametrize(
    ("hres", "shallow", "deep", "word"),
    [
        (FAIR, POOR, POOR, "holds"),
        (FAIR, GOOD, POOR, "holds"),  # on a par is enough
        (POOR, FAIR, GOOD, "does not hold"),
        (FAIR, POOR, [0.9, 0.9, 0.91], "partly holds"),
        ([0.7, None, 0.7], POOR, POOR, "partly holds"),
        ([0.6, 0.7, 0.8], FAIR, FAIR, "partly holds"),  # too wide a spread to say
    ],
)
def test_vtabs_verdict(hres, shallow, deep, word):
    from experiments.vtab import verdict

    values = {"H-Res, rank 8": hres, "VPT-shallow": shallow, "VPT-deep": deep}
    found = verdict({"svhn": [entry(name, numbers, "accuracy") for name, numbers in values.items()]})
    assert (found.claim, found.verdict) == (3, word)
    assert ("a run diverged" in found.ours) == (None in hres)
