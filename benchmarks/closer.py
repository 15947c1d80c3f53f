"""What the aims are about, measured closer: H-Res and LoRA against the floor or the frozen model, in many rounds.

    python benchmarks/closer.py
    python benchmarks/closer.py --backbone vit --rounds 100

As cost.py, with nobody else taking turns, and with an interval of the median in place of the quartiles of the rounds:
so a difference of a few percent can be told from the noise of a machine.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Sequence
from typing import Any

import torch

import residual_steer as rs
from cost import LENGTHS, parse, reference_of, timed
from methods import CHEAPEST, FLOOR, FROZEN, OURS, build
from options import DTYPES
from output import exit_status, markdown, save_json
from rounds import Spread
from shapes import SHAPES

SURE = 0.95  # how often such an interval holds the median


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; return the exit status."""
    return exit_status(lambda: report(parse(arguments, __doc__, rounds=40)))


def report(options: argparse.Namespace) -> None:
    """Measure every backbone, print and save.

    Raises:
        SteerError: an option that cannot be used, or a folder that cannot be written.
    """
    for name in options.backbone:
        shape = SHAPES[name]
        base = shape.build(tiny=options.quick, device=options.device, dtype=DTYPES[options.dtype])
        rank = min(options.rank, *rs.find_backbone(base).widths)
        methods, refused = build(name, shape, base, rank, only=(FROZEN, FLOOR, OURS, CHEAPEST))
        inputs = shape.batch(base, options.rows, options.length or (8 if options.quick else LENGTHS[name]))
        times = {}
        for column, rounds in timed(shape, methods, inputs, options, refused).items():
            found = rounds.record(reference_of(column))
            for key, row in found.items():
                row["interval"] = vars(interval(rounds.ratios(key, reference_of(column))))
            times[column] = found
        record = {
            "options": {key: value for key, value in vars(options).items() if key != "output"},
            "shape": shape.about,
            "batch": list(inputs.shape),
            "times": times,
            "refused": refused,
        }
        save_json(record, options.output / f"closer-{name}-{torch.device(options.device).type}.json", options.device)
        print(f"\n{shape.about}\n\n{table(record)}\n", flush=True)


def interval(values: Sequence[float], sure: float = SURE) -> Spread:
    """Return the median and an interval for it from order statistics, which asks nothing of the distribution.

    Between the k-th smallest and the k-th largest of n numbers the median lies but for a probability of
    2·P(Binomial(n, 1/2) < k).

    Args:
        values: one or more; of fewer than six, all are within.
        sure: how often the interval is to hold the median at the least.
    """
    ordered, count = sorted(values), len(values)
    k, fewer = 1, 1  # of the 2^n ways in which n numbers lie about the median, those with fewer than k below it
    while 2 * (fewer + math.comb(count, k)) <= (1 - sure) * 2**count:
        fewer += math.comb(count, k)
        k += 1
    return Spread(statistics.median(ordered), ordered[k - 1], ordered[count - k])


def table(record: dict[str, Any]) -> str:
    """Return a Markdown table."""
    heads = ["method", *(f"{column} ÷ {reference_of(column)}" for column in record["times"])]
    rows = []
    for name in (OURS, CHEAPEST):
        cells = [
            f"{Spread(**found[name]['interval']):.3f}" if name in found else "–" for found in record["times"].values()
        ]
        rows.append([name, *cells])
    return markdown(heads, rows)


if __name__ == "__main__":
    sys.exit(main())
