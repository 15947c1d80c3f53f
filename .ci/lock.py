"""Resolve what `make demo` and `make test` install, as if nothing were there, and print it as constraints.

    python .ci/lock.py > constraints.txt

Nothing is installed: pip resolves in a fresh environment and only says what it would install. A release that needs a
newer Python than the oldest that pyproject.toml allows gets a marker, and is left to the resolver there.
"""

import json
import os
import platform
import re
import subprocess
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LEAST = re.compile(r">=\s*3\.(\d+)")
OLDEST = int(LEAST.search(re.search(r"requires-python = .*", (ROOT / "pyproject.toml").read_text())[0])[1])
WITHOUT_DEPENDENCIES = ("mamba-ssm", "causal-conv1d")  # whose metadata is built by the torch that is installed


def line(name: str, version: str, needs: str | None) -> str:
    """Return a constraint, with a marker if the release needs a Python newer than the oldest of ours.

    Args:
        name: of the package.
        version: the one that was resolved.
        needs: its Requires-Python.
    """
    least = max((int(minor) for minor in LEAST.findall(needs or "")), default=0)
    name = re.sub(r"[-_.]+", "-", name).lower()
    return f"{name}=={version}" + (f' ; python_version >= "3.{least}"' if least > OLDEST else "")


def main() -> None:
    """Print the constraints."""
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        pip = [str(Path(folder, "Scripts" if os.name == "nt" else "bin", "python")), "-m", "pip"]

        def run(*args: str) -> str:
            return subprocess.run([*pip, *args], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout

        report = json.loads(run("install", "--quiet", "--dry-run", "--report", "-", "-e", ".[dev,tools]"))
        found = [item["metadata"] for item in report["install"] if "dir_info" not in item["download_info"]]
        lines = [line(item["name"], item["version"], item.get("requires_python")) for item in found]
        for name in WITHOUT_DEPENDENCIES:
            newest = re.match(r"\S+ \((.+)\)", run("index", "versions", name))
            lines.append(line(name, newest[1], None))
    print("# Made by `make lock`: what `make demo`, `make test` and `make check` install, on top of pyproject.toml.")
    print(f"# Resolved with Python {platform.python_version()} on {platform.system()} {platform.machine()}.")
    print("# Where a release has no wheel for your Python or machine: make test LOCK=")
    print("\n".join(sorted(lines)))


if __name__ == "__main__":
    main()
