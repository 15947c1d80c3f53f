"""The options that all benchmarks have."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from residual_steer import SteerError
from shapes import SHAPES

__all__ = ["RESULTS", "SCRATCH", "add_backbone", "add_device", "parser_of", "read"]

RESULTS = Path(__file__).parent / "results"
SCRATCH = Path("runs") / "bench"  # where a test run leaves what is no result
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def parser_of(about: str | None, rounds: int) -> argparse.ArgumentParser:
    """Return a parser with the options of every benchmark.

    Args:
        about: the script's docstring.
        rounds: how many there are by default.
    """
    parser = argparse.ArgumentParser(
        description=(about or "").split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--rounds", type=int, help=f"of each measurement; {rounds}, or 1 with --quick")
    parser.add_argument("--threads", type=int, help="of PyTorch on the CPU")
    parser.add_argument("--quick", action="store_true", help="tiny shapes and one round: a test, no result")
    parser.add_argument("--output", type=Path, help=f"folder of what is written; {SCRATCH} with --quick")
    parser.set_defaults(usual_rounds=rounds)
    return parser


def add_backbone(parser: argparse.ArgumentParser, default: Sequence[str] = tuple(SHAPES)) -> None:
    """Add the choice of shapes."""
    parser.add_argument("--backbone", choices=SHAPES, nargs="+", default=default, help="whose shapes")


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add where and in what precision the work is done."""
    parser.add_argument("--device", default="cpu", help="as PyTorch names it")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of the frozen weights")
    parser.add_argument("--compile", action="store_true", help="torch.compile, and CUDA graphs for decoding")


def read(parser: argparse.ArgumentParser, arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line, and set the number of threads.

    Raises:
        SteerError: an option that is to be positive is not.
    """
    options = parser.parse_args(arguments)
    usual = vars(options).pop("usual_rounds")
    options.rounds = (1 if options.quick else usual) if options.rounds is None else options.rounds
    options.output = options.output or (SCRATCH if options.quick else RESULTS)
    for name in ("rounds", "threads", "rank", "rows", "length"):
        number = getattr(options, name, None)
        if number is not None and number < 1:
            raise SteerError(f"--{name} is 1 or more; received {number}.")
    if options.threads:
        torch.set_num_threads(options.threads)
    return options
