"""LoReFT (arXiv 2404.03592), by its authors' pyreft, against the floor and the frozen model of the same process.

    make bench-loreft

pyreft pins transformers 4.45, so that it has an environment of its own (see the Makefile) and its numbers are no
seconds to be held against other tables, but ratios. LoReFT moves the stream that leaves a block, at every position, or
where its authors put it, at the first and the last seven; while text is generated it does nothing more, which is why
decoding is not timed. H-Res on the same old release stands beside it.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import residual_steer as rs
from counters import count
from methods import FLOOR, FROZEN, OURS, floor, steered
from options import parser_of, read
from output import exit_status, markdown, save_json
from rounds import Variant, play
from shapes import SHAPES, twin

ENDS = 7  # positions at either end, as in the paper's runs on text
EVERY, SOME = "LoReFT, every position", f"LoReFT, first and last {ENDS}"


class Reft(nn.Module):
    """A model under LoReFT, called like the model itself.

    Args:
        model: a frozen GPT-2.
        rank: of the subspace that is moved.
        ends: how many positions at either end are moved; None for all.
    """

    def __init__(self, model: nn.Module, rank: int, ends: int | None) -> None:
        super().__init__()
        import pyreft

        width = model.config.hidden_size
        places = [
            {
                "layer": layer,
                "component": "block_output",
                "low_rank_dimension": rank,
                "intervention": pyreft.LoreftIntervention(
                    embed_dim=width, low_rank_dimension=rank, dtype=torch.float32
                ),
            }
            for layer in range(model.config.n_layer)
        ]
        self.reft = pyreft.get_reft_model(model, pyreft.ReftConfig(representations=places))
        self.ends, self.count = ends, len(places)

    def forward(self, input_ids: Tensor, **more: Any) -> Any:
        """Return what the model returns."""
        rows, length = input_ids.shape
        where = list(range(length))
        if self.ends is not None and length > 2 * self.ends:
            where = where[: self.ends] + where[-self.ends :]
        locations = {"sources->base": (None, [[where] * rows] * self.count)}
        return self.reft({"input_ids": input_ids}, unit_locations=locations, **more)[1]


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; return the exit status."""
    return exit_status(lambda: report(parse(arguments)))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = parser_of(__doc__, rounds=5)
    parser.add_argument("--rank", type=int, default=32, help="of the subspace, and of the field")
    parser.add_argument("--rows", type=int, default=2, help="of the batch")
    parser.add_argument("--length", type=int, default=128, help="tokens of a row")
    return read(parser, arguments)


def report(options: argparse.Namespace) -> None:
    """Measure, print and save.

    Raises:
        SteerError: pyreft is not installed, or a folder cannot be written.
    """
    try:
        release = importlib.metadata.version("pyreft")
    except importlib.metadata.PackageNotFoundError as error:
        raise rs.SteerError("pyreft is not installed here; `make bench-loreft` gives it an environment.") from error
    shape = SHAPES["gpt2"]
    base = shape.build(tiny=options.quick)
    base.config.architectures = [type(base).__name__]  # which pyvene reads
    rank = min(options.rank, base.config.hidden_size // 2)
    inputs = shape.batch(base, options.rows, options.length)
    models = {
        FROZEN: twin(base),
        FLOOR: floor(twin(base)),
        OURS: steered(twin(base), rank).model,
        EVERY: Reft(twin(base), rank, None),
        SOME: Reft(twin(base), rank, ENDS),
    }
    print(f"{shape.about}, pyreft {release}: {len(models)} methods", flush=True)
    counts = {
        name: count(model, partial(loss, model, inputs), inputs) for name, model in models.items() if name != FROZEN
    }
    learning = [Variant(name, partial(_step, model, inputs)) for name, model in models.items() if name != FROZEN]
    running = [Variant(name, partial(_read, model, inputs)) for name, model in models.items() if name != FLOOR]
    times = {"step": play(learning, options.rounds, progress="step")}
    with torch.no_grad():
        times["prefill"] = play(running, options.rounds, progress="prefill")
    record = {
        "options": {key: value for key, value in vars(options).items() if key != "output"},
        "shape": shape.about,
        "batch": list(inputs.shape),
        "rank": rank,
        "pyreft": release,
        "counts": {name: asdict(found) for name, found in counts.items()},
        "times": {
            "step": times["step"].record(FLOOR),
            "prefill": times["prefill"].record(FROZEN),
        },
    }
    save_json(record, options.output / "loreft-gpt2-cpu.json")
    print(table(record))


def loss(model: Callable[..., Any], inputs: Tensor) -> Tensor:
    """Return the loss of the next token."""
    return model(input_ids=inputs, labels=inputs).loss


def _step(model: nn.Module, inputs: Tensor, _: Any) -> None:
    loss(model, inputs).backward()
    model.zero_grad()


def _read(model: nn.Module, inputs: Tensor, _: Any) -> None:
    model(input_ids=inputs, use_cache=True)


def table(record: dict[str, Any]) -> str:
    """Return a Markdown table."""
    counts, times = record["counts"], record["times"]
    heads = ["method", "trainable", "saved ÷ floor", "FLOPs ÷ floor", "step ÷ floor", "prefill ÷ frozen"]
    lines = []
    for name in (FROZEN, *counts):
        cells = ["–"] * 5
        if name in counts:
            own, least = counts[name], counts[FLOOR]
            cells[:3] = [
                f"{own['trainable']:,}",
                f"{own['saved'] / least['saved']:.3f}",
                f"{own['flops'] / least['flops']:.3f}",
            ]
        for place, column in ((3, "step"), (4, "prefill")):
            if name in times[column]:
                found = times[column][name]["ratio"]
                cells[place] = f"{found['median']:.3f} ({found['low']:.3f}–{found['high']:.3f})"
        lines.append([name, *cells])
    return markdown(heads, lines)


if __name__ == "__main__":
    sys.exit(main())
