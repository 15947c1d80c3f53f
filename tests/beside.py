"""Import scripts of a folder beside the package as if they had been run: their siblings by their own names."""

import contextlib
import importlib
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
BENCHMARKS, EXAMPLES = ROOT / "benchmarks", ROOT / "examples"


@contextlib.contextmanager
def scripts(folder):
    before = list(sys.path)
    sys.path.insert(0, str(folder))
    try:
        yield importlib.import_module
    finally:
        sys.path[:] = before
