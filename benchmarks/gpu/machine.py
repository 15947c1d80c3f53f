"""Find out what a machine has: its card, its libraries, a compiler."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys

import torch

from .part import Job, run_part

NEEDED = ("transformers", "accelerate")
# who lacks one of these, loses what needs it
USEFUL = ("timm", "peft", "pytest", "xdist", "hypothesis", "mambapy", "tabulate", "triton")


def work(job: Job) -> None:
    """Look, and fail where nothing can be run."""
    missing = [name for name in (*NEEDED, *USEFUL) if importlib.util.find_spec(name) is None]
    job.save(missing=missing, nvcc=shutil.which("nvcc") is not None, cores=os.cpu_count())
    if job.cuda:
        if not torch.cuda.is_available():
            raise RuntimeError(f"torch {torch.__version__} sees no GPU; --device cpu --quick rehearses without one")
        about = torch.cuda.get_device_properties(job.device)
        card = {"name": about.name, "memory": about.total_memory, "multiprocessors": about.multi_processor_count}
        job.save(card={**card, "capability": f"{about.major}.{about.minor}", "cuda": torch.version.cuda})
    if lacking := [name for name in missing if name in NEEDED]:
        how = "pip install --no-index --no-deps --target FOLDER WHEELS, and PYTHONPATH=FOLDER before this command"
        raise RuntimeError(f"{', '.join(lacking)} missing here: {how}")


if __name__ == "__main__":
    sys.exit(run_part(work))
