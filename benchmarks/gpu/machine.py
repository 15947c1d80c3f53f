"""Find out what a machine has: its card, its libraries, a compiler."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys

import torch

from .part import Job, run_part

NEEDED, USEFUL = ("transformers", "timm", "peft", "accelerate"), ("pytest", "xdist", "hypothesis", "mambapy", "triton")


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
        raise RuntimeError(f"{', '.join(lacking)} missing here; lay the wheels into a folder, and name it by --wheels")


if __name__ == "__main__":
    sys.exit(run_part(work))
