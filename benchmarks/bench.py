"""Run all benchmarks, one after the other, and write BENCHMARKS.md.

    python benchmarks/bench.py
    python benchmarks/bench.py --resume
    python benchmarks/bench.py --device cuda --dtype bf16 --compile

Every part is a process of its own: one that fails is named at the end and leaves the others alone. The minutes that are
left are estimated from those that the parts take on two quiet cores, and from how long those before really took.
"""

from __future__ import annotations

import argparse
import datetime
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from environment import read_json, versions
from options import DTYPES, RESULTS, SCRATCH
from output import exit_status
from page import PAGE, write
from residual_steer import SteerError

HERE = Path(__file__).parent
ROOT = HERE.parent
FRESH = datetime.timedelta(days=1)


@dataclass(frozen=True)
class Part:
    """A process.

    Attributes:
        name: for `--only`.
        command: the script and its options.
        files: what it leaves, without `.json`.
        minutes: on two quiet cores.
    """

    name: str
    command: tuple[str, ...]
    files: tuple[str, ...]
    minutes: float


def _cost(name: str, minutes: float) -> Part:
    return Part(f"cost-{name}", ("cost.py", "--backbone", name), (f"cost-{name}-cpu",), minutes)


def _closer(name: str, minutes: float) -> Part:
    return Part(f"closer-{name}", ("closer.py", "--backbone", name), (f"closer-{name}-cpu",), minutes)


def _prefix(name: str, minutes: float) -> Part:
    command = ("prefix.py", "--backbone", name, "--rounds", "2")
    return Part(f"prefix-{name}", command, (f"prefix-{name}-cpu",), minutes)


PARTS = (
    Part("startup", ("startup.py",), ("startup-cpu",), 1),
    _cost("gpt2", 6),
    _cost("vit", 4),
    _cost("mamba", 6),
    *(_closer(name, minutes) for name, minutes in (("gpt2", 3), ("vit", 2), ("mamba", 5))),
    Part("growth-length", ("growth.py", "--curve", "length"), ("growth-length-cpu",), 3),
    Part(
        "growth-others",
        ("growth.py", "--curve", "rank", "blocks", "fields", "--rounds", "10"),
        ("growth-rank-cpu", "growth-blocks-cpu", "growth-fields-cpu"),
        2.5,
    ),
    Part("ssm", ("ssm.py",), ("ssm-cpu",), 1.5),
    Part(
        "last_blocks",
        ("experiments.last_blocks", "--threads", "1"),  # small models gain nothing from a second thread
        ("last_blocks-digits-cpu", "last_blocks-retrieval-cpu"),
        4,
    ),
    _prefix("gpt2", 1),
    _prefix("vit", 1.5),
    _prefix("mamba", 1),
    Part("many_fields", ("many_fields.py", "--rounds", "3"), ("many_fields-gpt2-cpu",), 4),
)


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmarks; return the exit status."""
    return exit_status(lambda: run(parse(arguments)))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    names = [part.name for part in PARTS]
    parser.add_argument("--only", choices=names, nargs="+", default=names, help="which parts")
    parser.add_argument("--resume", action="store_true", help="skip parts that were run within a day, same versions")
    parser.add_argument("--quick", action="store_true", help="tiny shapes and one round: a test, no result")
    parser.add_argument("--device", default="cpu", help="of the costs; elsewhere than on the CPU nothing else is run")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of the costs")
    parser.add_argument("--compile", action="store_true", help="the models of the costs")
    parser.add_argument("--output", type=Path, help=f"folder of what is written; {SCRATCH} with --quick")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> None:
    """Run the parts, then write the page.

    Raises:
        SteerError: some part failed, and the others have left their results; or the page cannot be written.
    """
    folder = options.output or (SCRATCH if options.quick else RESULTS)
    cpu = torch.device(options.device).type == "cpu" and options.dtype == "fp32" and not options.compile
    parts = [part for part in PARTS if part.name in options.only and (cpu or part.name.startswith("cost-"))]
    if options.resume and cpu:
        done = [part for part in parts if is_fresh(part, folder)]
        parts = [part for part in parts if part not in done]
        print(f"{len(done)} parts are not run again: {', '.join(part.name for part in done) or 'none'}", flush=True)
    failed, pace, started = [], 1.0, time.perf_counter()
    for index, part in enumerate(parts):
        left = sum(one.minutes for one in parts[index:]) * pace
        print(f"\n{index + 1} of {len(parts)}: {part.name}; about {left:.0f} minutes left", flush=True)
        command = command_of(part, options, folder.resolve(), cpu)
        if subprocess.run(command, check=False, cwd=ROOT).returncode:
            failed.append(part.name)
        pace = (time.perf_counter() - started) / 60 / sum(one.minutes for one in parts[: index + 1])
    write(folder, folder / PAGE.name if folder != RESULTS else PAGE)
    if failed:
        raise SteerError(f"failed: {', '.join(failed)}; see above. The page was made of the others.")


def command_of(part: Part, options: argparse.Namespace, folder: Path, cpu: bool) -> list[str]:
    """Return the command of a part."""
    script, *more = part.command
    called = [str(HERE / script)] if script.endswith(".py") else ["-m", script]
    command = [sys.executable, *called, *more, "--output", str(folder)]
    if options.quick:
        command += ["--quick", "--rounds", "1", *_smaller(script)]
    if not cpu:
        command += ["--device", options.device, "--dtype", options.dtype, *(["--compile"] * options.compile)]
    return command


def _smaller(script: str) -> Sequence[str]:
    """Return options without which a tiny backbone is too small for a script's own."""
    small = {
        "many_fields.py": ("--rank", "2", "--rows", "4", "--length", "5", "--counts", "1", "2", "--weighted", "3"),
        "prefix.py": ("--rank", "4"),
    }
    return small.get(script, ())


def is_fresh(part: Part, folder: Path) -> bool:
    """Say whether a part's results are of the last day, and of the versions that are installed now."""
    for name in part.files:
        path = folder / f"{name}.json"
        if not path.exists():
            return False
        record = read_json(path)
        age = datetime.datetime.now(datetime.timezone.utc) - datetime.datetime.fromisoformat(record["date"])
        if age > FRESH or record["versions"] != versions():
            return False
    return True


if __name__ == "__main__":
    sys.exit(main())
