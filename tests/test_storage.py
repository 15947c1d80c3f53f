import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

import residual_steer as rs
from fields import IMAGES, assert_as, rewrite, save_one, shake, snapshot, vit
from residual_steer._controller import steering_of
from residual_steer._format import DESCRIPTION, TENSORS
from residual_steer.config import FieldConfig

PACKAGE = Path(rs.__file__).parent


@pytest.fixture
def saved(tmp_path):
    return save_one(tmp_path / "field")


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


def test_a_field_that_version_0_1_wrote_loads():
    model = rs.load(vit(), Path(__file__).parent / "data" / "field-0.1")
    base, state = steering_of(model)
    assert state.specs["old"] == FieldConfig(
        "old", "block", {0: 1, 2: 2}, 0.5, "silu", True, 0.1, ("head.weight", "head.bias")
    )
    tensors = state.tensors(base, "old")
    assert len(tensors) == 10
    for tensor in tensors.values():
        assert torch.equal(tensor, torch.linspace(-1, 1, tensor.numel()).reshape(tensor.shape))


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
    with pytest.raises(rs.SteerError, match="'two' is in use"):
        rs.load(model, folder, name="two")


def test_a_loaded_field_goes_on_training(saved):
    model = rs.load(vit(), saved[0])
    model(IMAGES).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in rs.parameters(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_field_saved_in_half_precision_loads_in_fp32(tmp_path, dtype):
    model = shake(rs.steer(vit(), rank=4)).to(dtype)
    expected = {key: tensor.float() for key, tensor in model.state_dict().items() if "steering_" in key}
    rs.save(model, tmp_path)
    loaded = rs.load(vit(), tmp_path).state_dict()
    assert all(torch.equal(loaded[key], expected[key]) and loaded[key].dtype == torch.float32 for key in expected)


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


def test_another_class_of_the_same_shape_loads_with_a_warning(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=128, image_size=8, patch_size=4
    )
    rs.save(shake(rs.steer(vit(), rank=4)), tmp_path)
    with pytest.warns(UserWarning, match="class timm.*against transformers"):
        rs.load(transformers.ViTModel(config), tmp_path)


def test_another_config_of_the_same_shape_loads_with_a_warning(tmp_path):
    transformers = pytest.importorskip("transformers")

    def gpt2(positions):
        return transformers.GPT2Model(
            transformers.GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=9, n_positions=positions,
                                    bos_token_id=0, eos_token_id=0)
        )  # fmt: skip

    rs.save(rs.steer(gpt2(8), rank=4), tmp_path)
    rs.load(gpt2(8), tmp_path)  # warnings are errors here: the same config says nothing
    with pytest.warns(UserWarning, match="n_positions 8 against 4"):
        rs.load(gpt2(4), tmp_path)


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
    model = make()
    before = snapshot(model)
    with pytest.raises(rs.SteerError, match=message):
        rs.load(model, saved[0])
    assert_as(model, before)


DAMAGE = {
    "no folder": (shutil.rmtree, "could not read a field.*No such file"),
    "no tensors": (lambda f: (f / TENSORS).unlink(), rf"No such file.*{TENSORS}"),
    "no description": (lambda f: (f / DESCRIPTION).unlink(), rf"No such file.*{DESCRIPTION}"),
    "a folder as file": (lambda f: ((f / TENSORS).unlink(), (f / TENSORS).mkdir()), "could not read a field"),
    "empty": (lambda f: (f / TENSORS).write_bytes(b""), "there is none, or a damaged one"),
    "truncated": (lambda f: (f / TENSORS).write_bytes((f / TENSORS).read_bytes()[:-9]), "damaged"),
    "not safetensors": (lambda f: (f / TENSORS).write_bytes(b"PK\x03\x04" * 99), "damaged"),
    "foreign safetensors": (
        lambda f: safetensors.torch.save_file({"lora_A": torch.zeros(2)}, f / TENSORS),
        "its SHA-256 differs|does not hold what it says",
    ),
    "not JSON": (lambda f: (f / DESCRIPTION).write_text("{"), "damaged one \\(JSONDecodeError"),
    "deep JSON": (lambda f: (f / DESCRIPTION).write_text("[" * 10**5), "RecursionError"),
    "foreign JSON": (lambda f: (f / DESCRIPTION).write_text("{}"), "needs str at 'format'; found None"),
    "a list": (lambda f: (f / DESCRIPTION).write_text("[]"), "needs str at 'format'"),
    "a missing tensor": (
        lambda f: rewrite(f, lambda t: t.pop("blocks.2.up.bias")),
        "missing are blocks.2.up.bias",
    ),
    "an extra tensor": (
        lambda f: rewrite(f, lambda t: t.update({"blocks.9.up.bias": torch.zeros(2)})),
        "left over are blocks.9.up.bias",
    ),
    "another shape": (
        lambda f: rewrite(f, lambda t: t.update({"blocks.0.up.bias": torch.zeros(31)})),
        r"blocks.0.up.bias has shape \(31,\); this model needs \(32,\)",
    ),
    "a newer format": (lambda f: rewrite(f, None, lambda d: d.update(format_version=2)), "version 2; this library"),
    "another format": (lambda f: rewrite(f, None, lambda d: d.update(format="peft")), "of format 'peft'"),
    "a bool for a number": (
        lambda f: rewrite(f, None, lambda d: d["field"].update(scale=True)),
        "float at 'field.scale'; found True",
    ),
    "an infinite scale": (
        lambda f: rewrite(f, None, lambda d: d["field"].update(scale=float("inf"))),
        "`scale` is a finite number",
    ),
    "a scale beyond all floats": (
        lambda f: rewrite(f, None, lambda d: d["field"].update(scale=10**400)),
        "`scale` is a finite number",
    ),
    "an entry that is too deep": (
        lambda f: rewrite(f, None, lambda d: d["backbone"]["config"].update(more={"deeper": {}})),
        "config, whose values are not plain",
    ),
    "an entry that stands there twice": (
        lambda f: (f / DESCRIPTION).write_text((f / DESCRIPTION).read_text().replace("{", '{"format": "x",', 1)),
        "has a key twice",
    ),
    "a huge rank": (lambda f: rewrite(f, None, lambda d: d["field"].update(ranks={"0": 10**30})), "`rank` is"),
    "a block too many": (lambda f: rewrite(f, None, lambda d: d["field"].update(ranks={"3": 1})), "as ranks of 3"),
    "an unknown site": (lambda f: rewrite(f, None, lambda d: d["field"].update(site="head")), "`site` is one of"),
    "an unknown activation": (lambda f: rewrite(f, None, lambda d: d["field"].update(activation="x")), "`activation`"),
    "a bad name": (lambda f: rewrite(f, None, lambda d: d["field"].update(name="a.b")), "a field's `name`"),
    "widths that do not count": (
        lambda f: rewrite(f, None, lambda d: d["backbone"].update(blocks=4)),
        "as widths of 4 blocks",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_or_foreign_file_is_refused_and_changes_nothing(saved, damage):
    spoil, message = DAMAGE[damage]
    spoil(saved[0])
    model = vit()
    before = snapshot(model)
    with pytest.raises(rs.SteerError, match=message):
        rs.load(model, saved[0])
    assert_as(model, before)


def test_no_flipped_bit_goes_unseen(saved):
    folder, expected = saved
    whole = (folder / TENSORS).read_bytes()
    model = vit()
    before = snapshot(model)
    chance = random.Random(0)
    for _ in range(200):
        spoiled = bytearray(whole)
        spoiled[chance.randrange(len(whole))] ^= 1 << chance.randrange(8)
        (folder / TENSORS).write_bytes(spoiled)
        try:
            rs.load(model, folder)
        except rs.SteerError:
            assert_as(model, before)
        else:  # a blank of the header's padding may turn into another
            assert torch.equal(model(IMAGES), expected)
            rs.unsteer(model)


def test_saving_where_nothing_can_be_written(saved, tmp_path):
    model = rs.steer(vit(), rank=4)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(rs.SteerError, match="could not make the folder"):
        rs.save(model, tmp_path / "file" / "field")
    with pytest.raises(rs.SteerError, match=r"`name` is one of the fields default; received 'other'"):
        rs.save(model, tmp_path / "new", name="other")
    rs.use(model, None)
    with pytest.raises(rs.SteerError, match="received None"):
        rs.save(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    with pytest.raises(rs.SteerError, match="not steered"):
        rs.save(vit(), tmp_path / "new")


FULL_DISK = """
import resource, sys, torch
sys.path.insert(0, {tests!r})
import residual_steer as rs
from fields import vit, shake
torch.manual_seed(1)
model = shake(rs.steer(vit(), rank=32))
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
try:
    rs.save(model, {folder!r})
except rs.SteerError as error:
    print(error)
"""


def test_a_disk_that_is_full_leaves_the_old_field_whole(saved):
    folder, expected = saved
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    code = FULL_DISK.format(tests=str(Path(__file__).parent), folder=str(folder))
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert re.search(r"could not write .*File too large.*untouched", finished.stdout)
    assert (folder / TENSORS).read_bytes() == files[TENSORS]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == files
    assert torch.equal(rs.load(vit(), folder)(IMAGES), expected)


def test_an_interrupted_save_is_the_old_field_or_the_new_one(saved, tmp_path, monkeypatch):
    """Stop a save before each of its renames: what can be loaded is always one field or the other."""
    folder, expected = saved
    model = shake(rs.steer(vit(), rank=4, train="head"))
    new = model(IMAGES)
    replace = os.replace
    for allowed in (0, 1, 2):
        place = shutil.copytree(folder, tmp_path / str(allowed))
        done = []

        def counted(source, target, done=done, allowed=allowed):
            if len(done) == allowed:
                raise KeyboardInterrupt
            done.append(target)
            replace(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", counted)
            if allowed < 2:
                with pytest.raises(KeyboardInterrupt):
                    rs.save(model, place)
            else:
                rs.save(model, place)
        assert torch.equal(rs.load(vit(), place)(IMAGES), new if allowed == 2 else expected)


def test_files_are_as_readable_as_any_other(saved):
    mask = os.umask(0)
    os.umask(mask)
    assert all(path.stat().st_mode & 0o777 == 0o666 & ~mask for path in saved[0].iterdir())


def test_nothing_is_ever_unpickled():
    for path in PACKAGE.rglob("*.py"):
        assert not re.search(r"(?<!safetensors\.)torch\.load|\bpickle\b|weights_only", path.read_text()), path


def test_another_kind_of_backbone_is_refused_even_in_the_same_shape(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=3, n_embd=32, n_head=2, vocab_size=9, bos_token_id=0, eos_token_id=0)
    rs.save(rs.steer(vit(), rank=4), tmp_path)
    with pytest.raises(rs.SteerError, match="trained on vit, 3 blocks of width 32; this model has gpt2, 3 blocks"):
        rs.load(transformers.GPT2Model(config), tmp_path)


def test_a_description_that_was_edited_is_refused(saved):
    path = saved[0] / DESCRIPTION
    path.write_text(path.read_text().replace('"scale": 0.5', '"scale": 5.0'))
    with pytest.raises(rs.SteerError, match="says other than"):
        rs.load(vit(), saved[0])


def test_a_model_without_values_is_refused(saved):
    with pytest.raises(rs.SteerError, match="meta device"):
        rs.load(vit().to("meta"), saved[0])


@pytest.mark.parametrize("folder", [None, 5, "", "a\0b"])
def test_a_folder_is_a_path(folder):
    model = rs.steer(vit(), rank=4)
    for call in (lambda: rs.save(model, folder), lambda: rs.load(vit(), folder)):
        with pytest.raises(rs.SteerError, match=r"a folder is a path|could not"):
            call()


@pytest.mark.parametrize("field", [torch.float32, torch.float64])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_a_field_loads_into_its_own_type_from_any_float(saved, stored, field):
    rewrite(saved[0], lambda tensors: tensors.update({key: value.to(stored) * 1.1 for key, value in tensors.items()}))
    model = rs.load(vit().to(field), saved[0])
    inside = safetensors.torch.load_file(saved[0] / TENSORS)
    base, state = steering_of(model)
    for key, tensor in state.tensors(base, "default").items():
        assert tensor.dtype == field
        assert torch.equal(tensor, inside[key].to(field))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            torch.zeros(32, dtype=torch.int64),
            "blocks.0.up.bias is stored as torch.int64; this model needs torch.float32",
        ),
        (torch.zeros(32, dtype=torch.bool), "stored as torch.bool"),
        (torch.zeros(32, dtype=torch.complex64), "stored as torch.complex64"),
        (torch.zeros(32, dtype=torch.float8_e4m3fn), "stored as torch.float8_e4m3fn"),
        (torch.full((32,), 1e39, dtype=torch.float64), "numbers too large for torch.float32"),
    ],
)
def test_numbers_of_another_kind_are_refused(saved, value, message):
    rewrite(saved[0], lambda tensors: tensors.update({"blocks.0.up.bias": value}))
    model = vit()
    before = snapshot(model)
    with pytest.raises(rs.SteerError, match=message):
        rs.load(model, saved[0])
    assert_as(model, before)


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
    with pytest.raises(rs.SteerError, match=r"is stored as torch\.float32; this model needs torch.int64"):
        rs.load(model(), tmp_path)


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_a_header_without_our_description_is_made_good_by_the_other_file(saved, metadata):
    folder, expected = saved
    tensors = safetensors.torch.load_file(folder / TENSORS)
    safetensors.torch.save_file(tensors, folder / TENSORS, metadata)
    assert torch.equal(rs.load(vit(), folder)(IMAGES), expected)
    tensors["blocks.0.up.bias"] += 1
    safetensors.torch.save_file(tensors, folder / TENSORS, metadata)
    with pytest.raises(rs.SteerError, match="its SHA-256 differs"):
        rs.load(vit(), folder)
