"""Where the streams of a frozen prefix are kept: what comes back, limits, damage, and one run at a time."""

import pytest
import torch

import residual_steer as rs
from residual_steer.training.prefix_store import DiskStore, MemoryStore


@pytest.fixture
def disk(tmp_path):
    """Open stores of a folder, and close them."""
    opened = []

    def open_store(limit=10**6):
        opened.append(DiskStore(tmp_path, limit))
        return opened[-1]

    yield open_store
    for store in opened:
        store.close()


@pytest.mark.parametrize("kind", ["memory", "disk"])
def test_a_store_gives_back_what_it_was_given(kind, disk):
    store = MemoryStore(10**6) if kind == "memory" else disk()
    rows = {
        bytes([i]) * 16: [torch.randn(3, 2), torch.randn(i + 1).to(torch.bfloat16), torch.tensor(i)] for i in range(5)
    }
    for key, row in rows.items():
        store.add(key, row)
    for _ in range(2):
        for key, row in rows.items():
            (found,) = store.get([key])
            assert all(torch.equal(x, y) and x.dtype == y.dtype for x, y in zip(found, row, strict=True))
        store.flush()
    assert b"nothing" not in store
    assert len(store) == 5


def test_a_store_keeps_within_its_limit(disk):
    for store in (MemoryStore(100), disk(100)):
        for i in range(5):
            store.add(bytes([i]) * 16, [torch.zeros(10)])
        assert len(store) == 2
        assert store.bytes == 80


def fill(store):
    for i in range(3):
        store.add(bytes([i]) * 16, [torch.full((4,), float(i))])
    store.flush()
    return store


def test_rows_after_the_last_flush_are_forgotten(disk):
    store = fill(disk())
    store.add(b"x" * 16, [torch.zeros(4)])
    store._file.close()
    store._lock.close()
    store._dirty = False  # as if it had been killed
    again = disk()
    assert len(again) == 3
    again.add(b"y" * 16, [torch.ones(4)])
    assert torch.equal(again.get([b"y" * 16])[0][0], torch.ones(4))
    assert torch.equal(again.get([bytes([2]) * 16])[0][0], torch.full((4,), 2.0))


@pytest.mark.parametrize("damage", ["index", "streams", "truncated"])
def test_a_damaged_cache_is_computed_again(damage, disk, tmp_path):
    fill(disk()).close()
    name = "index.safetensors" if damage == "index" else "streams.bin"
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(b"{}" if damage == "index" else content[:5] if damage == "truncated" else b"")
    store = disk()
    assert len(store) == 0
    store.add(b"z" * 16, [torch.ones(2)])
    assert torch.equal(store.get([b"z" * 16])[0][0], torch.ones(2))


def test_one_run_at_a_time(disk):
    pytest.importorskip("fcntl")
    store = fill(disk())
    with pytest.raises(rs.SteerError, match="that no other run uses"):
        disk()
    store.close()
    assert len(disk()) == 3
