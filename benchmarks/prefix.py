"""What `fit(cache_prefix=True)` saves: an epoch after the first, against the same epoch without the cache.

    python benchmarks/prefix.py
    python benchmarks/prefix.py --backbone vit --last 3

Only the last blocks are steered, by default the last half. Runs with and without the cache take turns; the losses of
both are compared, so that what is timed is the same training. By count, n of L blocks cost n - 1 forward and n - 1
backward passes of a block with the cache, and L and n - 1 without: of the lowest steered one only the field is
computed, and nothing goes back through it. Embeddings and heads are computed in both.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import residual_steer as rs
from output import exit_status, markdown, save_json
from rounds import spread
from shapes import SHAPES, Shape

EPOCHS, BATCHES = 3, 3
TOLERANCE = 1e-3  # of the loss
AIM = 0.55


class Rows(Dataset[Any]):
    """Random rows of a shape's input, with labels."""

    def __init__(self, inputs: Tensor, images: bool) -> None:
        self.inputs, self.images = inputs, images

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> Any:
        """Return a pair of image and class, or a window of tokens that are their own labels."""
        row = self.inputs[index]
        return (row, index % 2) if self.images else {"input_ids": row, "labels": row}


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; return the exit status."""
    return exit_status(lambda: report(parse(arguments)))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    results = Path(__file__).parent / "results"
    parser.add_argument("--backbone", choices=SHAPES, default="gpt2", help="whose shape")
    parser.add_argument("--last", type=int, help="how many of the last blocks are steered; half of them if left out")
    parser.add_argument("--rank", type=int, default=32, help="of the field")
    parser.add_argument("--rows", type=int, default=4, help="of a batch")
    parser.add_argument("--length", type=int, help="tokens of a row; 64 for GPT-2 and Mamba")
    parser.add_argument("--rounds", type=int, default=3, help="runs with the cache, and as many without")
    parser.add_argument(
        "--quick", "--tiny", dest="tiny", action="store_true", help="a tiny backbone: a test, no result"
    )
    parser.add_argument("--output", type=Path, default=results, help="folder for the JSON file and the table")
    return parser.parse_args(arguments)


def report(options: argparse.Namespace) -> None:
    """Measure, print and save.

    Raises:
        SteerError: an option that cannot be used, losses that differ, or a folder that cannot be written.
    """
    if min(options.rank, options.rows, options.rounds) < 1:
        raise rs.SteerError("--rank, --rows and --rounds are 1 or more.")
    shape = SHAPES[options.backbone]
    first, later = [], []
    for _ in range(options.rounds):
        plain, cached = run(shape, options, False), run(shape, options, True)
        compare(plain, cached)
        first.append(seconds(cached, slice(0, BATCHES)) / seconds(plain, slice(0, BATCHES)))
        later.append(seconds(cached, slice(BATCHES, None)) / seconds(plain, slice(BATCHES, None)))
    blocks, steered = blocks_of(shape, options)
    heads = ["epoch", "with the cache ÷ without", "by count of blocks", "aim"]
    bound = 2 * (steered - 1) / (blocks + steered - 1)
    aim = f"{AIM} for half of the blocks"
    rows = [["first", f"{spread(first):.3f}", "1", "–"], ["later", f"{spread(later):.3f}", f"{bound:.3f}", aim]]
    about = f"{shape.about}: the last {steered} of {blocks} blocks steered, rank {options.rank}, {options.rows} rows."
    text = f"{about}\n\n{markdown(heads, rows)}"
    settings = {key: value for key, value in vars(options).items() if key != "output"}
    stem = f"prefix-{options.backbone}-cpu"
    record = {"options": settings, "about": about, "first": first, "later": later, "bound": bound}
    save_json(record, options.output / f"{stem}.json")
    (options.output / f"{stem}.md").write_text(text + "\n")
    print(text)


def blocks_of(shape: Shape, options: argparse.Namespace) -> tuple[int, int]:
    """Return how many blocks there are, and how many of them are steered.

    Raises:
        SteerError: more than there are, or all.
    """
    blocks = len(rs.find_backbone(shape.build(tiny=options.tiny)).blocks)
    steered = options.last or blocks // 2
    if not 1 <= steered < blocks:
        raise rs.SteerError(f"--last is from 1 to {blocks - 1}; received {steered}.")
    return blocks, steered


def run(shape: Shape, options: argparse.Namespace, cache: bool) -> rs.training.History:
    """Train one field on random data."""
    model = without_dropout(shape.build(tiny=options.tiny))
    blocks, steered = blocks_of(shape, options)
    torch.manual_seed(0)
    rs.steer(model, rank=min(options.rank, *rs.find_backbone(model).widths), layers=range(blocks - steered, blocks))
    data = Rows(shape.batch(model, BATCHES * options.rows, options.length), images=shape.length is None)
    loader = DataLoader(data, batch_size=options.rows, shuffle=True)
    return rs.fit(model, loader, steps=EPOCHS * BATCHES, log_every=1, progress=False, cache_prefix=cache)


def without_dropout(model: nn.Module) -> nn.Module:
    """Switch dropout off, which the cache would refuse."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def compare(plain: rs.training.History, cached: rs.training.History) -> None:
    """Hold the losses of two runs against each other.

    Raises:
        SteerError: they differ by more than rounding, or nothing came from the cache.
    """
    for one, other in zip(plain.train, cached.train, strict=True):
        if abs(one["loss"] - other["loss"]) > TOLERANCE * abs(one["loss"]):
            raise rs.SteerError(f"step {one['step']}: a loss of {one['loss']:g}, and {other['loss']:g} with the cache.")
    if cached.cache is None or cached.cache["hits"] != (EPOCHS - 1) * BATCHES:
        raise rs.SteerError(f"later epochs are to come from the cache; it told {cached.cache}.")


def seconds(history: rs.training.History, steps: slice) -> float:
    """Return the median seconds of some steps."""
    return statistics.median(record["seconds_per_step"] for record in history.train[steps])


if __name__ == "__main__":
    sys.exit(main())
