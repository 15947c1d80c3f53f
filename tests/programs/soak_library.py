"""Ask a library for random fields, while files are broken, mended and replaced, and count what is wrong.

Usage: soak_library.py [--minutes 120] [--fields 40] [--slots 8] [--folder FOLDER] [--seed 0]

Every batch is held against what each field gave when it was made. Memory is the process's own, read after a tenth of
the time and at the end: no more than 5 MB may lie between.
"""

import argparse
import collections
import gc
import os
import random
import shutil
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel

import residual_steer as rs
from residual_steer._field_file import DESCRIPTION, TENSORS

ROWS, LENGTH, GROWTH = 8, 12, 5e6
SIZES = {"n_layer": 3, "n_embd": 48, "n_head": 3, "vocab_size": 64, "n_positions": 32}


def build():
    """Return the frozen model; the same weights each time."""
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(bos_token_id=0, eos_token_id=0, **SIZES)).eval()


def make(folder, names):
    """Save a field under every name; return what the model computes under each and under none, by name."""
    ids = torch.randint(64, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))
    model, expected = build(), {None: None}
    with torch.no_grad():
        expected[None] = model(ids).logits
        for seed, name in enumerate(names):
            rs.steer(model, rank=2 + seed % 3, name=name, site=("block", "mixer")[seed % 2], bias=seed % 4 > 0)
            torch.manual_seed(seed)
            for parameter in rs.parameters(model):
                parameter.normal_(std=0.3)
            rs.save(model, folder / name)
            expected[name] = model(ids).logits
            rs.unsteer(model, name)
    return ids, expected


def spoil(draw, kept, folder, state):
    """Break one field's files, or mend it, or put another field in its place; note what it now is."""
    name = draw.choice(sorted(state))
    place = folder / name
    what = draw.choice(["flip", "cut", "remove", "empty", "mend", "mend", "replace"])
    shutil.rmtree(place, ignore_errors=True)
    source = draw.choice(sorted(state)) if what == "replace" else name
    if what != "remove":
        shutil.copytree(kept / source, place)
    state[name] = source
    if what == "flip":
        data = bytearray((place / TENSORS).read_bytes())
        data[draw.randrange(len(data) // 2, len(data))] ^= 1 << draw.randrange(8)
        (place / TENSORS).write_bytes(data)
    elif what == "cut":
        (place / TENSORS).write_bytes((place / TENSORS).read_bytes()[: draw.randrange(200)])
    elif what == "empty":
        (place / DESCRIPTION).write_text("")
    if what not in ("mend", "replace"):
        state[name] = None  # an error of its rows


def resident():
    """Return the bytes that this process has, without what waits to be collected."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main(arguments=None):
    """Run for as long as asked; return 0 if nothing was wrong."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=120)
    parser.add_argument("--fields", type=int, default=40)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    root = Path(tempfile.mkdtemp(dir=options.folder))
    kept, folder, draw = root / "kept", root / "library", random.Random(options.seed)
    names = [f"f{index}" for index in range(options.fields)]
    ids, expected = make(kept, names)
    shutil.copytree(kept, folder)
    model, state, counts = build(), {name: name for name in names}, collections.Counter()
    library = rs.library(model, folder, slots=options.slots)
    begin, memory = time.monotonic(), 0
    warnings.simplefilter("ignore")
    while (gone := time.monotonic() - begin) < 60 * options.minutes:
        if not memory and gone > 6 * options.minutes:
            memory = resident()
        if draw.random() < 0.3:
            spoil(draw, kept, folder, state)
            counts["files changed"] += 1
        if draw.random() < 0.02 and library.loaded:
            rs.unsteer(model, draw.choice(library.loaded))
            counts["fields taken away"] += 1
        chosen = draw.sample(names, draw.randint(1, options.slots))
        rows = [draw.choice([*chosen, None]) for _ in range(ROWS)]
        with library.use(rows) as errors, torch.no_grad():
            output = model(ids).logits
        for row, name in enumerate(rows):
            now = state.get(name)
            missed = name is not None and now is None
            right = (output[row] - expected[now][row]).abs().max() < 1e-3 and missed == (row in errors)
            counts["wrong rows" if not right else "errors of rows" if missed else "right rows"] += 1
        counts["batches"] += 1
        if len(library.loaded) > options.slots:
            counts["times too many"] += 1
    with torch.no_grad():
        if not torch.equal(model(ids).logits, expected[None]):
            counts["wrong rows"] += 1
    grown = resident() - (memory or resident())
    print(", ".join(f"{number:,} {what}" for what, number in sorted(counts.items())))
    wrong, many = counts["wrong rows"], counts["times too many"]
    print(f"{wrong} wrong rows, {many} times too many fields, {grown / 1e6:.2f} MB more memory")
    shutil.rmtree(root)
    return int(bool(wrong or many or grown > GROWTH))


if __name__ == "__main__":
    sys.exit(main())
