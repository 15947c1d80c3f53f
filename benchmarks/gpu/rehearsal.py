"""The parts of a rehearsal, one after the other in one process; each leaves the JSON file that it leaves by itself."""

from __future__ import annotations

import importlib
import sys

from .part import Job, run_part


def work(job: Job) -> None:
    """Run the parts that are named, all of them.

    Raises:
        RuntimeError: a part failed; why, stands in its own file.
    """
    given = ["--device", job.device, "--quick"]
    failed = []
    for name in job.subjects:
        part = importlib.import_module(f".{name}", __package__)
        turn = ["--turn", str(job.turn)] if name == "costs" and job.turn else []
        if run_part(part.work, ["--out", str(job.out.with_name(f"{name}.json")), *given, *turn]):
            failed.append(name)
    if failed:
        raise RuntimeError(f"these parts failed: {', '.join(failed)}")


if __name__ == "__main__":
    sys.exit(run_part(work))
