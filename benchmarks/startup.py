"""How long it takes to begin: importing the library, steering GPT-2-small, loading a field.

    python benchmarks/startup.py

Every number is taken once in each of several fresh processes, one after the other. The import is timed after `import
torch`; steering and loading after the model was built, and are the first of their process.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import residual_steer as rs
from options import parser_of, read
from output import exit_status, markdown, save_json
from residual_steer.training import progress
from rounds import spread

AIMS = {"import": 0.2, "steer": 0.05, "load": 0.1}  # seconds
WHAT = {
    "import": "import residual_steer, after import torch",
    "steer": "steer(GPT-2-small)",
    "load": "load(GPT-2-small, folder)",
}
CHILD = """
import time
import torch
started = time.perf_counter()
import residual_steer as rs
imported = time.perf_counter() - started
import json, sys, tempfile, warnings
sys.path.insert(0, sys.argv[1])
from shapes import SHAPES
torch.set_num_threads(int(sys.argv[3]))
base = SHAPES["gpt2"].build(tiny=sys.argv[2] == "tiny")
rank = min(32, *rs.find_backbone(base).widths) if sys.argv[2] == "tiny" else 32
started = time.perf_counter()
rs.steer(base, rank=rank)
steered = time.perf_counter() - started
with tempfile.TemporaryDirectory() as folder:
    rs.save(base, folder)
    rs.unsteer(base)
    started = time.perf_counter()
    rs.load(base, folder)
    loaded = time.perf_counter() - started
print(json.dumps({"import": imported, "steer": steered, "load": loaded}))
"""


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; return the exit status."""
    return exit_status(lambda: report(parse(arguments)))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    return read(parser_of(__doc__, rounds=5), arguments)


def report(options: argparse.Namespace) -> None:
    """Measure, print and save.

    Raises:
        SteerError: a process failed, or a folder cannot be written.
    """
    found = [once(options) for _ in progress(range(options.rounds), desc="processes")]
    seconds = {name: [one[name] for one in found] for name in AIMS}
    record = {
        "options": {key: value for key, value in vars(options).items() if key != "output"},
        "seconds": {name: {**vars(spread(values)), "processes": values} for name, values in seconds.items()},
    }
    save_json(record, options.output / "startup-cpu.json")
    print(table(record))


def once(options: argparse.Namespace) -> dict[str, float]:
    """Measure in a fresh process.

    Raises:
        SteerError: it failed.
    """
    size, threads = "tiny" if options.quick else "small", str(options.threads or 1)
    command = [sys.executable, "-c", CHILD, str(Path(__file__).parent), size, threads]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise rs.SteerError(f"the process that is timed failed: {ended.stderr.strip().splitlines()[-1]}")
    return json.loads(ended.stdout.splitlines()[-1])


def table(record: dict[str, Any]) -> str:
    """Return a Markdown table."""
    rows = []
    for name, found in record["seconds"].items():
        low, middle, high = (1000 * found[key] for key in ("low", "median", "high"))
        rows.append([WHAT[name], f"{middle:.0f} ({low:.0f}–{high:.0f})", f"{1000 * AIMS[name]:.0f}"])
    return markdown(["what", "ms", "aim"], rows)


if __name__ == "__main__":
    sys.exit(main())
