"""The example scripts as a user runs them, on the device that they find, four at a time."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .part import Job, run_part

FOLDER = Path(__file__).parents[2] / "examples"
PLACES = ["--quick", "--cache", "cache", "--out", "out"]
SCRIPTS = {  # by what each is asked for: few steps
    "quickstart_text": ["--steps", "20", "--out", "out"],
    "quickstart_vision": ["--steps", "20", "--out", "out"],
    "compare_transformer_mamba": PLACES,
    "many_tasks": PLACES,
    "torch_loop": ["--steps", "101", "--out", "out"],
    "continual_nullspace": ["--steps", "10"],
    "inspect_a_model": ["--steps", "5", "--out", "out"],
    "register_backbone": ["--steps", "10"],
    "integrations/train_with_trainer": ["out"],
    "integrations/train_with_fsdp2": ["out"],
    "integrations/train_timm": ["out"],
}
ALONE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29517"}
ONE_PROCESS = ("integrations/train_with_fsdp2",)  # is started by torchrun, which says these


def work(job: Job) -> None:
    """Run every script; what one printed last stands in the record."""
    names = job.subjects or (["register_backbone"] if job.quick else list(SCRIPTS))  # which imports the least
    shown: dict[str, str] = {}
    wrong: list[str] = []
    with ThreadPoolExecutor(4) as pool:
        for name, (status, text) in zip(names, pool.map(run, names, [job.cuda] * len(names)), strict=True):
            shown[name] = text[-1500:]
            wrong += [f"{name}: status {status}: {' '.join(text.split())[-400:]}"] if status else []
            job.save(scripts=shown, wrong=wrong)
    print("\n".join(wrong) or f"{len(names)} scripts ran to their end")


def run(name: str, cuda: bool) -> tuple[int, str]:
    """Run a script in an empty folder; return its status and what it printed."""
    chosen = {} if cuda else {"ACCELERATE_USE_CPU": "1"}
    environment = {**os.environ, **(ALONE if name in ONE_PROCESS else {}), **chosen}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(FOLDER / f"{name}.py"), *SCRIPTS[name]]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        done = subprocess.run(command, env=environment, cwd=folder, check=False, **pipes)
    return done.returncode, str(done.stdout)


if __name__ == "__main__":
    sys.exit(run_part(work))
