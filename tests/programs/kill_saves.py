"""Kill saves at random moments, and say after each what is left: the one field or the other, and which files."""

import json
import os
import random
import signal
import time
from collections import Counter

import torch

import residual_steer as rs
from programs.small_net import BATCH, fresh, steer
from residual_steer._field_file import DESCRIPTION, TENSORS, open_field

WHOLE = {DESCRIPTION, TENSORS}


def save_for_ever(model, folder, names):
    """Save one field after the other, in a child of its own that ends when it is killed."""
    child = os.fork()
    if child == 0:
        try:
            while True:
                for name in names:
                    rs.save(model, folder, name)
        finally:
            os._exit(1)
    return child


def killed(folder, kills):
    torch.set_num_threads(1)
    chance = random.Random(0)
    model = fresh()
    expected = {name: steer(model, seed, name=name)(BATCH) for seed, name in enumerate("AB")}
    began = time.perf_counter()
    rs.save(model, folder, "A")
    took = time.perf_counter() - began

    seen = Counter()
    for kill in range(kills):
        child = save_for_ever(model, folder, ("B", "A") if kill % 2 else ("A", "B"))
        time.sleep(chance.uniform(0, 3 * took) + 0.002)
        os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        assert os.WIFSIGNALED(status), "the child ended by itself: a save failed"
        files = {path.name for path in folder.iterdir()}
        assert files >= WHOLE, files
        loaded = rs.load(fresh(), folder)
        (field,) = rs.summary(loaded).fields
        assert torch.equal(loaded(BATCH), expected[field.name])
        seen[field.name] += 1
        for left in files - WHOLE:
            seen[f"left {left.split('.')[2]}"] += 1  # .steering.json.….partial
        seen["most left at once"] = max(seen["most left at once"], len(files - WHOLE))
        described = json.loads((folder / DESCRIPTION).read_text())
        seen["between the renames"] += described != open_field(folder).described
    rs.save(model, folder, "A")
    assert {path.name for path in folder.iterdir()} == WHOLE
    return seen
