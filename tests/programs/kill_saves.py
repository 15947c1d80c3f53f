"""Kill saves at random moments, and say after each what is left: the one field or the other, and which files.

Usage: kill_saves.py FOLDER KILLS
"""

import copy
import json
import os
import random
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import torch
from torch import nn

import residual_steer as rs
from residual_steer._format import DESCRIPTION, TENSORS, open_field

BATCH = torch.linspace(-1, 1, 64).reshape(1, 2, 32)
WHOLE = {DESCRIPTION, TENSORS}


class Block(nn.Module):
    def forward(self, z):
        return z + 1


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.scale = nn.Parameter(torch.ones(32))

    def forward(self, z):
        for block in self.blocks:
            z = block(z)
        return self.scale * z


@rs.register_backbone("net", matches=["__main__.Net"])
def net(model):
    return rs.Backbone(blocks=model.blocks, width=32)


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


def main(folder, kills):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    chance = random.Random(0)
    model, expected = Net(), {}
    for name in ("A", "B"):
        rs.steer(model, name=name, rank=8)
        with torch.no_grad():
            for parameter in rs.parameters(model):
                parameter.normal_()
        expected[name] = model(BATCH)
    began = time.perf_counter()
    rs.save(model, folder, "A")
    took = time.perf_counter() - began

    seen = Counter()
    for kill in range(kills):
        child = save_for_ever(model, folder, ("B", "A") if kill % 2 else ("A", "B"))
        time.sleep(chance.uniform(0, 6 * took) + 0.002)
        os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        assert os.WIFSIGNALED(status), "the child ended by itself: a save failed"
        files = {path.name for path in folder.iterdir()}
        assert files >= WHOLE, files
        loaded = rs.load(copy.deepcopy(Net()), folder)
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
    print(json.dumps({**seen, "seconds a save": took}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
