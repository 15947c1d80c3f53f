"""Kill a process that adds to a ledger, again and again, and say what is left; then let several add at once."""

import json
import os
import random
import signal
import struct
import time

from experiments.ledger import Ledger

BULK = "x" * 300_000  # long enough that a line is not written in no time
SHARED, OWN = 12, 6


def value_of(number):
    return {"number": number, "bulk": BULK}


def forked(work):
    """Run something in a child, which ends with it; return its number and where to read what it tells."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.close(reader)
            work(writer)
            status = 0
        finally:
            os._exit(status)
    os.close(writer)
    return child, reader


def everything(reader):
    content = b""
    while part := os.read(reader, 1 << 16):
        content += part
    os.close(reader)
    return content


def add_for_ever(path, first):
    def work(writer):
        ledger = Ledger(path)
        for number in range(first, 1 << 30):
            ledger.get_or({"run": number}, lambda number=number: value_of(number))
            os.write(writer, struct.pack("i", number))

    return work


def killed(path, kills):
    """Return what was finished, what is there, and how many lines were cut off."""
    chance, finished, torn = random.Random(0), 0, 0
    for _ in range(kills):
        child, reader = forked(add_for_ever(path, finished))
        time.sleep(chance.uniform(0.002, 0.03))
        os.kill(child, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1]), "the child ended by itself"
        told = [number for (number,) in struct.iter_unpack("i", everything(reader))]
        there = Ledger(path)
        more = len(there) - finished
        assert told == list(range(finished, finished + len(told)))
        assert len(told) <= more <= len(told) + 1, (len(told), more)  # one may be on disk and not told yet
        finished += more
        for number in range(finished - more, finished):
            assert there.get_or({"run": number}, list) == value_of(number)
        torn += path.exists() and not path.read_bytes().endswith(b"\n")
    return {"finished": finished, "torn": torn}


def together(path):
    """Let three processes add to one ledger, some results under the same keys."""

    def work(writer):
        ledger, mine = Ledger(path), os.getpid()
        keys = [{"shared": n} for n in range(SHARED)] + [{"own": n, "of": mine} for n in range(OWN)]
        random.Random(mine).shuffle(keys)
        found = [ledger.get_or(key, lambda: {"by": mine}) for key in keys]
        os.write(writer, json.dumps([[key, value] for key, value in zip(keys, found, strict=True)]).encode())

    children = [forked(work) for _ in range(3)]
    found = [json.loads(everything(reader)) for _, reader in children]
    assert all(os.waitpid(child, 0)[1] == 0 for child, _ in children)
    lines = path.read_bytes().splitlines()
    there = Ledger(path)
    for key, value in (pair for pairs in found for pair in pairs):
        assert there.get_or(key, list) == value, (key, value)
    return {"lines": len(lines), "results": len(there), "expected": SHARED + 3 * OWN}
