"""What a field costs at every place of a block: as cost.py, with the places and LoRA taking turns.

    python benchmarks/places.py
    python benchmarks/places.py --counts     # no times: exact on any machine

Two sites share the rank, so that their two fields are half as wide.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch

import residual_steer as rs
from cost import LENGTHS, counted, launches, recorded, table, timed
from methods import FLOOR, FROZEN, USUAL, Method, floor, lora, steered
from options import add_backbone, add_device, parser_of, read
from output import exit_status, save_json
from shapes import SHAPES, scan_linearly, twin

PLACES: dict[str, Sequence[Sequence[str]]] = {
    "gpt2": (("block",), ("input",), ("after",), ("input", "after"), ("mixer.c_attn",)),
    "mamba": (("block",), ("input",), ("after",), ("input", "after"), ("mixer.in_proj", "mixer.x_proj")),
    "vit": (("block",), ("input",), ("after",), ("input", "after"), ("mixer.qkv",)),
}


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; return the exit status."""
    parser = parser_of(__doc__, rounds=20)
    add_backbone(parser)
    add_device(parser)
    parser.add_argument("--rank", type=int, default=32, help="of fields and adapters")
    parser.add_argument("--rows", type=int, default=2, help="of the batch of a training step and of prefill")
    parser.add_argument("--counts", action="store_true", help="count, and take no times")
    return exit_status(lambda: report(read(parser, arguments)))


def report(options: argparse.Namespace) -> None:
    """Measure every backbone, print and save.

    Raises:
        SteerError: an option that cannot be used, or a folder that cannot be written.
    """
    for name in options.backbone:
        shape = SHAPES[name]
        base = shape.build(tiny=options.quick, device=options.device, dtype=torch.float32)
        rank = min(options.rank, *rs.find_backbone(base).widths)
        methods = [Method(FROZEN, *[twin(base)] * 2)]
        methods.append(Method(FLOOR, floor(scan_linearly(model := twin(base))), model))
        methods += [steered(scan_linearly(twin(base)), rank, site=sites) for sites in PLACES[name]]
        methods.append(lora(scan_linearly(twin(base)), USUAL[name], rank))
        inputs = shape.batch(base, options.rows, 8 if options.quick else LENGTHS[name])
        refused: dict[str, str] = {}
        about = {"shape": shape.about, "batch": list(inputs.shape), "rank": rank}
        counts, launched = counted(shape, methods, inputs, refused), launches(shape, methods, inputs)
        times = {} if options.counts else timed(shape, methods, inputs, options, refused)
        record = recorded(options, about, base, methods, counts, launched, times, refused)
        save_json(record, options.output / f"places-{name}-{torch.device(options.device).type}.json", options.device)
        print(f"{shape.about}\n\n{table(record)}\n", flush=True)


if __name__ == "__main__":
    sys.exit(main())
