"""The state of a null space: it comes back as it was, and what does not belong or is damaged is refused."""

import copy
import functools
import json
import operator
from pathlib import Path

import pytest
import safetensors.torch
import torch

import residual_steer as rs
from fields import IMAGES, shake, vit
from residual_steer.continual import NullSpace


def observed(energy=1.0, rank=20, tasks=1, **options):
    model = shake(rs.steer(vit(), rank=rank, layers=[0, 2], **options))
    space = NullSpace(model, energy)
    for task in range(tasks):
        space.observe([IMAGES[:1] + task])
    return model, space


def assert_same(one, other):
    assert one.tasks == other.tasks
    assert one.report() == other.report()
    a, b = one.state_dict()["points"], other.state_dict()["points"]
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key][part], b[key][part]) for key in a for part in ("basis", "response"))


def test_it_comes_back_and_goes_on(tmp_path):
    model, space = observed(tasks=2)
    space.save(tmp_path / "deep" / "null.safetensors")
    other = NullSpace(model, 1.0)
    other.load(str(tmp_path / "deep" / "null.safetensors"))
    assert_same(space, other)
    for each in (space, other):
        each.observe([IMAGES[:1].flip(-1)])
    assert_same(space, other)
    assert space.tasks == 3
    empty = NullSpace(model, 1.0)
    other.load_state_dict(empty.state_dict())
    assert_same(empty, other)


def test_a_file_that_version_0_2_wrote_loads():
    space = NullSpace(rs.steer(vit(), rank=1, layers=[2]), 1.0)
    space.load(Path(__file__).parent / "data" / "null-space-0.2" / "null.safetensors")
    assert space.tasks == 1
    points = space.state_dict()["points"]
    assert {key: tuple(point["basis"].shape) for key, point in points.items()} == {
        "blocks.2.down": (33, 5),
        "blocks.2.up": (2, 2),
    }


def test_a_state_is_a_copy():
    _, space = observed()
    state = copy.deepcopy(space.state_dict())
    given = space.state_dict()
    space.load_state_dict(given)
    given["points"]["blocks.0.up"]["basis"].zero_()
    given["points"]["blocks.0.up"]["shares"].append(0.5)
    assert space.tasks == 1
    assert torch.equal(space.state_dict()["points"]["blocks.0.up"]["basis"], state["points"]["blocks.0.up"]["basis"])


@pytest.mark.parametrize(
    ("other", "match"),
    [
        (lambda: observed(energy=0.9)[1], r"energy 1\.0, here 0\.9"),
        (lambda: observed(site="mlp")[1], r"site 'block', here 'mlp'"),
        (lambda: observed(rank=7, tasks=0)[1], r"other sizes: at blocks\.0\.down .* 7 outputs"),
        (lambda: observed(bias=False)[1], r"other sizes: at blocks\.0\.down .* 32 inputs"),
        (lambda: NullSpace(rs.steer(vit(), rank=20), 1.0), r"projections blocks\.0\.down.*, here .*blocks\.1\.up.*"),
    ],
)
def test_it_belongs_to_one_kind_of_field(other, match):
    _, space = observed()
    there = other()
    before = there.report()
    with pytest.raises(rs.SteerError, match=match):
        there.load_state_dict(space.state_dict())
    assert there.report() == before


ON = ("points", "blocks.0.up")
DAMAGE = [  # where, what comes there or is made of what is there, and what the error says
    (("format",), 2, "another version"),
    (("points",), [], "another version"),
    (ON, {}, r"blocks\.0\.up is damaged \(KeyError"),
    ((*ON, "basis"), "text", r"blocks\.0\.up is damaged"),
    ((*ON, "basis"), lambda t: 2 * t, "not orthonormal"),
    ((*ON, "basis"), lambda t: t * float("nan"), "not orthonormal"),
    ((*ON, "basis"), torch.tensor(1.0), r"blocks\.0\.up is damaged"),
    ((*ON, "response"), lambda t: t * float("inf"), "not finite"),
    ((*ON, "response"), lambda t: t[:, :1], "other sizes"),
    ((*ON, "shares"), [0.1, 0.2], "different numbers of tasks"),
]


@pytest.mark.parametrize(("path", "value", "match"), DAMAGE)
def test_what_is_damaged_is_refused(path, value, match):
    _, space = observed()
    state = copy.deepcopy(space.state_dict())
    *way, last = path
    place = functools.reduce(operator.getitem, way, state)
    place[last] = value(place[last]) if callable(value) else value
    with pytest.raises(rs.SteerError, match=match):
        space.load_state_dict(state)
    assert space.tasks == 1


def test_files_that_are_none(tmp_path):
    _, space = observed()
    place = tmp_path / "null.safetensors"
    with pytest.raises(rs.SteerError, match="could not read"):
        space.load(place)
    space.save(place)
    whole = place.read_bytes()
    for content in (b"", whole[:100], whole[:-8], b"\xff" * 64):
        place.write_bytes(content)
        with pytest.raises(rs.SteerError, match="is damaged or was not written by"):
            space.load(place)
    safetensors.torch.save_file({"a": torch.zeros(1)}, place)
    with pytest.raises(rs.SteerError, match="is damaged or was not written by"):
        space.load(place)
    tensors = safetensors.torch.load(whole)
    header = json.loads(whole[8 : 8 + int.from_bytes(whole[:8], "little")])["__metadata__"]
    tensors.pop("blocks.2.up.basis")
    place.write_bytes(safetensors.torch.save(tensors, header))
    with pytest.raises(rs.SteerError, match=r"blocks\.2\.up\.basis"):
        space.load(place)
    place.write_bytes(whole)
    NullSpace(observed()[0], 1.0).load(place)
