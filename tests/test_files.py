"""Files are whole at every moment: killed writers, several at once, and what they leave behind."""

import os
import threading
from pathlib import Path

import pytest

import residual_steer as rs
from apart import apart
from programs import kill_saves
from residual_steer import _files as files
from residual_steer._files import write_whole

needs_locks = pytest.mark.skipif(files.fcntl is None, reason="this system has no locks that end with a process")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_save_that_is_killed_leaves_one_field_or_the_other(tmp_path):
    kills = 100
    seen = apart(kill_saves.killed, tmp_path / "field", kills)
    assert seen["A"] + seen["B"] == kills
    assert min(seen["A"], seen["B"]) > kills // 10  # not always before the first save, nor always after one
    assert min(seen["left json"], seen["left safetensors"], seen["between the renames"]) > 0  # and in its middle
    assert seen["most left at once"] <= 2  # the next save takes away what a killed one left


@needs_locks
def test_writers_at_the_same_time_leave_each_other_alone(tmp_path):
    """No writer sweeps away what another one is writing, and each file is one writer's, from end to end."""
    failed, places = [], [tmp_path / "one", tmp_path / "two"]

    def write(letter):
        try:
            for _ in range(60):
                write_whole(dict.fromkeys(places, letter * 50000))
                for place in places:
                    assert len(set(place.read_bytes())) == 1
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=write, args=(letter,)) for letter in (b"a", b"b", b"c", b"d")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert sorted(tmp_path.iterdir()) == places


@needs_locks
def test_a_file_that_is_swept_before_it_is_locked_is_made_anew(tmp_path, monkeypatch):
    lock, made = files.lock, []

    def late(file, *, wait):
        if wait and not made:
            made.append(file.name)
            os.unlink(file.name)  # as another writer's sweep does, which came between
        return lock(file, wait=wait)

    monkeypatch.setattr(files, "lock", late)
    write_whole({tmp_path / "file": b"new"})
    assert made
    assert (tmp_path / "file").read_bytes() == b"new"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@needs_locks
def test_only_what_dead_writers_left_is_removed(tmp_path):
    kept = {".file.swp", ".file.safetensors.0.old", "file.partial", ".other.1.partial"}
    for name in (*kept, ".file.0123.partial"):
        (tmp_path / name).write_bytes(b"")
    with files._open_aside(tmp_path / "file") as alive:
        write_whole({tmp_path / "file": b"new"})
        assert {path.name for path in tmp_path.iterdir()} == kept | {"file", Path(alive.name).name}
    write_whole({tmp_path / "file": b"newer"})
    assert {path.name for path in tmp_path.iterdir()} == kept | {"file"}


def test_where_nothing_can_be_locked_nothing_is_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "fcntl", None)
    (tmp_path / ".file.0123.partial").write_bytes(b"")
    write_whole({tmp_path / "file": b"new"})
    assert {path.name for path in tmp_path.iterdir()} == {"file", ".file.0123.partial"}


def test_a_process_keeps_its_umask(tmp_path):
    mask = os.umask(0o027)
    try:
        write_whole({tmp_path / "file": b""})
        assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(mask)


def test_a_folder_that_is_gone_is_an_error(tmp_path):
    with pytest.raises(rs.SteerError, match=r"could not write .*What was there before is untouched"):
        write_whole({tmp_path / "none" / "file": b""})
