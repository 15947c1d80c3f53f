"""Many fields on one GPT-2: time, memory and selection while 1 to 1,000 are held, and PEFT's adapters beside them."""

from __future__ import annotations

import sys
import time
from functools import partial
from typing import Any

import torch

import residual_steer as rs
from contenders import adapters, deal
from rounds import Variant, play
from shapes import twin

from .models import SUBJECTS
from .part import Job, run_part, why

HELD, ACTING, ROWS, LENGTH, RANK, ROUNDS = (1, 10, 100, 1000), (1, 16, 64), 64, 64, 8, 15
PATIENCE = 40  # seconds in which fields are added; what is not held by then is left out


def work(job: Job) -> None:
    """Add fields, and at each number of them time a batch under none, one, and several by row."""
    quick = ((1, 3), (1, 2), 4, 6, 2, 2)
    held, acting, rows, length, rank, rounds = quick if job.quick else (HELD, ACTING, ROWS, LENGTH, RANK, ROUNDS)
    subject, names, found = SUBJECTS["gpt2"], [], {}
    base = subject.build(job.quick, job.device, job.dtype)
    model, inputs = twin(base), subject.shape.batch(base, rows, length)

    @torch.no_grad()
    def run(call: Any, more: dict[str, Any], _: Any) -> None:
        call(input_ids=inputs, use_cache=False, logits_to_keep=1, **more)

    def taken() -> tuple[float, int]:
        if job.cuda:
            torch.cuda.synchronize()  # what was asked for is there
        return time.perf_counter(), torch.cuda.memory_allocated() if job.cuda else 0

    peers: list[Variant] = []
    try:
        for peer in adapters(twin(base), acting, rows, rank):
            peers.append(Variant(peer.name, partial(run, peer.call, peer.more), peer.select))
    except Exception as error:
        job.save(refused=why(error))
    job.save(shape=subject.shape.about, batch=[rows, length], rank=rank)
    until = time.perf_counter() + PATIENCE
    for number in held:
        started, before = taken()
        while len(names) < number and time.perf_counter() < until:
            names.append(f"f{len(names)}")
            rs.steer(model, rank=rank, name=names[-1])
        ended, after = taken()
        took = {"seconds to add": ended - started, "bytes added": after - before}
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "steering_" in name:  # zeros could be multiplied faster
                    p.normal_(std=0.05)
        asked: dict[str, Any] = {"frozen": None, "one field": names[0]}
        asked |= {f"{count} by row": deal(names[:count], rows) for count in acting if count <= len(names)}
        own = [Variant(name, partial(run, model, {}), partial(rs.use, model, mix)) for name, mix in asked.items()]
        calls = [Variant(name, lambda _, mix=mix: rs.use(model, mix)) for name, mix in asked.items()]
        times = play([*own, *peers], rounds, device=job.device).record("frozen")
        found[len(names)] = {**took, "times": times, "use": play(calls, rounds, device=job.device).record("frozen")}
        job.save(held=found)
        if len(names) < number:
            job.save(wrong=[f"{len(names)} of {number} fields were added in {PATIENCE} seconds"])
            break


if __name__ == "__main__":
    sys.exit(run_part(work))
