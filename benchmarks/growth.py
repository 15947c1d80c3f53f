"""How the cost of steering grows: with length, rank, number of steered blocks, and number of fields.

    python benchmarks/growth.py
    python benchmarks/growth.py --curve rank --rounds 20

Blocks of GPT-2-small's width, random weights, and a small vocabulary, whose head would otherwise be most of the work.
At every point the floor, or the frozen model, takes turns with H-Res and with PEFT's LoRA on its usual targets; what is
drawn are the ratios within rounds. The curve of steered blocks steers the last ones of all, against the floor of all.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import residual_steer as rs
from charts import Axis, Measured, Plot, Series
from contenders import has_peft
from counters import count
from methods import CHEAPEST, FLOOR, FROZEN, OURS, USUAL, floor, lora, mixed, randomise, steered, why
from options import parser_of, read
from output import exit_status, markdown, save_json
from rounds import Variant, play
from shapes import SHAPES, Shape, twin

VOCABULARY = 1024
COLUMNS = {"step": FLOOR, "prefill": FROZEN}


@dataclass(frozen=True)
class Curve:
    """What is varied.

    Attributes:
        axis: along the bottom.
        values: of what is varied; tiny ones for a test.
        blocks: of the backbone; tiny for a test.
        adapt: from a twin of the backbone, a value and the rank to the steered model.
        rival: the same under LoRA; None where there is no such thing.
    """

    axis: Axis
    values: tuple[tuple[int, ...], tuple[int, ...]]
    blocks: tuple[int, int]
    adapt: Callable[[nn.Module, int, int], nn.Module]
    rival: Callable[[nn.Module, int, int], nn.Module] | None

    def length(self, value: int) -> int:
        """Return the tokens of a row."""
        return value if self.axis.label == "length" else 128


def _last(model: nn.Module, number: int, rank: int) -> nn.Module:
    return steered(model, rank, layers=range(-number, 0)).model


def _lora_last(model: nn.Module, number: int, rank: int) -> nn.Module:
    import peft

    blocks = len(rs.find_backbone(model).blocks)
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=USUAL["gpt2"],
        layers_to_transform=list(range(blocks - number, blocks)),
        layers_pattern="h",
    )
    adapted = peft.get_peft_model(model, config).eval()
    randomise(adapted)
    return adapted


CURVES = {
    "length": Curve(
        Axis("length", "tokens", log=True),
        ((64, 128, 256, 512, 1024, 2048), (4, 8)),
        (4, 2),
        lambda model, value, rank: steered(model, rank).model,
        lambda model, value, rank: lora(model, USUAL["gpt2"], rank).model,
    ),
    "rank": Curve(
        Axis("rank", log=True),
        ((4, 16, 64, 256), (2, 4)),
        (4, 2),
        lambda model, value, rank: steered(model, value).model,
        lambda model, value, rank: lora(model, USUAL["gpt2"], value).model,
    ),
    "blocks": Curve(
        Axis("blocks that are steered, from the last"), ((1, 3, 6, 9, 12), (1, 2)), (12, 2), _last, _lora_last
    ),
    "fields": Curve(
        Axis("fields in one mix of weights"),
        ((1, 2, 4, 8, 16), (1, 2)),
        (4, 2),
        lambda model, value, rank: mixed(model, rank, value).model,
        None,
    ),
}


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; return the exit status."""
    return exit_status(lambda: report(parse(arguments)))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = parser_of(__doc__, rounds=5)
    parser.add_argument("--curve", choices=CURVES, nargs="+", default=tuple(CURVES), help="what is varied")
    parser.add_argument("--rank", type=int, default=32, help="where it is not varied")
    parser.add_argument("--rows", type=int, default=1, help="of the batch")
    return read(parser, arguments)


def report(options: argparse.Namespace) -> None:
    """Measure every curve, print and save.

    Raises:
        SteerError: an option that cannot be used, or a folder that cannot be written.
    """
    for name in options.curve:
        found, failed = measure(name, CURVES[name], options)
        record = {
            "options": {key: value for key, value in vars(options).items() if key != "output"},
            "curve": name,
            "about": f"{CURVES[name].blocks[options.quick]} blocks of width {32 if options.quick else 768}, "
            f"a vocabulary of {VOCABULARY:,}, {options.rows} row(s)"
            + ("" if name == "length" else f" of {CURVES[name].length(0)} tokens")
            + ("" if name == "rank" else f", rank {min(options.rank, 32)}"),
            "points": found,
            "failed": failed,
        }
        save_json(record, options.output / f"growth-{name}-cpu.json")
        print(f"\n{table(record)}\n", flush=True)


def measure(name: str, curve: Curve, options: argparse.Namespace) -> tuple[dict[str, Any], dict[str, str]]:
    """Measure every point of a curve; return those that were, and why others were not."""
    points, failed = {}, {}
    values = curve.values[options.quick]
    changes = {"n_layer": curve.blocks[options.quick], "vocab_size": VOCABULARY, "n_positions": 2048}
    shape = SHAPES["gpt2"]
    base = shape.build(tiny=options.quick, **changes, bos_token_id=0, eos_token_id=0)
    for value in values:
        try:
            inputs = shape.batch(base, options.rows, curve.length(value))
            points[str(value)] = point(f"{name} {value}", models(curve, base, value, options.rank), inputs, options)
        except Exception as error:  # such as memory that is not there: the other points stand
            failed[str(value)] = why(error)
    return points, failed


def models(curve: Curve, base: nn.Module, value: int, rank: int) -> dict[str, nn.Module]:
    """Return what is held against each other."""
    found = {FROZEN: twin(base), FLOOR: floor(twin(base)), OURS: curve.adapt(twin(base), value, rank)}
    if curve.rival is not None and has_peft():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found[CHEAPEST] = curve.rival(twin(base), value, rank)
    return found


def point(name: str, found: dict[str, nn.Module], inputs: Tensor, options: argparse.Namespace) -> dict[str, Any]:
    """Measure one point: ratios of steps and prefills, and of counts."""
    shape = SHAPES["gpt2"]
    learning = {key: model for key, model in found.items() if key != FROZEN}
    counts = {key: count(model, partial(shape.loss, model, inputs), inputs) for key, model in learning.items()}

    def step(model: nn.Module, _: Any) -> None:
        shape.loss(model, inputs).backward()
        model.zero_grad()

    variants = [Variant(key, partial(step, model)) for key, model in learning.items()]
    times = {"step": play(variants, options.rounds, warmup=0, progress=f"{name}, step")}
    with torch.no_grad():
        variants = [
            Variant(key, partial(_prefill, shape, model, inputs)) for key, model in found.items() if key != FLOOR
        ]
        times["prefill"] = play(variants, options.rounds, progress=f"{name}, prefill")
    return {
        **{column: rounds.record(COLUMNS[column]) for column, rounds in times.items()},
        "saved": {key: own.saved / counts[FLOOR].saved for key, own in counts.items()},
        "flops": {key: own.flops / counts[FLOOR].flops for key, own in counts.items()},
    }


def _prefill(shape: Shape, model: nn.Module, inputs: Tensor, _: Any) -> None:
    shape.prefill(model, inputs)


def methods_of(record: dict[str, Any]) -> list[str]:
    """Return the methods that a curve has, beside its references."""
    return [name for name in (OURS, CHEAPEST) if any(name in point["step"] for point in record["points"].values())]


def plot(record: dict[str, Any]) -> Plot:
    """Draw a curve: ratios of steps and of prefills, with their spread over rounds."""
    series = []
    for name in methods_of(record):
        for column, reference in COLUMNS.items():
            x, y = [], []
            for value, point in record["points"].items():
                x.append(float(value))
                y.append(Measured.of(ratios(point[column], name, reference)))
            series.append(Series(f"{name}: {column} ÷ {reference}", tuple(x), tuple(y)))
    axis = CURVES[record["curve"]].axis
    return Plot(f"Cost against {axis.label}", "lines", axis, Axis("time ÷ that of the reference"), tuple(series))


def ratios(times: dict[str, Any], name: str, reference: str) -> list[float]:
    """Return the ratio of every round."""
    return [one / other for one, other in zip(times[name]["rounds"], times[reference]["rounds"], strict=True)]


def table(record: dict[str, Any]) -> str:
    """Return a Markdown table."""
    heads = [record["curve"]]
    heads += [f"{name}: {column} ÷ {COLUMNS[column]}" for name in methods_of(record) for column in COLUMNS]
    heads += [f"{name}: saved ÷ floor" for name in methods_of(record)]
    rows = []
    for value, point in record["points"].items():
        times = [point[column][name]["ratio"] for name in methods_of(record) for column in COLUMNS]
        cells = [f"{one['median']:.3f} ({one['low']:.3f}–{one['high']:.3f})" for one in times]
        rows.append([value, *cells, *(f"{point['saved'][name]:.3f}" for name in methods_of(record))])
    return "\n".join([markdown(heads, rows), *(f"- {value}: {reason}" for value, reason in record["failed"].items())])


if __name__ == "__main__":
    sys.exit(main())
