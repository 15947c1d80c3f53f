"""Running examples as scripts: fixtures and helpers of the tests of experiments on Hub data."""

import importlib
import sys
from pathlib import Path

import pytest

from residual_steer.study import Arm, Entry
from residual_steer.study.sweep import Run

EXAMPLES = Path(__file__).parents[1] / "examples"
WORDS = "the fox of a hen eats corn at dawn in red barns and sleeps near old wells while dogs bark".split()  # noqa: SIM905
LENGTH = 64


@pytest.fixture(scope="module", autouse=True)
def _scripts():
    """The scripts import their siblings as if they had been run."""
    sys.path.insert(0, str(EXAMPLES))
    yield
    sys.path.remove(str(EXAMPLES))


@pytest.fixture(scope="module", autouse=True)
def _prepared(tmp_path_factory):
    """What `datasets` prepares goes into a folder of the tests'."""
    datasets = pytest.importorskip("datasets")
    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = str(tmp_path_factory.mktemp("prepared"))
    yield
    datasets.config.HF_DATASETS_CACHE = before


def script(name, *arguments):
    return importlib.import_module(name).main([*map(str, arguments)])


@pytest.fixture
def no_training(monkeypatch):
    """Whatever trains fails."""

    def refuse(*arguments, **options):
        raise AssertionError("a finished run was made again")

    monkeypatch.setattr(sys.modules["residual_steer.study.sweep"], "fit", refuse)


def rows_of(table):
    return {row["method"]: row for row in table.rows}


def entry(name, values, metric="loss"):
    """An entry as `sweep` returns it, one value for every seed; None for a run that diverged."""
    runs = [Run(0.1, i, None, None if v is None else {metric: v}, None, 1, 2, 0.1, 1.0) for i, v in enumerate(values)]
    return Entry(Arm(name, "hres", (0.1,)), 0.1, (), tuple(runs))


def fail(capsys, name, *arguments):
    """Run a script that fails; return the one line that it says."""
    assert script(name, *arguments) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    return lines[0]
