"""Where the streams of a frozen prefix are kept: what comes back, limits, damage, and one run at a time."""

import os
import signal

import pytest
import torch

import residual_steer as rs
from apart import killed
from residual_steer._stream_store import StreamStore


@pytest.fixture
def store_in(tmp_path):
    """Open stores, in memory or in one folder, and close them."""
    opened = []

    def open_store(place="disk", limit=10**6):
        opened.append(StreamStore(tmp_path if place == "disk" else None, limit))
        return opened[-1]

    yield open_store
    for store in opened:
        store.close()


@pytest.mark.parametrize("place", ["memory", "disk"])
def test_a_store_gives_back_what_it_was_given(place, store_in):
    store = store_in(place)
    rows = {
        bytes([i]) * 16: [torch.randn(3, 2).T, torch.randn(i + 1).to(torch.bfloat16), torch.tensor(i)] for i in range(5)
    }
    for key, row in rows.items():
        store.add(key, row)
    for _ in range(2):
        for key, row in rows.items():
            assert all(torch.equal(x, y) and x.dtype == y.dtype for x, y in zip(store.get(key), row, strict=True))
        store.flush()
    assert b"nothing" not in store
    assert len(store) == 5


@pytest.mark.parametrize("place", ["memory", "disk"])
def test_a_store_keeps_within_its_limit(place, store_in):
    store = store_in(place, limit=100)
    for i in range(5):
        store.add(bytes([i]) * 16, [torch.zeros(10)])
    assert (len(store), store.bytes) == (2, 80)


def fill(store):
    for i in range(3):
        store.add(bytes([i]) * 16, [torch.full((4,), float(i))])
    store.flush()
    return store


def cut_off(folder):
    StreamStore(folder, 10**6).add(b"x" * 16, [torch.zeros(4)])
    os.kill(os.getpid(), signal.SIGKILL)


def test_rows_after_the_last_flush_are_forgotten(store_in, tmp_path):
    fill(store_in()).close()
    assert killed(cut_off, tmp_path) == -signal.SIGKILL
    again = store_in()
    assert (len(again), again.bytes) == (3, 48)
    again.add(b"x" * 16, [torch.ones(4)])
    assert torch.equal(again.get(b"x" * 16)[0], torch.ones(4))
    assert torch.equal(again.get(bytes([2]) * 16)[0], torch.full((4,), 2.0))


@pytest.mark.parametrize("damage", [b"{}" * 500, b"", None], ids=["other bytes", "empty", "truncated"])
def test_a_damaged_cache_is_computed_again(damage, store_in, tmp_path):
    fill(store_in()).close()
    path = tmp_path / "streams.sqlite"
    path.write_bytes(path.read_bytes()[:5000] if damage is None else damage)
    store = store_in()
    assert (len(store), store.bytes) == (0, 0)
    store.add(b"z" * 16, [torch.ones(2)])
    assert torch.equal(store.get(b"z" * 16)[0], torch.ones(2))


def test_one_run_at_a_time(store_in):
    store = fill(store_in())
    with pytest.raises(rs.SteerError, match=r"locked.*no other run uses"):
        store_in()
    store.close()
    assert len(store_in()) == 3


def test_a_full_disk_is_a_clear_error(tmp_path):
    store = StreamStore(tmp_path, 10**9)
    (pages,) = store._rows.execute("PRAGMA page_count").fetchone()
    store._rows.execute(f"PRAGMA max_page_count = {pages}")  # what SQLite reports as a full disk
    with pytest.raises(rs.SteerError, match=r"could not write.*full"):
        store.add(b"x", [torch.zeros(10_000)])
    store.close()
