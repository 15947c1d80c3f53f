"""The ledger: what was finished is there, whatever happened to the process, and nobody's file is harmed."""

import json
import math
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import residual_steer as rs
from experiments.ledger import Ledger
from programs.kill_ledgers import killed, together
from residual_steer._files import fcntl, lock

KEY, VALUE = {"seed": 0, "rate": 1e-3}, {"loss": 0.1 + 0.2, "accuracy": None}

plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=8),
    lambda parts: (
        st.lists(parts, max_size=3) | st.dictionaries(st.text(st.characters(), max_size=4), parts, max_size=3)
    ),
    max_leaves=6,
)
by_name = st.dictionaries(st.text(st.characters(), max_size=4), plain, max_size=3)


def never():
    raise AssertionError("it was made again")


def filled(path, count=3):
    ledger = Ledger(path)
    for number in range(count):
        ledger.get_or({"run": number}, lambda number=number: {"value": number})
    return path.read_bytes()


def test_a_result_is_made_once_and_read_back_by_the_next_process(tmp_path):
    path = tmp_path / "new" / "ledger.jsonl"
    made = []

    def make():
        assert not path.exists()
        made.append(1)
        return VALUE

    ledger = Ledger(path)
    assert ledger.get_or(KEY, make) == VALUE == ledger.get_or(KEY, make)
    assert len(made) == len(ledger) == 1
    again = Ledger(str(path))
    assert KEY in again
    assert {"seed": 1} not in again
    assert again.get_or(KEY, never) == VALUE
    assert json.loads(path.read_text()) == {"key": KEY, "value": VALUE}


def test_a_result_is_on_disk_before_it_is_returned(tmp_path, monkeypatch):
    path = tmp_path / "ledger.jsonl"
    synced = []

    def sync(descriptor):
        synced.append((os.fstat(descriptor).st_ino, path.read_bytes().count(b"\n")))

    monkeypatch.setattr(os, "fsync", sync)
    ledger = Ledger(path)
    ledger.get_or({"run": 0}, lambda: VALUE)
    assert (path.stat().st_ino, 1) in synced
    assert (tmp_path.stat().st_ino, 1) in synced  # the folder, in which the file is new
    del synced[:]
    ledger.get_or({"run": 1}, lambda: VALUE)
    assert synced == [(path.stat().st_ino, 2)]


@settings(deadline=None, max_examples=40)
@given(by_name, by_name)
def test_what_was_just_made_is_what_is_read_back(tmp_path_factory, key, value):
    path = tmp_path_factory.mktemp("ledger") / "ledger.jsonl"
    made = Ledger(path).get_or(key, lambda: value)
    read = Ledger(path).get_or(key, never)
    assert repr(made) == repr(read)  # by their texts, since NaN is not equal to itself
    assert path.read_bytes().isascii()
    assert path.read_bytes().count(b"\n") == 1


def test_keys_are_the_same_in_any_order_and_differ_in_any_value():
    ledger = Ledger()
    ledger.get_or({"a": 1, "b": {"c": [1, 2], "d": math.nan}, "ü": "é"}, lambda: {})
    assert {"ü": "é", "b": {"d": math.nan, "c": (1, 2)}, "a": 1} in ledger
    for other in ({"a": 1.0}, {"a": True}, {"a": "1"}, {"b": {"c": [2, 1], "d": math.nan}}, {"ü": "e"}, {"more": None}):
        assert {"a": 1, "b": {"c": [1, 2], "d": math.nan}, "ü": "é", **other} not in ledger


def test_what_is_returned_is_a_copy():
    ledger = Ledger()
    given_value = {"scores": [1, (2, 3)]}
    returned = ledger.get_or(KEY, lambda: given_value)
    assert returned == {"scores": [1, [2, 3]]}
    returned["scores"].append(4)
    given_value["scores"].append(5)
    assert ledger.get_or(KEY, never) == {"scores": [1, [2, 3]]}


@pytest.mark.parametrize("wrong", [{"a": object()}, {"a": {1, 2}}, {(1, 2): 3}, [1], None, 3])
def test_what_json_cannot_hold_is_refused_and_nothing_is_written(tmp_path, wrong):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    with pytest.raises(rs.SteerError, match="a result and its key are plain"):
        ledger.get_or(wrong, never)
    with pytest.raises(rs.SteerError, match="a result and its key are plain"):
        ledger.get_or(KEY, lambda: wrong)
    assert len(ledger) == 0
    assert list(tmp_path.iterdir()) == []


def test_what_make_raises_comes_through_and_the_rest_goes_on(tmp_path):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    with pytest.raises(ZeroDivisionError):
        ledger.get_or(KEY, lambda: 1 / 0)
    assert KEY not in ledger
    assert ledger.get_or(KEY, lambda: VALUE) == VALUE


def test_a_line_that_was_cut_off_anywhere_is_left_out_and_written_anew(tmp_path):
    path = tmp_path / "ledger.jsonl"
    whole = filled(path)
    ends = [index + 1 for index, byte in enumerate(whole) if byte == ord("\n")]
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        ledger = Ledger(path)
        finished = sum(end <= cut for end in ends)
        assert [{"run": number} in ledger for number in range(3)] == [number < finished for number in range(3)]
        assert path.read_bytes() == whole[:cut]  # reading changes nothing
        assert filled(path) == whole


FOREIGN = [
    b"hello",
    b"hello\n",
    b"{}\n",
    b"[]\n",
    b"3\n",
    b"null\n",
    b"\n",
    b"\x00\xff\n",
    b"\xff",
    b'{"a": 1}',
    b'{"key": 1, "value": {}}\n',
    b'{"key": {}, "value": []}\n',
    b'{"key": {}, "value": {}, "more": 1}\n',
    b'{"key": {}}\n',
    b'{"value": {}, "key": {}}\n',
    b"[" * 100_000 + b"\n",
]


@pytest.mark.parametrize("before", [0, 2])
@pytest.mark.parametrize("content", FOREIGN, ids=lambda content: repr(content[:40]))
def test_a_foreign_or_damaged_file_is_refused_and_left_as_it_is(tmp_path, content, before):
    path = tmp_path / "ledger.jsonl"
    path.write_bytes((filled(path, before) if before else b"") + content)
    held = path.read_bytes()
    with pytest.raises(rs.SteerError, match=rf"line {before + 1} of .*ledger\.jsonl is no result of a study"):
        Ledger(path)
    assert path.read_bytes() == held


def test_damage_in_the_middle_is_found_also_while_the_ledger_is_in_use(tmp_path):
    path = tmp_path / "ledger.jsonl"
    whole = filled(path)
    ledger = Ledger(path)
    damaged = whole.replace(b'{"run": 1}', b'{"run: 1}')
    path.write_bytes(damaged)
    with pytest.raises(rs.SteerError, match="line 2 of"):
        Ledger(path)
    with pytest.raises(rs.SteerError, match="line 2 of"):
        ledger.get_or({"run": 3}, lambda: VALUE)
    assert path.read_bytes() == damaged
    assert {"run": 3} not in ledger


def test_two_ledgers_on_one_file_keep_each_others_results(tmp_path):
    path = tmp_path / "ledger.jsonl"
    one, two = Ledger(path), Ledger(path)
    assert one.get_or({"run": 0}, lambda: {"by": "one"}) == {"by": "one"}
    assert two.get_or({"run": 1}, lambda: {"by": "two"}) == {"by": "two"}
    assert two.get_or({"run": 0}, never) == {"by": "one"}  # learnt when it wrote
    assert one.get_or({"run": 1}, lambda: {"by": "one"}) == {"by": "two"}  # the first stays
    assert path.read_bytes().count(b"\n") == 2
    assert len(Ledger(path)) == 2


@pytest.mark.skipif(fcntl is None, reason="there are no such locks here")
def test_nobody_else_writes_while_a_line_is_written(tmp_path, monkeypatch):
    path = tmp_path / "ledger.jsonl"
    free = []

    def sync(descriptor):
        with path.open("r+b") as other:
            free.append(lock(other, wait=False))

    monkeypatch.setattr(os, "fsync", sync)
    ledger = Ledger(path)
    ledger.get_or({"run": 0}, lambda: VALUE)
    del free[:]
    ledger.get_or({"run": 1}, lambda: VALUE)
    assert free == [False]
    sync(0)
    assert free == [False, True]


def test_of_two_lines_with_one_key_the_first_counts(tmp_path):
    path = tmp_path / "ledger.jsonl"
    path.write_text('{"key": {"run": 0}, "value": {"by": 1}}\n{"key": {"run": 0}, "value": {"by": 2}}\n')
    assert Ledger(path).get_or({"run": 0}, never) == {"by": 1}


def test_a_file_that_was_removed_is_made_again_whole(tmp_path):
    path = tmp_path / "ledger.jsonl"
    whole = filled(path)
    ledger = Ledger(path)
    path.unlink()
    ledger.get_or({"run": 3}, lambda: {"value": 3})
    assert path.read_bytes().startswith(whole)
    assert len(Ledger(path)) == 4


def test_a_full_disk_is_a_clear_error_and_leaves_whole_lines(tmp_path):
    resource = pytest.importorskip("resource", reason="there are no such limits here")
    path = tmp_path / "ledger.jsonl"
    whole = filled(path)
    ledger = Ledger(path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
        with pytest.raises(rs.SteerError, match=r"could not write .*ledger\.jsonl: File too large"):
            ledger.get_or(KEY, lambda: {"bulk": "x" * (1 << 20)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == whole
    assert KEY not in ledger
    assert ledger.get_or(KEY, lambda: VALUE) == VALUE
    assert len(Ledger(path)) == 4


def test_a_path_that_cannot_be_a_ledger_is_refused(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(rs.SteerError, match="could not make the folder"):
        Ledger(tmp_path / "file" / "ledger.jsonl")
    with pytest.raises(rs.SteerError, match="could not read"):
        Ledger(tmp_path)
    with pytest.raises(rs.SteerError, match="is a path; received 3"):
        Ledger(3)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_killed_at_any_moment_and_shared_by_several_processes(tmp_path):
    assert killed(tmp_path / "killed.jsonl", 25)["finished"] > 0
    seen = together(tmp_path / "together.jsonl")
    assert seen["lines"] == seen["results"] == seen["expected"]
