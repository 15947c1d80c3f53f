"""Which architectures `steer(model)` reaches: every model class of transformers, and every module of timm, tried.

Each model is built small with random weights, steered with no arguments, and checked (`coverage_check.py`). The table
goes to COVERAGE.md, the same in JSON to benchmarks/results/coverage.json. What was done is kept line by line, so that a
run that was stopped goes on where it was; `--fresh` begins anew.

    python benchmarks/coverage.py --kind causal --only llama
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import resource
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Iterable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch

from coverage_models import KINDS, NO_STREAM, Entry, UnbuiltError, entries
from coverage_report import versions, write

ROOT = Path(__file__).resolve().parents[1]
LINES = ROOT / "runs" / "coverage.jsonl"
SECONDS, GIB = 60.0, 6.0
PATIENCE = 10  # times the seconds of a processor that a model may use may pass, on a machine that does other things too


def main(arguments: Iterable[str] | None = None) -> None:
    """Try all models, or those that were asked for, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", nargs="*", default=[*KINDS, "timm"], choices=[*KINDS, "timm"])
    parser.add_argument("--only", nargs="*", help="model types of transformers or modules of timm; writes no tables")
    parser.add_argument("--fresh", action="store_true", help="forget what an earlier run found")
    parser.add_argument("--retry", action="store_true", help="try again what neither works nor is refused")
    parser.add_argument("--jobs", type=int, default=1, help="models at a time")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of a processor, for each model")
    parser.add_argument("--lines", type=Path, default=LINES, help="where results are kept line by line")
    asked = parser.parse_args(None if arguments is None else list(arguments))
    if asked.fresh:
        asked.lines.unlink(missing_ok=True)
    done = {} if asked.only else _read(asked.lines)
    todo = [entry for kind in asked.kind for entry in entries(kind) if not asked.only or entry.name in asked.only]
    kept = {key: row for key, row in done.items() if not (asked.retry and row["status"] not in ("works", "refused"))}
    pending = [entry for entry in todo if _key(entry) not in kept]
    asked.lines.parent.mkdir(parents=True, exist_ok=True)
    begun = time.time()
    for number, row in enumerate(_all(pending, asked.jobs, asked.seconds), start=1):
        print(f"{number}/{len(pending)} {row['kind']} {row['name']}: {row['status']} {row['why'] or row.get('arch')}")
        if not asked.only:
            with asked.lines.open("a") as lines:
                lines.write(json.dumps(row) + "\n")
        sys.stdout.flush()
    print(f"{len(pending)} models in {time.time() - begun:.0f} s")
    if not asked.only:
        rows = _read(asked.lines)
        order = [_key(entry) for entry in todo]
        write(ROOT, [rows[key] for key in order if key in rows])


def _read(lines: Path) -> dict[str, dict[str, Any]]:
    """Return what is known of every model with the installed releases; the last line about it counts."""
    rows = [json.loads(line) for line in lines.read_text().splitlines()] if lines.exists() else []
    return {f"{row['kind']} {row['name']} {row['key']}": row for row in rows if row["versions"] == versions()}


def _key(entry: Entry) -> str:
    return f"{entry.kind} {entry.name} {entry.model}"


def _all(pending: list[Entry], jobs: int, seconds: float) -> Iterable[dict[str, Any]]:
    """Yield a row for every entry, each from a process of its own, so many at a time."""
    for kind in dict.fromkeys(entry.kind for entry in pending):  # imported once, before the forks
        _import(kind)
    torch.set_num_threads(1)
    context = multiprocessing.get_context("fork")
    waiting, running = list(pending), list[tuple[Entry, Any, Connection, float]]()
    while waiting or running:
        while waiting and len(running) < jobs:
            entry = waiting.pop(0)
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_work, args=(entry, theirs, seconds), daemon=True)
            process.start()
            theirs.close()
            running.append((entry, process, ours, time.time()))
        for item in list(running):
            entry, process, ours, begun = item
            if ours.poll(0.05):
                try:
                    row = ours.recv()
                except EOFError:
                    process.join(5)
                    slow = process.exitcode == -signal.SIGXCPU
                    row = _slow(seconds) if slow else {"status": "failed", "why": "its process died, of memory perhaps"}
            elif time.time() - begun > PATIENCE * seconds:
                row = _slow(seconds)
                process.kill()
            else:
                continue
            process.join(5)
            running.remove(item)
            told = {
                "versions": versions(),
                "kind": entry.kind,
                "name": entry.name,
                "key": entry.model,
                "model": entry.model,
            }
            yield {**told, **row, "seconds": round(time.time() - begun, 1)}


def _slow(seconds: float) -> dict[str, Any]:
    return {"status": "untested", "why": f"took more than {seconds:.0f} s"}


def _import(kind: str) -> None:
    """Import what every model of a kind imports too."""
    importlib.import_module("coverage_check")
    if kind == "timm":
        importlib.import_module("timm")
        return
    for name in ("generation.utils", "models.llama.modeling_llama", "models.bart.modeling_bart", "masking_utils"):
        importlib.import_module(f"transformers.{name}")
    importlib.import_module("torch._dynamo")
    importlib.import_module("transformers.utils.logging").set_verbosity_error()


def _work(entry: Entry, connection: Connection, seconds: float) -> None:
    """Build and check one model within so many seconds of a processor, and send the row."""
    used = sum(os.times()[:2])
    resource.setrlimit(resource.RLIMIT_CPU, (int(used + seconds) + 1, int(used + seconds) + 2))
    resource.setrlimit(resource.RLIMIT_AS, (int((GIB + 20) * 2**30),) * 2)
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    warnings.simplefilter("ignore")
    connection.send(result_of(entry))
    connection.close()


def result_of(entry: Entry) -> dict[str, Any]:
    """Return what a table says of a model: works, refused, failed or untested, and why."""
    from coverage_check import FailedError, check
    from residual_steer import SteerError

    model = None
    try:
        model = entry.build()
        named = getattr(model, "pretrained_cfg", None) or {}
        told = {"model": f"{named['architecture']}"} if entry.kind == "timm" and "architecture" in named else {}
        return {"status": "works", "why": "", **told, **check(model)}
    except UnbuiltError as error:
        return {"status": "untested", "why": str(error)}
    except SteerError as error:
        none = entry.name in NO_STREAM and "no residual stream was found" in str(error)
        return {"status": "refused" if none else "failed", "why": _short(str(error))}
    except FailedError as error:
        return {"status": "failed", "why": str(error)}
    except Exception as error:  # a bug of ours or of the model's: its last line says which
        last = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(last.filename).name}:{last.lineno}"
        return {"status": "failed", "why": f"{type(error).__name__}: {' '.join(str(error).split())[:160]} ({place})"}


def _short(told: str) -> str:
    """Return the part of an error that says what is the matter: its beginning, or what running the model raised."""
    told = " ".join(told.partition(" Before that,")[0].split())
    return (f"did not run: {told.partition('Tried ')[2]}" if "Tried " in told else told)[:240]


if __name__ == "__main__":
    main()
