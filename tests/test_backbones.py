"""The families: found in whatever stands around a model, at the points that the table of cases writes out."""

import importlib.util
import re
from pathlib import Path

import pytest
from torch import nn

import residual_steer as rs
from cases import CASES
from residual_steer import registry

# Classes of earlier releases, whose blocks stand elsewhere now.
EARLIER = {"transformers.CLIPVisionTransformer", "transformers.CLIPTextTransformer"}
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


class Wrapper(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = nn.ModuleDict({"model": inner})


@every_case
def test_points_are_those_that_are_written_out(case):
    model = case.build()
    backbone = rs.find_backbone(model)
    assert set(backbone.sites) == {*case.points, "after"}
    for site, paths in {**case.points, "after": case.points["block"]}.items():
        for index, path in enumerate(paths):
            assert backbone.point(index, site) is (None if path is None else model.get_submodule(path))
    assert len(backbone.blocks) == len(case.points["block"])


@every_case
def test_a_backbone_is_found_inside_others(case):
    model = case.build()
    backbone = rs.find_backbone(model)
    wrapped = rs.find_backbone(Wrapper(model))
    assert wrapped.path == f"inner.model.{backbone.path}".rstrip(".")
    plain = rs.find_backbone(model.get_submodule(backbone.path))
    assert plain.path == ""
    for found in (wrapped, plain):
        assert found.name == backbone.name
        assert [id(block) for block in found.blocks] == [id(block) for block in backbone.blocks]


@pytest.mark.parametrize("package", ["transformers", "timm", "torchvision"])
def test_every_class_that_is_named_is_there(package):
    spec = importlib.util.find_spec(package)
    if spec is None:
        pytest.skip(f"{package} is not installed")
    names = set()
    for path in Path(spec.origin).parent.glob("models/**/*.py"):
        if package != "transformers" or path.name.startswith("modeling_"):
            names.update(re.findall(r"^class (\w+)", path.read_text(), re.MULTILINE))
    rs.list_backbones()
    matches = [match for family in registry._families.values() for match in family.matches]
    named = [match for match in matches if match.partition(".")[0] == package]
    assert len(named) == len(set(named))
    assert [match for match in named if match.partition(".")[2] not in names and match not in EARLIER] == []


def test_every_family_has_a_case():
    found = {rs.find_backbone(case.build()).name for case in CASES}
    rs.list_backbones()  # reads what other packages register
    every = registry._families.values()
    ours = {family.name for family in every if family.describe.__module__.startswith("residual_steer.backbones")}
    assert found == ours


@every_case
def test_a_family_that_is_asked_for_by_name_is_found(case):
    model = case.build()
    name = rs.find_backbone(model).name
    assert rs.find_backbone(model, name).name == name
    others = [other for other in ("bert", "gpt2", "resnet") if other != name]
    for other in others:
        with pytest.raises(rs.SteerError, match="no known backbone"):
            rs.find_backbone(model, other)
