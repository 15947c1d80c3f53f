"""The tests marked `gpu`, by pytest where it is installed; what each of them gave is written as it ends."""

from __future__ import annotations

import collections
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import residual_steer as rs

from .part import Job, run_part

ROOT = Path(__file__).parents[2]
LOG = "GPU_TEST_LOG"


def pytest_runtest_logreport(report: Any) -> None:
    """Write a line for a test; this module is a plugin of pytest too (`-p gpu.marked`)."""
    decisive = report.when == "call" or report.outcome != "passed"
    if decisive and LOG in os.environ and "PYTEST_XDIST_WORKER" not in os.environ:
        crash = getattr(report.longrepr, "reprcrash", None)
        text = "" if report.outcome == "passed" else str(crash.message if crash else report.longrepr)[:600]
        with open(os.environ[LOG], "a") as log:
            log.write(json.dumps([report.nodeid, report.outcome, text]) + "\n")


def work(job: Job) -> None:
    """Run pytest, and sum up what it wrote, also if it was ended in the middle."""
    if importlib.util.find_spec("pytest") is None:
        job.save(passed=0, wrong=["pytest is not installed here"])
        return
    log = job.out.with_suffix(".jsonl")
    log.unlink(missing_ok=True)
    sources = [p for p in sorted((ROOT / "tests").glob("test_*.py")) if re.search(r"DEVICES|mark\.gpu", p.read_text())]
    only = ["-k", " or ".join(job.subjects)] if job.subjects else []
    if job.quick:
        sources, only = [ROOT / "tests" / "test_checks.py"], []  # quick; on a CPU none is marked
    # a warning of a newer or an older library is no failure here
    command = [sys.executable, "-m", "pytest", "-q", "-p", "gpu.marked", "-p", "no:cacheprovider", "-W", "default"]
    # the package as it is imported here, before that of the root, which is bare where nothing is installed
    command += ["-c", str(ROOT / "pyproject.toml"), "-o", f"pythonpath={Path(rs.__file__).parents[1]} {ROOT}"]
    command += [*(["-m", "gpu"] * job.cuda), *only, *map(str, sources)]
    if importlib.util.find_spec("xdist") is not None and job.cuda:
        workers = min(4 if job.subjects else 12, (os.cpu_count() or 2) - 4)
        command += ["-p", "xdist.plugin", "-n", str(max(1, workers))]
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}  # of a run around
    own = {LOG: str(log), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # nor what else the machine brings
    with subprocess.Popen(command, env={**inherited, **own}) as process:
        while True:
            try:
                status = process.wait(timeout=5)
                break
            except subprocess.TimeoutExpired:
                job.save(**summed(log))
    job.save(**summed(log), exit=status)
    if status not in (0, 1):
        raise RuntimeError(f"pytest ended with status {status}")


def summed(log: Path) -> dict[str, Any]:
    """Return how many tests passed and so on, and those that failed."""
    lines = [json.loads(line) for line in log.read_text().splitlines() if line.endswith("]")] if log.exists() else []
    counts = collections.Counter(outcome for _, outcome, _ in lines)
    return {
        "counts": dict(counts),
        "wrong": [f"{name}: {text}" for name, outcome, text in lines if outcome == "failed"],
    }


if __name__ == "__main__":
    sys.exit(run_part(work))
