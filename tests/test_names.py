import copy
import json

import pytest
import safetensors.torch
import torch
from torch import nn

import residual_steer as rs
from fields import IMAGES, rewrite, save_one, shake, vit
from residual_steer._format import DESCRIPTION, TENSORS, find_names, plain_key


@pytest.mark.parametrize(
    ("wrapped", "plain"),
    [
        ("blocks.0.up.weight", "blocks.0.up.weight"),
        ("module.blocks.0.up.weight", "blocks.0.up.weight"),
        ("_orig_mod.blocks.0.up.weight", "blocks.0.up.weight"),
        ("blocks.0._orig_mod.up.weight", "blocks.0.up.weight"),
        ("module._orig_mod.module.train.module.head._orig_mod.weight", "train.head.weight"),
        ("train._orig_mod.module.head.weight", "train.head.weight"),
        ("head.module.weight", "head.module.weight"),  # only in front is it a wrapper's
        ("module", "module"),
        ("train.module", "train.module"),
        ("_orig_mod", "_orig_mod"),
        ("", ""),
    ],
)
def test_the_names_of_wrappers_are_stripped(wrapped, plain):
    assert plain_key(wrapped) == plain
    assert plain_key(plain) == plain


def test_names_are_found_as_they_stand_before_they_are_stripped():
    there = ["module.head.weight", "head.weight", "tail.weight"]
    assert find_names(["module.head.weight", "head.weight"], there) == {
        "module.head.weight": "module.head.weight",
        "head.weight": "head.weight",
    }
    assert find_names(["module.tail._orig_mod.weight"], there) == {"module.tail._orig_mod.weight": "tail.weight"}
    assert find_names(["tail.weight"], ["module.tail.weight"]) == {"tail.weight": "module.tail.weight"}
    assert find_names(["module.module.head.weight", "no"], there) == {}  # it could be either


def test_two_names_for_one_are_refused():
    with pytest.raises(rs.SteerError, match=r"'tail\.weight' and 'module\.tail\.weight' become one"):
        find_names(["tail.weight", "module.tail.weight"], ["tail.weight"])


@pytest.fixture
def saved(tmp_path):
    return save_one(tmp_path / "field")


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
        description["field"]["train"] = [
            wrap(f"train.{key}").split("train.")[1] for key in ("head.weight", "head.bias")
        ]
    tensors = {wrap(key): value for key, value in tensors.items()}
    safetensors.torch.save_file(tensors, folder / TENSORS, {"residual_steer": json.dumps(description)})
    assert torch.equal(rs.load(vit(), folder)(IMAGES), expected)


def test_two_keys_that_become_one_are_refused(saved):
    for twin in ("module.blocks.0.up.bias", "train.module.head.bias", "blocks.0.up._orig_mod.bias"):
        rewrite(saved[0], lambda tensors, twin=twin: tensors.update({twin: torch.zeros(32)}))
        with pytest.raises(rs.SteerError, match=f"left over are {twin}. Some of its names become one"):
            rs.load(vit(), saved[0])
        rewrite(saved[0], lambda tensors, twin=twin: tensors.pop(twin))
    rewrite(saved[0], None, lambda described: described["field"]["train"].append("module.head.bias"))
    with pytest.raises(rs.SteerError, match=r"'head\.bias' and 'module\.head\.bias' become one without"):
        rs.load(vit(), saved[0])


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
    fresh = Parts(both)
    z = torch.randn(2, 8)
    heads = ["module", "head"] if both else "module"
    model = shake(rs.steer(copy.deepcopy(fresh), rank=2, train=heads))
    rs.save(model, tmp_path)
    loaded = rs.load(copy.deepcopy(fresh), tmp_path)
    assert torch.equal(loaded(z), model(z))
    tensors = {f"module.{key}": value for key, value in safetensors.torch.load_file(tmp_path / TENSORS).items()}
    text = (tmp_path / DESCRIPTION).read_text()
    safetensors.torch.save_file(tensors, tmp_path / TENSORS, {"residual_steer": text})
    if both:  # now train.module.head and train.head go by one plain name
        with pytest.raises(rs.SteerError, match=r"missing are train.*Some of its names become one"):
            rs.load(copy.deepcopy(fresh), tmp_path)
    else:
        assert torch.equal(rs.load(copy.deepcopy(fresh), tmp_path)(z), model(z))
