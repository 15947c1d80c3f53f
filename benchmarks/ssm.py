"""Training an SSM on a CPU: how a step grows with the length, how much memory it takes, and what the scan saves.

    python benchmarks/ssm.py

A Mamba of 130m's shape, random weights, one row, steered by one field of rank 32: a step's time at lengths 128 to
1,024, whose exponent is the slope of a line through logarithms, by least squares. transformers' plain fallback, which
walks the sequence step by step, is timed against the scan with fewer blocks and a small vocabulary, since it is so
slow; all with the same ones. So is mambapy's parallel scan, which transformers offers, where it is installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import resource
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor, nn

import residual_steer as rs
from options import parser_of, read
from output import exit_status, markdown, save_json
from rounds import Variant, play
from shapes import SHAPES

LENGTHS, TINY_LENGTHS = (128, 256, 512, 1024), (4, 8)
AT, TINY_AT = 256, 8  # tokens, where the fallback is timed
FEW = 2  # blocks, where the fallback is timed
ROWS = (1, 2)  # where the fallback is timed; the aim is for one
RANK = 32


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; return the exit status."""
    return exit_status(lambda: report(parse(arguments)))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = parser_of(__doc__, rounds=5)
    parser.add_argument("--lengths", type=int, nargs="+", help="tokens of the row")
    return read(parser, arguments)


def report(options: argparse.Namespace) -> None:
    """Measure, print and save.

    Raises:
        SteerError: an option that cannot be used, or a folder that cannot be written.
    """
    lengths = options.lengths or (TINY_LENGTHS if options.quick else LENGTHS)
    if len(set(lengths)) < 2 or min(lengths) < 2:
        raise rs.SteerError(f"--lengths are two or more, of 2 or more tokens; received {list(lengths)}.")
    shape = SHAPES["mamba"]
    model = prepared(shape.build(tiny=options.quick))
    batches = {length: shape.batch(model, 1, length) for length in lengths}
    growing = [Variant(str(length), partial(step, model, inputs)) for length, inputs in batches.items()]
    step(model, batches[min(lengths)], None)  # what a first call sets up is not measured
    grown = play(growing, options.rounds, warmup=0, progress="length")
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    del model
    at = TINY_AT if options.quick else AT
    few = {"tiny": options.quick, "num_hidden_layers": FEW, "vocab_size": 64}
    makers = {"scan": prepared, "fallback": plainly}
    if importlib.util.find_spec("mambapy") is not None:
        makers["mambapy"] = through_mambapy
    models = {name: deep(make(shape.build(**few))) for name, make in makers.items()}
    held = {}
    for rows in ROWS:
        inputs = shape.batch(models["scan"], rows, at)
        sides = [Variant(name, partial(step, model, inputs)) for name, model in models.items()]
        held[str(rows)] = play(sides, options.rounds, progress=f"fallback, {rows}").record("scan")
    record = {
        "options": {key: value for key, value in vars(options).items() if key != "output"},
        "shape": shape.about,
        "times": grown.record(str(lengths[0])),
        "exponents": [
            exponent(lengths, [grown.seconds[str(length)][turn] for length in lengths])
            for turn in range(options.rounds)
        ],
        "memory": memory,
        "fallback": {"at": at, "blocks": FEW, "rows": held},
    }
    save_json(record, options.output / "ssm-cpu.json")
    print(table(record))


def prepared(model: nn.Module) -> nn.Module:
    """Steer a Mamba, in training mode, in which its steering scans linearly."""
    return rs.steer(model, rank=min(RANK, *rs.find_backbone(model).widths)).train()


def plainly(model: nn.Module) -> nn.Module:
    """Steer a Mamba, in training mode, without what its family prepares: the fallback of transformers stays."""
    backbone = replace(rs.find_backbone(model), prepare=None)
    return rs.steer(model, backbone, rank=min(RANK, *backbone.widths)).train()


def through_mambapy(model: nn.Module) -> nn.Module:
    """Steer a Mamba, in training mode, whose fallback is told to take mambapy's scan."""
    for module in model.modules():
        if hasattr(module, "use_mambapy"):
            module.use_mambapy = True
    return plainly(model)


def deep(model: nn.Module) -> nn.Module:
    """Let the stream that enters require a gradient, as it does in all blocks of a deep model but the first."""
    model.get_input_embeddings().register_forward_hook(lambda _, args, output: output.detach().requires_grad_())
    return model


def step(model: nn.Module, inputs: Tensor, _: Any) -> None:
    """Take a training step but for the optimizer's."""
    model(input_ids=inputs, labels=inputs).loss.backward()
    model.zero_grad()


def exponent(lengths: Sequence[int], seconds: Sequence[float]) -> float:
    """Return the slope of log seconds over log length, by least squares."""
    x, y = [math.log(length) for length in lengths], [math.log(second) for second in seconds]
    return statistics.linear_regression(x, y).slope


def table(record: dict[str, Any]) -> str:
    """Return the numbers as Markdown."""
    rows = [[length, f"{found['seconds']['median']:.2f}"] for length, found in record["times"].items()]
    slow = record["fallback"]
    told = "; ".join(
        f"{name} takes "
        + ", ".join(
            f"{found[name]['ratio']['median']:.1f} times as long with {number} row(s)"
            for number, found in slow["rows"].items()
        )
        for name in next(iter(slow["rows"].values()))
        if name != "scan"
    )
    return "\n\n".join(
        [
            markdown(["length", "seconds of a step"], rows),
            f"The exponent is {statistics.median(record['exponents']):.3f}; the process took "
            f"{record['memory'] / 2**30:.1f} GiB at most. Against the scan, transformers' {told}, at {slow['at']} "
            f"tokens and by {slow['blocks']} blocks, through all of which gradients run.",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
