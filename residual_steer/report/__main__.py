"""`python -m residual_steer.report FOLDER`: a report of the results in a folder, and CLAIMS.md."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from residual_steer.errors import SteerError

from .folder import read_folder, write_report


def main(arguments: list[str] | None = None) -> int:
    """Make the report; return the exit status."""
    options = parse(arguments)
    out = options.out or options.folder
    try:
        results, others = read_folder(options.folder)
        for line in others:
            print(line)
        for path in write_report(results, out, options.claims or out / "CLAIMS.md"):
            print(f"wrote {path}")
    except SteerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m residual_steer.report",
        description="Turn a folder of results into report.md, report.html, pictures and CLAIMS.md.",
    )
    parser.add_argument("folder", type=Path, help="with the JSON files that `Result.save` wrote, at any depth")
    parser.add_argument("--out", type=Path, help="folder for the report; the same folder if left out")
    parser.add_argument("--claims", type=Path, help="file for the list of claims; CLAIMS.md beside the report")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
