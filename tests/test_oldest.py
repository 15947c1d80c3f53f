"""The pins of `make test-oldest`, read off pyproject.toml."""

import dataclasses
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from cases import CASES
from cases.case import before

SCRIPT = Path(__file__).parents[1] / ".ci" / "oldest.py"


@pytest.fixture(scope="module")
def oldest():
    specified = importlib.util.spec_from_file_location("oldest", SCRIPT)
    module = importlib.util.module_from_spec(specified)
    specified.loader.exec_module(module)
    return module


def test_lower_bounds_become_pins(oldest):
    project = {
        "name": "mine",
        "dependencies": ["torch>=2.6", "tqdm>=4.60"],
        "optional-dependencies": {
            "timm": ["timm>=1.0.15"],
            "plots": ["matplotlib>=3.7"],
            "all": ["mine[timm,plots]", "scikit-learn>=1.3"],
            "dev": ["mine[all]", "pytest>=8"],
        },
    }
    assert oldest.pins(project, free=["tqdm"]) == [
        "torch==2.6.*",
        "tqdm>=4.60",
        "timm==1.0.15.*",
        "matplotlib==3.7.*",
        "scikit-learn==1.3.*",
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
