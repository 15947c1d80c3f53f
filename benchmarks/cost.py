"""What steering costs: a training step against the floor, prefill and decoding against the frozen model.

    python benchmarks/cost.py
    python benchmarks/cost.py --backbone mamba --rounds 20
    python benchmarks/cost.py --device cuda --dtype bf16 --compile

The floor of a training step is the forward pass of the frozen model, and the backward pass to what leaves its first
block: whatever learns beside that block needs as much. Steering, PEFT's methods and full fine-tuning take turns with it
(see rounds.py), with random weights of well-known shapes. Beside the times stand counts, which no clock
disturbs. A method that fails is a row with its reason.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import residual_steer as rs
from counters import Counts, count, operations
from methods import FLOOR, FROZEN, FULL, OURS, Method, build, compile_apart, why
from options import DTYPES, add_backbone, add_device, parser_of, read
from output import exit_status, markdown, save_json
from rounds import Rounds, Variant, play
from shapes import SHAPES, Shape

DECODED = (1, 16)  # rows
LENGTHS = {"gpt2": 128, "mamba": 64, "vit": None}
Run = Callable[[Any], object]


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; return the exit status."""
    return exit_status(lambda: report(parse(arguments)))


def parse(arguments: list[str] | None, about: str | None = __doc__, rounds: int = 8) -> argparse.Namespace:
    """Read the command line, of this script or of one that measures in the same way.

    Args:
        arguments: of the command line.
        about: the script's docstring.
        rounds: how many there are by default.
    """
    parser = parser_of(about, rounds)
    add_backbone(parser)
    add_device(parser)
    parser.add_argument("--rank", type=int, default=32, help="of fields and adapters")
    parser.add_argument("--rows", type=int, default=2, help="of the batch of a training step and of prefill")
    parser.add_argument("--length", type=int, help="tokens of a row; 128 for GPT-2, 64 for Mamba; 8 with --quick")
    return read(parser, arguments)


def recorded(
    options: argparse.Namespace,
    about: dict[str, Any],
    base: nn.Module,
    methods: Sequence[Method],
    counts: Mapping[str, Counts],
    launched: Any,
    times: Mapping[str, Rounds],
    refused: Mapping[str, str],
) -> dict[str, Any]:
    """Return what was found of a backbone, for a JSON file and a table."""
    return {
        "options": {key: value for key, value in vars(options).items() if key != "output"},
        **about,
        "blocks": len(rs.find_backbone(base).blocks),
        "counts": {key: asdict(found) for key, found in counts.items()},
        "launched": launched,
        "stored": {method.name: method.stored for method in methods if method.stored is not None},
        "times": {column: rounds.record(reference_of(column)) for column, rounds in times.items()},
        "refused": refused,
    }


def report(options: argparse.Namespace) -> None:
    """Measure every backbone, print and save.

    Raises:
        SteerError: an option that cannot be used, or a folder that cannot be written.
    """
    if options.compile:
        compile_apart()
    for name in options.backbone:
        shape = SHAPES[name]
        base = shape.build(tiny=options.quick, device=options.device, dtype=DTYPES[options.dtype])
        rank = min(options.rank, *rs.find_backbone(base).widths)
        methods, refused = build(name, shape, base, rank)
        length = options.length or (8 if options.quick else LENGTHS[name])
        inputs = shape.batch(base, options.rows, length)
        print(f"{shape.about}: {len(methods)} methods, a batch of {' × '.join(map(str, inputs.shape))}", flush=True)
        counts = counted(shape, methods, inputs, refused)
        methods = [method for method in methods if method.name in counts or method.name == FROZEN]
        launched = launches(shape, methods, inputs)
        times = timed(shape, methods, inputs, options, refused)
        about = {"shape": shape.about, "batch": list(inputs.shape), "rank": rank}
        record = recorded(options, about, base, methods, counts, launched, times, refused)
        kind = torch.device(options.device).type
        stem = f"cost-{name}-{kind}" + f"-{options.dtype}" * (options.dtype != "fp32") + "-compiled" * options.compile
        save_json(record, options.output / f"{stem}.json", options.device)
        print(f"\n{table(record)}\n", flush=True)


def counted(shape: Shape, methods: Sequence[Method], inputs: Tensor, refused: dict[str, str]) -> dict[str, Counts]:
    """Count what a training step costs; a method that fails goes to `refused`, and the frozen model has no step."""
    found = {}
    for method in methods:
        if method.name == FROZEN:
            continue
        try:
            found[method.name] = count(method.model, partial(shape.loss, method.model, inputs), inputs)
        except Exception as error:
            if method.name in (FLOOR, OURS):
                raise
            refused[method.name] = why(error)
    return found


@torch.no_grad()
def launches(shape: Shape, methods: Sequence[Method], inputs: Tensor) -> dict[str, int]:
    """Return how many operations a forward pass launches."""
    return {m.name: operations(partial(shape.prefill, m.model, inputs)) for m in methods if m.name not in (FLOOR, FULL)}


def timed(
    shape: Shape, methods: Sequence[Method], inputs: Tensor, options: argparse.Namespace, refused: dict[str, str]
) -> dict[str, Rounds]:
    """Time a training step, prefill and, where there is a cache, one step of decoding at each number of rows."""
    compiled = partial(torch.compile, disable=not options.compile)

    def step(call: Callable[..., Any], model: nn.Module, _: Any) -> None:
        shape.loss(call, inputs).backward()
        model.zero_grad()

    learning = [Variant(m.name, partial(step, compiled(m.model), m.model)) for m in methods if m.name != FROZEN]
    running = [m for m in methods if m.name not in (FLOOR, FULL)]  # full fine-tuning runs as the frozen model does
    found = {"step": _play("step", learning, options, refused)}
    with torch.no_grad():
        prefill = [Variant(m.name, partial(_prefill, shape, compiled(m.model), inputs)) for m in running]
        found["prefill"] = _play("prefill", prefill, options, refused)
        for rows in DECODED if shape.cache is not None else ():
            column = f"decode, {rows} row{'s' * (rows > 1)}"
            variants = decoding(shape, running, inputs[:1].expand(rows, -1), options, refused)
            found[column] = _play(column, variants, options, refused, times=3)
    return found


def decoding(
    shape: Shape, methods: Sequence[Method], inputs: Tensor, options: argparse.Namespace, refused: dict[str, str]
) -> list[Variant]:
    """Return what decodes one token behind `inputs`.

    Every measurement begins with a copy of the same cache. Under `--compile` each method writes on into a cache of a
    fixed size of its own instead, since the graph of a CUDA device is recorded over one place in memory.
    """
    room = inputs.shape[1] + 3 * options.rounds + 8
    frozen = None if options.compile else shape.cached(methods[0].model, inputs)
    variants = []
    for method in methods:
        try:
            cache = frozen
            if options.compile:
                cache = shape.cached(method.model, inputs, **shape.static(method.reader, room))
            elif method.own:
                cache = shape.cached(method.model, inputs)
        except Exception as error:
            refused[f"{method.name}, decoding"] = why(error)
            continue
        call = torch.compile(method.reader, mode="reduce-overhead") if options.compile else method.reader
        before = (lambda cache=cache: cache) if options.compile else partial(shape.fresh, cache)
        variants.append(Variant(method.name, partial(_decode, shape, call, inputs[:, :1]), before))
    return variants


def _prefill(shape: Shape, call: Callable[..., Any], inputs: Tensor, _: Any) -> None:
    shape.prefill(call, inputs)


def _decode(shape: Shape, call: Callable[..., Any], token: Tensor, cache: Any) -> None:
    shape.decode(call, token, cache)


def _play(
    column: str, variants: Sequence[Variant], options: argparse.Namespace, refused: dict[str, str], times: int = 1
) -> Rounds:
    """Time what runs; the first run of each, which may fail, is not measured."""
    usable = []
    for variant in variants:
        try:
            variant.run(variant.before())
            usable.append(variant)
        except Exception as error:
            if variant.name in (FROZEN, FLOOR, OURS):
                raise
            refused[f"{variant.name}, {column}"] = why(error)
    return play(usable, times * options.rounds, warmup=0, device=options.device, progress=column)


def reference_of(column: str) -> str:
    """Return what a column's times are multiples of."""
    return FLOOR if column == "step" else FROZEN


def table(record: dict[str, Any]) -> str:
    """Return a Markdown table; a dash where a method has no such number, and what was refused below."""
    times, counts, launched, stored = (record[key] for key in ("times", "counts", "launched", "stored"))
    heads = ["method", "trainable", "stored, MB", "saved ÷ floor", "peak ÷ floor", "FLOPs ÷ floor", "operations"]
    heads += [f"{column} ÷ {reference_of(column)}" for column in times]
    lines = []
    for name in (FROZEN, *counts):
        cells = ["–"] * 6
        if name in counts:
            own, least = counts[name], counts[FLOOR]
            cells[0] = f"{own['trainable']:,}"
            cells[2:5] = [f"{own[key] / least[key]:.3f}" for key in ("saved", "peak", "flops")]
        if name in stored:
            cells[1] = f"{stored[name] / 1e6:.2f}"
        if name in launched:
            blocks = record["blocks"]
            more = (launched[name] - launched[FROZEN]) / blocks
            cells[5] = f"{launched[FROZEN] / blocks:.1f}" if name == FROZEN else f"{more:+.1f}"
        for measured in times.values():
            cells.append(ratio(measured[name]["ratio"]) if name in measured else "–")
        lines.append([name, *cells])
    return "\n".join(
        [markdown(heads, lines), "", *(f"- {name}: {reason}" for name, reason in record["refused"].items())]
    )


def ratio(found: dict[str, float]) -> str:
    """Write a median and its quartiles."""
    return f"{found['median']:.3f} ({found['low']:.3f}–{found['high']:.3f})"


if __name__ == "__main__":
    sys.exit(main())
