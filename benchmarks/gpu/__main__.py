"""Run all parts: `python benchmarks/gpu`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that these modules are `gpu.…`

from gpu.runner import main

if __name__ == "__main__":
    sys.exit(main())
