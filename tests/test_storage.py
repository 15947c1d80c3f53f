"""All of a field comes back from its two files, and what does not fit is refused with the model as it was."""

import copy
import dataclasses
import json
import os
import re
import shutil
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

import residual_steer as rs
from apart import apart
from fields import IMAGES, refused, rewrite, save_one, shake, vit
from residual_steer._controller import steering_of
from residual_steer._field_file import (
    _FORMAT_VERSION,
    DESCRIPTION,
    TENSORS,
    describe,
    digest,
    find_names,
    open_field,
    plain_key,
)
from residual_steer.config import FieldConfig

PACKAGE = Path(rs.__file__).parent
OLD = Path(__file__).parent / "data" / "field-0.1"  # version 0.1 wrote it: every tensor runs from -1 to 1


@pytest.fixture
def saved(tmp_path):
    return save_one(tmp_path / "field")


def gpt2(**sizes):
    transformers = pytest.importorskip("transformers")
    sizes = {"n_layer": 2, "n_embd": 16, "n_head": 2, "vocab_size": 9, "n_positions": 8, **sizes}
    return transformers.GPT2Model(transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))


def test_all_of_a_field_comes_back(saved):
    folder, expected = saved
    model = vit()
    rs.load(model, folder)
    assert torch.equal(model(IMAGES), expected)
    (field,) = rs.summary(model).fields
    assert dict(field.ranks) == {0: 4, 2: 2}
    assert (field.scale, field.activation, field.dropout) == (0.5, "silu", 0.1)
    assert field.train == ("head.weight", "head.bias")
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        name for name, _ in model.named_parameters() if "steering_" in name or name.startswith("head")
    }
    model(IMAGES).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in rs.parameters(model))


def test_a_field_that_version_0_1_wrote_loads():
    base, state = steering_of(rs.load(vit(), OLD))
    trained = ("head.weight", "head.bias")
    assert state.specs["old"] == FieldConfig("old", {"block": {0: 1, 2: 2}}, 0.5, "silu", True, 0.1, trained)
    tensors = state.tensors(base, "old")
    assert len(tensors) == 10
    for tensor in tensors.values():
        assert torch.equal(tensor, torch.linspace(-1, 1, tensor.numel()).reshape(tensor.shape))


def test_a_field_of_version_2_loads():
    _, state = steering_of(rs.load(vit(), OLD.with_name("field-0.2")))
    sites = {"input": {0: 2}, "after": {0: 1, 2: 1}, "mlp.fc1": {1: 1}}
    assert state.specs["many"] == FieldConfig("many", sites, 0.5, "silu")
    for parameter in state.parameters("many"):
        assert torch.equal(parameter, torch.linspace(-1, 1, parameter.numel()).reshape(parameter.shape))


def test_every_version_of_the_format_has_a_field_that_must_load_for_ever():
    kept = {json.loads((path / DESCRIPTION).read_text())["format_version"] for path in OLD.parent.glob("field-*")}
    assert kept == set(range(1, _FORMAT_VERSION + 1)), "lay a field of the new version there, and load it above"


def test_a_field_that_version_0_1_wrote_is_written_again_to_the_byte(tmp_path):
    rs.save(rs.load(vit(), OLD), tmp_path)
    written, kept = (json.loads((folder / DESCRIPTION).read_text("utf-8")) for folder in (tmp_path, OLD))
    assert written["field"] == kept["field"]
    assert written["format_version"] == 1
    if written == kept:  # else another release of the library wrote it, which the description names
        assert all((tmp_path / name).read_bytes() == (OLD / name).read_bytes() for name in (TENSORS, DESCRIPTION))


def test_a_field_that_does_not_act_is_saved_with_its_own_head(saved, tmp_path):
    folder, expected = saved
    model = rs.load(vit(), folder)
    shake(rs.steer(model, name="other", rank=2, train="head"))
    rs.save(model, tmp_path / "again", name="default")
    assert torch.equal(rs.load(vit(), tmp_path / "again")(IMAGES), expected)


def test_a_field_can_be_renamed_and_stand_beside_others(saved):
    folder, expected = saved
    model = rs.load(rs.load(vit(), folder, name="one"), folder, name="two")
    for name in ("one", "two"):
        rs.use(model, name)
        assert torch.equal(model(IMAGES), expected)
    with refused(model, "'two' is in use"):
        rs.load(model, folder, name="two")


def test_numbers_of_numpy_are_stored_as_numbers(tmp_path):
    ranks = {np.int64(0): np.int64(3), np.int8(-1): np.int32(2)}
    rs.save(rs.steer(vit(), rank=ranks, scale=np.float32(0.5), dropout=Fraction(1, 4)), tmp_path)
    (field,) = rs.summary(rs.load(vit(), tmp_path)).fields
    assert (dict(field.ranks), field.scale, field.dropout) == ({0: 3, 2: 2}, 0.5, 0.25)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_field_saved_in_half_precision_loads_in_fp32(tmp_path, dtype):
    model = shake(rs.steer(vit(), rank=4)).to(dtype)
    expected = {key: tensor.float() for key, tensor in model.state_dict().items() if "steering_" in key}
    rs.save(model, tmp_path)
    loaded = rs.load(vit(), tmp_path).state_dict()
    assert all(torch.equal(loaded[key], expected[key]) and loaded[key].dtype == torch.float32 for key in expected)


@pytest.mark.parametrize("field", [torch.float32, torch.float64])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_a_field_loads_into_its_own_type_from_any_float(saved, stored, field):
    rewrite(saved[0], lambda tensors: tensors.update({key: value.to(stored) * 1.1 for key, value in tensors.items()}))
    base, state = steering_of(rs.load(vit().to(field), saved[0]))
    inside = safetensors.torch.load_file(saved[0] / TENSORS)
    for key, tensor in state.tensors(base, "default").items():
        assert tensor.dtype == field
        assert torch.equal(tensor, inside[key].to(field))


def test_a_trained_buffer_keeps_its_integers(tmp_path):
    def model():
        found = vit()
        found.head = nn.Sequential(nn.Linear(32, 5), nn.BatchNorm1d(5))
        return found

    steered = rs.steer(model(), rank=4, train="head")
    steered.train()(IMAGES)
    rs.save(steered, tmp_path)
    assert rs.load(model(), tmp_path).head[1].num_batches_tracked == 1
    rewrite(tmp_path, lambda tensors: tensors.update({"train.head.1.num_batches_tracked": torch.tensor(1.0)}))
    with refused(fresh := model(), r"is stored as torch\.float32; this model needs torch.int64"):
        rs.load(fresh, tmp_path)


def test_another_class_or_config_of_the_same_shape_loads_with_a_warning_and_another_kind_is_refused(tmp_path):
    transformers = pytest.importorskip("transformers")
    rs.save(rs.steer(gpt2(), rank=4), tmp_path / "gpt2")
    rs.load(gpt2(), tmp_path / "gpt2")  # warnings are errors here: the same config gives none
    with pytest.warns(UserWarning, match="n_positions 8 against 4"):
        rs.load(gpt2(n_positions=4), tmp_path / "gpt2")
    rs.save(shake(rs.steer(vit(), rank=4)), tmp_path / "vit")
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=128, image_size=8, patch_size=4
    )
    with pytest.warns(UserWarning, match="class timm.*against transformers"):
        rs.load(transformers.ViTModel(config), tmp_path / "vit")
    other = gpt2(n_layer=3, n_embd=32)
    with refused(other, "trained on vit, 3 blocks of width 32; this model has gpt2, 3 blocks"):
        rs.load(other, tmp_path / "vit")


def test_a_config_is_described_by_the_plain_values_that_shape_the_stream():
    @dataclasses.dataclass
    class Config:
        heads: int = 4
        rope: dict = dataclasses.field(default_factory=lambda: {"theta": 1e4, "dtype": "bf16", "more": {"x": None}})
        layers: tuple = ("a", "b")
        table: list = dataclasses.field(default_factory=lambda: [0] * 100)  # too long to be compared
        pad_token_id: int = 3

    model = vit()
    model.config = Config()
    base, state = steering_of(rs.steer(model, rank=2))
    config = describe(state.specs["default"], base, state.backbone)["backbone"]["config"]
    assert config == {"heads": 4, "rope.theta": 1e4, "layers": '["a", "b"]'}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: vit(depth=2), r"trained on vit, 3 blocks of width 32; this model has vit, 2 blocks of width 32"),
        (lambda: vit(width=64), "3 blocks of width 64"),
        (lambda: vit(classes=7), r"train.head.weight has shape \(5, 32\); this model needs \(7, 32\)"),
        (lambda: vit(classes=0), "trained base tensors that this model lacks: head.weight"),
        (lambda: nn.Linear(3, 3), "no known backbone"),
        (lambda: rs.steer(vit(), rank=2), "'default' is in use"),
    ],
)
def test_a_model_that_does_not_fit_is_refused_unchanged(saved, make, message):
    with refused(model := make(), message):
        rs.load(model, saved[0])


def test_a_model_without_values_is_neither_loaded_nor_saved(saved, tmp_path):
    with pytest.raises(rs.SteerError, match="meta device"):
        rs.load(vit().to("meta"), saved[0])
    with pytest.raises(rs.SteerError, match=r"blocks\.0\.down\.weight has no value: it is on the meta device"):
        rs.save(rs.steer(vit(), rank=4).to("meta"), tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("folder", [None, 5, "", "a\0b"])
def test_a_folder_is_a_path(folder):
    model = rs.steer(vit(), rank=4)
    for call in (lambda: rs.save(model, folder), lambda: rs.load(vit(), folder)):
        with pytest.raises(rs.SteerError, match=r"a folder is a path|could not"):
            call()


def test_what_cannot_be_saved_is_refused_and_leaves_no_folder(tmp_path):
    model = rs.steer(vit(), rank=4)
    (tmp_path / "file").write_text("in the way")
    with refused(model, "could not make the folder"):
        rs.save(model, tmp_path / "file" / "field")
    with refused(model, r"`name` is one of the fields default; received 'other'"):
        rs.save(model, tmp_path / "new", name="other")
    rs.use(model, None)
    with refused(model, "received None"):
        rs.save(model, tmp_path / "new")
    with pytest.raises(rs.SteerError, match="not steered"):
        rs.save(vit(), tmp_path / "new")
    rs.use(model, "default")
    with torch.no_grad():
        rs.parameters(model)[0][0] = float("nan")
    with pytest.raises(rs.SteerError, match="holds NaN or infinite numbers"):
        rs.save(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def save_on_a_full_disk(folder):
    import resource

    model = shake(rs.steer(vit(), rank=32))
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
    with pytest.raises(rs.SteerError, match=r"could not write .*File too large.*untouched"):
        rs.save(model, folder)


def test_a_disk_that_is_full_leaves_the_old_field_whole(saved):
    folder, expected = saved
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    apart(save_on_a_full_disk, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == files
    assert torch.equal(rs.load(vit(), folder)(IMAGES), expected)


@pytest.mark.parametrize("allowed", [0, 1, 2])
def test_an_interrupted_save_is_the_old_field_or_the_new_one(saved, monkeypatch, allowed):
    """Stop a save before each of its renames: what can be loaded is always one field or the other."""
    folder, expected = saved
    model = shake(rs.steer(vit(), rank=4, train="head"))
    new, replace, done = model(IMAGES), os.replace, []

    def counted(source, target):
        if len(done) == allowed:
            raise KeyboardInterrupt
        done.append(target)
        replace(source, target)

    monkeypatch.setattr(os, "replace", counted)
    if allowed < 2:
        with pytest.raises(KeyboardInterrupt):
            rs.save(model, folder)
    else:
        rs.save(model, folder)
    assert torch.equal(rs.load(vit(), folder)(IMAGES), new if allowed == 2 else expected)


def test_what_was_opened_is_read_also_when_another_field_is_saved_over_it(saved):
    stored = open_field(saved[0])
    before = safetensors.torch.load_file(saved[0] / TENSORS)
    rs.save(shake(rs.steer(vit(), rank=4, train="head")), saved[0])
    tensors = stored.read()
    assert tensors.keys() == before.keys()
    assert all(torch.equal(tensors[key], before[key]) for key in before)


def test_nothing_is_ever_unpickled():
    for path in PACKAGE.rglob("*.py"):
        assert not re.search(r"(?<!safetensors\.)torch\.load|\bpickle\b|weights_only", path.read_text()), path


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_a_header_without_our_description_is_made_good_by_the_other_file(saved, metadata):
    folder, expected = saved
    tensors = safetensors.torch.load_file(folder / TENSORS)
    safetensors.torch.save_file(tensors, folder / TENSORS, metadata)
    assert torch.equal(rs.load(vit(), folder)(IMAGES), expected)
    tensors["blocks.0.up.bias"] += 1
    safetensors.torch.save_file(tensors, folder / TENSORS, metadata)
    with refused(model := vit(), "its SHA-256 differs"):
        rs.load(model, folder)


@pytest.mark.parametrize(
    ("wrapped", "plain"),
    [
        ("blocks.0.up.weight", "blocks.0.up.weight"),
        ("module.blocks.0.up.weight", "blocks.0.up.weight"),
        ("_orig_mod.blocks.0.up.weight", "blocks.0.up.weight"),
        ("blocks.0._orig_mod.up.weight", "blocks.0.up.weight"),
        ("blocks.0.my_orig_mod.up.weight", "blocks.0.my_orig_mod.up.weight"),
        ("module._orig_mod.module.train.module.head._orig_mod.weight", "train.head.weight"),
        ("train._orig_mod.module.head.weight", "train.head.weight"),
        ("head.module.weight", "head.module.weight"),  # only in front is it a wrapper's
        *((name, name) for name in ("module", "train.module", "_orig_mod", "")),
    ],
)
def test_the_names_of_wrappers_are_stripped(wrapped, plain):
    assert plain_key(wrapped) == plain
    assert plain_key(plain) == plain


def test_names_are_found_as_they_stand_before_they_are_stripped():
    there = ["module.head.weight", "head.weight", "tail.weight"]
    both = ["module.head.weight", "head.weight"]
    assert find_names(both, there) == dict(zip(both, both, strict=True))
    assert find_names(["module.tail._orig_mod.weight"], there) == {"module.tail._orig_mod.weight": "tail.weight"}
    assert find_names(["tail.weight"], ["module.tail.weight"]) == {"tail.weight": "module.tail.weight"}
    assert find_names(["module.module.head.weight", "no"], there) == {}  # it could be either
    with pytest.raises(rs.SteerError, match=r"'tail\.weight' and 'module\.tail\.weight' become one"):
        find_names(["tail.weight", "module.tail.weight"], ["tail.weight"])


def test_wrappers_leave_no_trace_in_the_file(tmp_path):
    model = shake(rs.steer(vit(), rank=4, train="head"))
    expected = model(IMAGES)
    rs.save(nn.DataParallel(torch.compile(model)), tmp_path)  # `module.` and `_orig_mod.`
    assert set(safetensors.torch.load_file(tmp_path / TENSORS)) == {
        *(f"blocks.{i}.{part}.{kind}" for i in range(3) for part in ("down", "up") for kind in ("weight", "bias")),
        "train.head.weight",
        "train.head.bias",
    }
    model.head = torch.compile(model.head)  # names the head's weight head._orig_mod.weight
    rs.save(model, tmp_path)
    assert torch.equal(rs.load(vit(), tmp_path)(IMAGES), expected)


WRAPPED = {
    "module in front": lambda key: f"module.{key}",
    "compiled as a whole": lambda key: f"_orig_mod.{key}",
    "both": lambda key: f"_orig_mod.module.{key}",
    "compiled parts": lambda key: key.replace("up.", "up._orig_mod.").replace("head.", "head._orig_mod."),
    "inside train": lambda key: key.replace("train.", "train.module."),
}


@pytest.mark.parametrize("named", [False, True], ids=["keys", "keys and description"])
@pytest.mark.parametrize("wrapped", WRAPPED)
def test_a_file_whose_names_went_through_a_wrapper_is_the_same_field(saved, wrapped, named):
    """Another program wrote the tensors under its own names; the digest is the one that `save` wrote."""
    folder, expected = saved
    wrap = WRAPPED[wrapped]
    tensors = safetensors.torch.load_file(folder / TENSORS)
    description = json.loads((folder / DESCRIPTION).read_text())
    if named:
        trained = description["field"]["train"]
        description["field"]["train"] = [wrap(f"train.{key}").split("train.")[1] for key in trained]
    tensors = {wrap(key): value for key, value in tensors.items()}
    safetensors.torch.save_file(tensors, folder / TENSORS, {"residual_steer": json.dumps(description)})
    assert torch.equal(rs.load(vit(), folder)(IMAGES), expected)


@pytest.mark.parametrize("twin", ["module.blocks.0.up.bias", "train.module.head.bias", "blocks.0.up._orig_mod.bias"])
def test_two_keys_that_become_one_are_refused(saved, twin):
    rewrite(saved[0], lambda tensors: tensors.update({twin: torch.zeros(32)}))
    with refused(model := vit(), f"left over are {twin}. Some of its names become one"):
        rs.load(model, saved[0])


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.mlp = nn.Linear(8, 8)

    def forward(self, z):
        return z + torch.tanh(self.mlp(z))


class Parts(nn.Module):
    """A model that calls a part of its own `module`, beside another of the same plain name."""

    def __init__(self, both):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.module = nn.ModuleDict({"head": nn.Linear(8, 3)})
        if both:
            self.head = nn.Linear(8, 3)

    def forward(self, z):
        for block in self.blocks:
            z = block(z)
        return self.module["head"](z) + (self.head(z) if hasattr(self, "head") else 0)


@pytest.mark.parametrize("both", [False, True])
def test_a_part_that_is_really_called_module_is_found_by_that_name(tmp_path, both):
    rs.register_backbone("parts", matches=[f"{__name__}.Parts"])(lambda m: rs.Backbone(blocks=m.blocks, width=8))
    torch.manual_seed(0)
    fresh, z = Parts(both), torch.randn(2, 8)
    model = shake(rs.steer(copy.deepcopy(fresh), rank=2, train=["module", "head"] if both else "module"))
    rs.save(model, tmp_path)
    loads = [shutil.copytree(tmp_path, tmp_path / "0.1")]  # which digested the names as they stand, if two became one
    tensors = safetensors.torch.load_file(tmp_path / TENSORS)
    described = json.loads((tmp_path / DESCRIPTION).read_text())
    described["sha256"] = digest(described, tensors, str)
    safetensors.torch.save_file(tensors, loads[0] / TENSORS, {"residual_steer": json.dumps(described)})
    for folder in (tmp_path, *loads):
        assert torch.equal(rs.load(copy.deepcopy(fresh), folder)(z), model(z))
    tensors = {f"module.{key}": value for key, value in tensors.items()}
    text = (tmp_path / DESCRIPTION).read_text()
    safetensors.torch.save_file(tensors, tmp_path / TENSORS, {"residual_steer": text})
    if both:  # now train.module.head and train.head go by one plain name
        with pytest.raises(rs.SteerError, match=r"missing are train.*Some of its names become one"):
            rs.load(copy.deepcopy(fresh), tmp_path)
    else:
        assert torch.equal(rs.load(copy.deepcopy(fresh), tmp_path)(z), model(z))
