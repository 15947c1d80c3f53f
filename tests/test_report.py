"""Results of experiments: what they hold, and that a file says exactly that or is refused."""

import copy
import json
import math
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import residual_steer as rs
from report_samples import bars, curves, ranks, result, tradeoff
from residual_steer.report import (
    Axis,
    Column,
    Measured,
    Plot,
    Result,
    Series,
    Table,
    Verdict,
    command_line,
    machine,
    portable,
    versions,
)

ROUND = {"tables": (result().tables[0],) * 2, "plots": (tradeoff(), curves(), bars(), ranks())}


def test_what_is_saved_is_loaded(tmp_path):
    saved = result(**ROUND)
    saved.save(tmp_path / "new" / "recall.json")
    loaded = Result.load(tmp_path / "new" / "recall.json")
    assert loaded == saved
    loaded.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "new" / "recall.json").read_bytes()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["recall.json"]


letters = st.text(st.characters(blacklist_categories=["Cs", "Cc", "Cn"], blacklist_characters="/\\~"), max_size=8)
finite = st.floats(allow_nan=False, allow_infinity=False)
numbers = st.one_of(
    st.integers(), finite, st.builds(Measured.of, st.lists(st.floats(-1e9, 1e9), min_size=1, max_size=4))
)
free = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), finite, letters),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(letters, inner, max_size=3)),
    max_leaves=8,
)


@given(st.lists(st.one_of(letters, numbers, st.none()), max_size=4), free, st.dictionaries(letters, free, max_size=3))
@settings(max_examples=60, deadline=None)
def test_any_result_survives_a_file(tmp_path_factory, cells, records, chosen):
    path = tmp_path_factory.getbasetemp() / "any.json"
    table = Table("any", (Column("key", "key"),), tuple({"key": cell} for cell in cells))
    saved = result(tables=(table,), records=records, settings=chosen)
    saved.save(path)
    assert Result.load(path) == saved


FREE = {("settings",), ("machine",), ("versions",), ("records",)}


def places(value, path=()):
    """Every place in JSON."""
    yield path
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in parts:
        yield from places(part, (*path, key))


def at(value, path):
    for key in path:
        value = value[key]
    return value


@pytest.fixture(scope="module")
def content(tmp_path_factory):
    path = tmp_path_factory.mktemp("content") / "recall.json"
    result(**ROUND).save(path)
    return json.loads(path.read_text())


@given(st.data())
@settings(max_examples=120, deadline=None)
def test_a_file_with_a_field_lost_added_or_of_another_kind_is_refused(content, data):
    damaged = copy.deepcopy(content)
    objects = [path for path in places(content) if isinstance(at(content, path), dict) and path[:1] not in FREE]
    path = data.draw(st.sampled_from(objects))
    found = at(damaged, path)
    change = data.draw(st.sampled_from(["lose", "add", "replace"]))
    if change == "add":
        found["more"] = 1
    else:
        key = data.draw(st.sampled_from(sorted(key for key in found if (*path, key) not in FREE)))
        if change == "replace":
            found[key] = data.draw(st.sampled_from([{"a": 1}, [[]], "\x00"]))  # which no field takes
        elif path[2:3] == ("rows",):  # a cell that is left out is None
            return
        else:
            del found[key]
    with pytest.raises(rs.SteerError):
        Result.parse(damaged, "a file")


@given(st.binary(max_size=40), st.integers(0, 4000))
@settings(max_examples=80, deadline=None)
def test_damaged_bytes_are_refused_with_an_error_of_ours(tmp_path_factory, some, position):
    path = tmp_path_factory.getbasetemp() / "damaged.json"
    result().save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: position % len(whole)] + some)
    try:
        loaded = Result.load(path)
    except rs.SteerError:
        return
    assert isinstance(loaded, Result)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"a": 1}', "is no result"),
        ("[1]", "is no result"),
        ('{"a": NaN}', "JSON has no NaN"),
        ('{"a": 1, "a": 2}', "twice"),
        ("[" * 100_000, "holds no JSON"),
        ('{"format": "residual_steer.result", "format_version": 2}', "reads version 1"),
        ('{"format": "residual_steer.result", "format_version": true}', "reads version 1"),
        ('{"format": "residual_steer.result", "format_version": 1}', "lacks about, command"),
        ("\xff", "holds no JSON"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(tmp_path, text, said):
    path = tmp_path / "file.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(rs.SteerError, match=said) as raised:
        Result.load(path)
    assert "file.json" in str(raised.value)
    with pytest.raises(rs.SteerError, match="could not read"):
        Result.load(tmp_path / "none.json")


def test_a_message_says_where(content):
    damaged = copy.deepcopy(content)
    damaged["tables"][1]["rows"][0]["accuracy"] = [1]
    with pytest.raises(
        rs.SteerError, match=r"x\.json\.tables\[1\]\.rows\[0\]\.accuracy is one of str, int, float, Mea"
    ):
        Result.parse(damaged, "x.json")
    damaged = copy.deepcopy(content)
    damaged["plots"][0]["series"][2]["z"] = 1
    with pytest.raises(rs.SteerError, match=r"plots\[0\]\.series\[2\] has unknown z; its fields: name, x, y, labels"):
        Result.parse(damaged, "x.json")


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Column("a", "b", better="higher"), "one of 'up', 'down', None; received 'higher'"),
        (lambda: Column("a", "b", digits=13), "0 to 12"),
        (lambda: Column("a", "b", digits=True), "an integer"),
        (lambda: Column("a", "b\x00"), "control characters"),
        (lambda: Column("a", "\ud800"), "control characters"),
        (lambda: Axis("a", log=1), "True or False"),
        (lambda: Table("t", (), ()), "columns of different keys"),
        (lambda: Table("t", (Column("a", "a"),) * 2, ()), "columns of different keys"),
        (lambda: Table("t", (Column("a", "a"),), ({"b": 1},)), "cells for a; received b"),
        (lambda: Table("t", (Column("a", "a"),), ({"a": True},)), "one of str, int, float"),
        (lambda: Table("t", (Column("a", "a"),), ({"a": torch.tensor(1.0)},)), "one of str, int, float"),
        (lambda: Table("t", "ab", ()), "a list"),
        (lambda: Series("s", (1, 2), (1,)), "2 x, 1 y and 0 labels"),
        (lambda: Series("s", (1, 2), (1, 2), ("a",)), "1 labels"),
        (lambda: Plot("p", "pie", Axis("x"), Axis("y"), (Series("s", (1,), (1,)),)), "one of 'lines', 'scatter'"),
        (lambda: Plot("p", "lines", Axis("x"), Axis("y"), ()), "different names"),
        (lambda: Plot("p", "lines", Axis("x"), Axis("y"), (Series("s", (1,), (1,)),) * 2), "different names"),
        (lambda: Plot("p", "lines", Axis("x"), Axis("y"), (Series("s", ("a",), (1,)),)), "an x of lines is a number"),
        (lambda: Plot("p", "bars", Axis("x"), Axis("y"), (Series("s", (1,), (1,)),)), "the name of a group"),
        (lambda: Plot("p", "bars", Axis("x"), Axis("y"), (Series("s", ("a", "a"), (1, 2)),)), "one bar in a group"),
        (lambda: Verdict(11, "holds", "", "", ""), "1 to 10; received 11"),
        (lambda: Verdict(1, "true", "", "", ""), "'holds', 'does not hold'"),
        (lambda: result(name="../up"), "a result's name"),
        (lambda: result(name="a" * 101), "a result's name"),
        (lambda: result(records={"a": object()}), "is JSON"),
        (lambda: result(settings={1.5: 1}), "texts as keys"),
        (lambda: result(seeds=("0",)), "an integer"),
        (lambda: result(versions={"torch": 2}), "a text"),
    ],
)
def test_what_makes_no_sense_is_refused_when_it_is_made(make, said):
    with pytest.raises(rs.SteerError, match=said):
        make()


def test_records_nested_without_end_are_refused():
    deep = []
    for _ in range(200):
        deep = [deep]
    with pytest.raises(rs.SteerError, match="nested"):
        result(records=deep)


def test_numbers_of_numpy_and_numbers_that_json_does_not_have(tmp_path):
    column = (Column("a", "a"),)
    rows = tuple({"a": cell} for cell in (np.int64(3), np.float32(1.5), np.float64("nan"), math.inf, 10**20))
    given = result(
        tables=(Table("t", column, rows),),
        records=[math.nan, np.float64(2), (1,), Path("a")],
        settings={8: np.int32(1)},
    )
    assert [row["a"] for row in given.tables[0].rows] == [3, 1.5, None, None, 10**20]
    assert type(given.tables[0].rows[0]["a"]) is int
    assert given.records == [None, 2.0, [1], "a"]
    assert given.settings == {"8": 1}
    given.save(tmp_path / "numbers.json")
    assert Result.load(tmp_path / "numbers.json") == given
    diverged = result(seconds=math.nan, tables=(Table("t", column, ({"a": Measured.of([1.0, math.nan])},)),))
    diverged.save(tmp_path / "diverged.json")
    loaded = Result.load(tmp_path / "diverged.json")
    assert math.isnan(loaded.seconds)
    assert loaded.tables[0].rows[0]["a"].count == 2
    assert math.isnan(loaded.tables[0].rows[0]["a"].mean)


def test_measured_over_seeds():
    assert Measured.of([1.0, 2.0, 4.0]).mean == pytest.approx(7 / 3)
    assert Measured.of([1.0, 2.0, 4.0]).spread == pytest.approx(np.std([1.0, 2.0, 4.0], ddof=1))
    assert Measured.of([5]) == Measured(5.0, 0.0, 1)
    assert math.isnan(Measured.of([5, math.inf]).mean)
    assert Measured.of(np.array([1.0, 3.0])).mean == 2.0
    for wrong in ((1.0, 0.5, 1), (1.0, -0.1, 2), (1.0, 0.0, 0)):
        with pytest.raises(rs.SteerError, match="count of 1 or more"):
            Measured(*wrong)
    with pytest.raises(rs.SteerError, match="at least one seed"):
        Measured.of([])


def test_a_measured_number_reads_as_far_as_its_spread_goes():
    assert str(Measured(82.1432, 0.3123, 3)) == "82.14 ± 0.31"
    assert str(Measured(1523.2, 41.7, 3)) == "1523 ± 42"
    assert str(Measured(3.05712, 0.00421, 3)) == "3.0571 ± 0.0042"
    assert str(Measured(5, 0, 1)) == "5"
    assert str(Measured.of([math.nan])) == "–"


def test_where_and_with_what():
    found = machine("cpu")
    assert set(found) == {"system", "cpu", "cores", "threads", "gpu"}
    assert found["threads"] == torch.get_num_threads()
    assert found["gpu"] is None
    assert versions(["numpy", "no-such-package"]).keys() == {"python", "numpy", "torch"}
    assert versions()["torch"] == torch.__version__


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("/home/me/runs/a", "a"),
        ("/home/me/my runs/a", "a"),
        ("--out=/home/me/a", "--out=a"),
        ("~/runs/a", "a"),
        ("python /opt/x/run.py --data '/data/sets/a b'", "python run.py --data 'sets/a b'".replace("sets/", "")),
        ("read from /home/me/data.json, twice", "read from data.json, twice"),
        (r"C:\Users\me\a.txt", "a.txt"),
        (r"in C:\Users\me\a.txt", "in a.txt"),
        ("tokens/s and 1/2, and/or", "tokens/s and 1/2, and/or"),
        ("https://example.org/a/b", "https://example.org/a/b"),
        ("see https://example.org/a/b", "see https://example.org/a/b"),
        ("state-spaces/mamba-130m-hf", "state-spaces/mamba-130m-hf"),
        ("runs/a.json", "runs/a.json"),
        ("±5 / seed", "±5 / seed"),
    ],
)
def test_no_path_of_a_disk_stays(text, left):
    assert portable(text) == left
    assert portable({"a": [text, 1, None]}) == {"a": [left, 1, None]}


def test_paths_in_keys_and_below_the_working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert portable(tmp_path / "runs" / "a") == "runs/a"
    assert portable(str(tmp_path)) == tmp_path.name
    assert portable({"/data/one/x": 1, "/data/two/x": 2}) == {"x": 1, "x (2)": 2}
    result(records={"log": f"{tmp_path}/a/b.txt"}, about=f"from /usr/share/{'x' * 3}").save("r.json")
    assert str(tmp_path.parent) not in Path("r.json").read_text()
    assert "/usr" not in Path("r.json").read_text()


def test_the_command_is_one_that_others_can_type(monkeypatch, tmp_path, capsys):
    assert command_line(["examples/a.py", "--out", "/home/me/x", "two words"]) == (
        "python examples/a.py --out x 'two words'"
    )
    (tmp_path / "mod").mkdir()
    code = "from residual_steer.report import command_line; print(command_line())"
    for name in ("__init__", "__main__", "tool"):
        (tmp_path / "mod" / f"{name}.py").write_text("" if name == "__init__" else code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["", "--x", str(tmp_path / "a" / "b")])
    runpy.run_module("mod", run_name="__main__", alter_sys=True)
    monkeypatch.setattr(sys, "argv", ["", "/etc/q"])
    runpy.run_path(str(tmp_path / "mod" / "tool.py"), run_name="__main__")
    assert capsys.readouterr().out.splitlines() == ["python -m mod --x a/b", "python mod/tool.py q"]
