"""The two ends of what is installed: the pins of `make test-oldest`, and the lock that `make test` installs from."""

import dataclasses
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from cases import CASES
from cases.case import before

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / ".ci" / "oldest.py"


def loaded(name):
    specified = importlib.util.spec_from_file_location(name, ROOT / ".ci" / f"{name}.py")
    module = importlib.util.module_from_spec(specified)
    specified.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def oldest():
    return loaded("oldest")


def test_lower_bounds_become_pins(oldest):
    project = {
        "name": "mine",
        "dependencies": ["torch>=2.6", "tqdm>=4.60"],
        "optional-dependencies": {
            "timm": ["timm>=1.0.15"],
            "plots": ["matplotlib>=3.7"],
            "all": ["mine[timm,plots]", "scikit-learn>=1.3"],
            "tables": ["mine[plots]", "scipy>=1.13", "tomli>=2; python_version < '3.11'"],
            "dev": ["mine[all, tables]", "torchao>=0.11", "pytest>=8"],
        },
    }
    assert oldest.pins(project, free=["tqdm"]) == [
        "torch==2.6.*",
        "tqdm>=4.60",
        "timm==1.0.15.*",
        "matplotlib==3.7.*",
        "scikit-learn==1.3.*",
        "scipy==1.13.*",
        "tomli==2.*; python_version < '3.11'",
        "torchao==0.11.*",
        "pytest>=8",
    ]
    assert oldest.pins(project, free=[])[1] == "tqdm==4.60.*"
    with pytest.raises(SystemExit, match=r"written name>=version; pyproject\.toml has 'torch<3'"):
        oldest.pins({**project, "dependencies": ["torch<3"]}, [])


def test_our_own_bounds_are_read():
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, check=True).stdout.split()
    assert {"tqdm>=4.60", "pytest>=8"} <= set(done)
    assert any(line.startswith("transformers==") and line.endswith(".*") for line in done)
    assert not any(line.startswith(("mamba-ssm", "residual-steer")) for line in done)


def test_an_extra_is_printed_as_it_stands():
    done = subprocess.run([sys.executable, str(SCRIPT), "docs"], capture_output=True, text=True, check=True).stdout
    assert {"mkdocs>=1.6", "mkdocstrings[python]>=0.29"} <= set(done.splitlines())


def test_the_lock_names_a_release_of_everything_that_is_asked_for(oldest):
    locked = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if not line.startswith("#"):
            one = Requirement(line)
            (exact,) = one.specifier
            assert exact.operator == "=="
            locked[canonicalize_name(one.name)] = exact.version
    project = oldest.tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    bounds = [line.replace("==", ">=").replace(".*", "") for line in oldest.pins(project)]
    assert len(bounds) > 20
    for bound in map(Requirement, bounds):
        if bound.marker is None or bound.marker.evaluate({"python_version": "3.11"}):
            assert locked[canonicalize_name(bound.name)] in bound.specifier, bound


def test_a_release_for_newer_pythons_alone_is_locked_for_those():
    line = loaded("lock").line
    assert line("Some_Package", "1.2", ">=3.9") == line("some.package", "1.2", None) == "some-package==1.2"
    assert line("one", "1", "!=3.12.0,>=3.11") == 'one==1 ; python_version >= "3.11"'


def test_what_an_older_release_cannot_do_is_told_for_that_release_alone(monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", lambda package: "5.14.1")
    assert before("transformers", "5.14.1", generate="why") == {}
    assert before("transformers", "5.9", generate="why") == {}
    assert before("transformers", "5.15", generate="why") == {"generate": "transformers 5.14.1, unsteered: why"}
    assert before("no_such_package", "5.15", generate="why") == {}


def test_a_case_skips_what_it_cannot_do():
    case = dataclasses.replace(CASES[0], broken={"export": "torch 2.6.0, unsteered: why"})
    case.needs("generate")
    with pytest.raises(pytest.skip.Exception, match=r"torch 2\.6\.0, unsteered: why"):
        case.needs("export")
