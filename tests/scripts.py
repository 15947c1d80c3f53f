"""Running experiments: fixtures and helpers of the tests of those on Hub data."""

import importlib
import sys

import pytest

from experiments.problem import Arm
from experiments.sweep import Entry, Run

WORDS = "the fox of a hen eats corn at dawn in red barns and sleeps near old wells while dogs bark".split()  # noqa: SIM905
LENGTH = 64


@pytest.fixture(scope="module", autouse=True)
def _prepared(tmp_path_factory):
    """What `datasets` prepares goes into a folder of the tests'."""
    datasets = pytest.importorskip("datasets")
    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = str(tmp_path_factory.mktemp("prepared"))
    yield
    datasets.config.HF_DATASETS_CACHE = before


def script(name, *arguments):
    return importlib.import_module(f"experiments.{name}").main([*map(str, arguments)])


@pytest.fixture
def no_training(monkeypatch):
    """Whatever trains fails."""

    def refuse(*arguments, **options):
        raise AssertionError("a finished run was made again")

    monkeypatch.setattr(sys.modules["experiments.sweep"], "fit", refuse)


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
