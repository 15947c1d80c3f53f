"""`fit` on a GPU: the losses are those of the CPU to rounding, and a run that was cut off ends with the same bits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import warnings
from typing import Any

import torch
from torch import Tensor, nn

import residual_steer as rs

from .models import small
from .part import Job, run_part

KINDS = ("gpt2", "mamba")
BATCHES, ROWS, LENGTH = (4, 6), 8, 16  # of a rehearsal, and on a card
CUT = {4: 6, 6: 8}  # by batches: the step in which it is cut off, behind a checkpoint
SHARE = {"no": 1e-3, "bf16": 3e-2}  # how far a loss may be from the CPU's, by precision


class StopError(Exception):
    """A run is cut off."""


def train(kind: str, precision: str, quick: bool, *, stop: bool = False, **options: Any) -> tuple[Any, nn.Module]:
    """Train a freshly steered model on the device that accelerate chooses; return its losses and the model."""
    model, calls = small(kind, quick=quick), []
    torch.manual_seed(1)
    rs.steer(model, rank=8)
    batches = BATCHES[0 if quick else 1]
    size = (batches * ROWS, 6 if quick else LENGTH)
    ids = torch.randint(3, 64, size, generator=torch.Generator().manual_seed(2))
    data = [{"input_ids": part, "labels": part} for part in ids.split(ROWS)]

    def loss(called: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        calls.append(1)
        if stop and len(calls) == CUT[batches]:
            raise StopError
        value: Tensor = called(**batch, use_cache=False).loss
        return value

    usual = {"precision": precision, "log_every": 1, "checkpoint_every": 4, "progress": False}
    history = rs.fit(model, data, steps=2 * batches, lr=3e-3, loss=loss, **usual, **options)
    return [record["loss"] for record in history.train], model


def resumed(kind: str, quick: bool) -> tuple[dict[str, bool], list[float]]:
    """Cut a run off and go on; return how it compares with a whole one, that one with itself, and its losses."""

    def same(one: nn.Module) -> bool:
        return all(torch.equal(p, q) for p, q in zip(rs.parameters(one), rs.parameters(model), strict=True))

    with tempfile.TemporaryDirectory() as folder:
        whole, model = train(kind, "bf16", quick, save_to=f"{folder}/whole")
        again, twin = train(kind, "bf16", quick)
        try:
            train(kind, "bf16", quick, save_to=f"{folder}/cut", stop=True)
        except StopError:
            losses, late = train(kind, "bf16", quick, save_to=f"{folder}/cut", resume=True)
    held = {
        "on a GPU": next(model.parameters()).is_cuda,
        "the same twice": whole == again and same(twin),
        "the same when resumed": losses == whole and same(late),
        "learning": sum(whole[len(whole) // 2 :]) < sum(whole[: len(whole) // 2]),
    }
    return held, whole


def on_the_cpu(kinds: list[str], quick: bool) -> subprocess.Popen[str]:
    """Start a process that sees no GPU and prints its losses, by model and precision."""
    command = [sys.executable, "-m", "gpu.training", "cpu", str(int(quick)), *kinds]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def work(job: Job) -> None:
    """Train, cut off and resume, and compare with the CPU.

    Deterministic kernels are asked for, and who has none is listed: whether the bits are the same is what is tested.

    Raises:
        RuntimeError: the process that trains on the CPU failed.
    """
    kinds, own, held, wrong = job.subjects or list(KINDS), {}, {}, []
    reference = on_the_cpu(kinds, job.quick)  # at the same time
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.deterministic = True  # of cuDNN's attention, which that does not name
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for kind in kinds:
            held[kind], losses = resumed(kind, job.quick)
            own[kind] = {"bf16": losses, "no": train(kind, "no", job.quick)[0]}
            wrong += [
                f"{kind}: not {what}" for what, so in held[kind].items() if not so and (job.cuda or what != "on a GPU")
            ]
            job.save(held=held, losses=own, wrong=wrong)
    undetermined = sorted({str(one.message)[:200] for one in caught if "determinis" in str(one.message)})
    job.save(not_deterministic=undetermined)
    shown, apart = reference.communicate()[0], {}
    if reference.returncode:
        raise RuntimeError(f"training on the CPU ended with status {reference.returncode}")
    expected = json.loads(shown.splitlines()[-1])
    for kind in kinds:
        for precision, share in SHARE.items():
            pairs = zip(own[kind][precision], expected[kind][precision], strict=True)
            far = apart[f"{kind}, {precision}"] = max(abs(a - b) / abs(b) for a, b in pairs)
            if not far <= share:
                wrong.append(f"{kind}, {precision}: a loss is {far:.1e} of itself from the CPU's; {share:.0e} at most")
    job.save(cpu=expected, apart=apart, wrong=wrong)
    print("\n".join(wrong) or f"{', '.join(kinds)}: losses as on the CPU {apart}; resumed to the bit")


if __name__ == "__main__":
    if sys.argv[1] == "cpu":
        quick = bool(int(sys.argv[2]))
        print(json.dumps({kind: {how: train(kind, how, quick)[0] for how in SHARE} for kind in sys.argv[3:]}))
        sys.exit(0)
    sys.exit(run_part(work))
