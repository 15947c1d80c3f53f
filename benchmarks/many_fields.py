"""The time of one batch under many fields, one per row, against the time under one field.

    python benchmarks/many_fields.py
    python benchmarks/many_fields.py --backbone mamba --rounds 20
    python benchmarks/many_fields.py --held 1000 --rank 8

A frozen backbone of a well-known shape, with random weights, holds 32 fields with random weights, or up to 1,000. A
batch of 32 rows is run under none, under one, and under 1 to 32 of them with the rows dealt round robin, or all rows
under a weighted sum: once as prefill, once as one cached step of decoding, every time from a copy of the same cache.
All variants take turns (see rounds.py), and are checked once before: what is timed is what it is called. On GPT-2,
PEFT's LoRA with one adapter per row (`adapter_names`) is timed in the same rounds, if PEFT is installed. Besides: how
long it takes to add the first and the last field and to select, and how much memory the fields take.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import residual_steer as rs
from contenders import Contender, adapters, add_fields, fields, has_peft
from output import exit_status, markdown, save_json
from rounds import Rounds, Variant, play
from shapes import SHAPES, Shape

COUNTS, PEER_COUNTS = (1, 2, 4, 8, 16, 32), (1, 8, 16, 32)
TOLERANCE = 1e-4  # of the largest output: the rows of another batch are rounded otherwise
MOVED = 1e-3  # of the largest output: less, and one field could hardly be told from another
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
PHASES = ("prefill", "decode")


@dataclass(frozen=True)
class Setting:
    """What is run.

    Attributes:
        shape: of the backbone.
        model: the steered model.
        contenders: what to time.
        inputs: the batch.
        token: the token that is decoded, `(rows, 1)`; None for images.
        cache: what the frozen model keeps of `inputs`; every measurement starts from a copy. None for images.
        added: the seconds that each field took to add.
        taken: the bytes that the process grew by, with all fields.
    """

    shape: Shape
    model: nn.Module
    contenders: Sequence[Contender]
    inputs: Tensor
    token: Tensor | None
    cache: Any
    added: Sequence[float]
    taken: int

    def before(self, phase: str, contender: Contender) -> Any:
        """Make a contender's selection, and return what `run` writes into: a copy of the cache, or nothing."""
        contender.select()
        return self.shape.fresh(self.cache) if phase == "decode" else None

    def run(self, phase: str, contender: Contender, cache: Any = None) -> Tensor:
        """Return the logits of the whole batch."""
        if phase == "decode":
            return self.shape.decode(contender.call, self.token, cache, **contender.more)
        return self.shape.prefill(contender.call, self.inputs, **contender.more)

    def alone(self, phase: str, contender: Contender, name: str, rows: list[int]) -> Tensor:
        """Return the logits of some rows under one field, or adapter, that all of them share."""
        contender.choose(name)
        if phase == "decode":
            return self.shape.decode(contender.plain, self.token, self.shape.fresh(self.cache))[rows]
        return self.shape.prefill(contender.plain, self.inputs[rows])


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
    parser.add_argument("--rank", type=int, default=32, help="of every field and adapter")
    parser.add_argument("--held", type=int, help="fields that the model holds; the largest of --counts")
    parser.add_argument("--rows", type=int, default=32, help="of the batch")
    parser.add_argument("--length", type=int, help="tokens of a row; 64 for GPT-2 and Mamba")
    parser.add_argument("--counts", type=int, nargs="+", default=COUNTS, help="numbers of fields in one batch, by row")
    parser.add_argument("--weighted", type=int, nargs="*", default=(8,), help="numbers of fields with weights")
    parser.add_argument("--phases", choices=PHASES, nargs="+", default=PHASES, help="what to time")
    parser.add_argument("--rounds", type=int, default=10, help="of prefill; three times as many of decoding")
    parser.add_argument("--threads", type=int, help="of PyTorch on the CPU")
    parser.add_argument("--device", default="cpu", help="as PyTorch names it")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: time of this process on all its threads")
    parser.add_argument("--compile", action="store_true", help="time compiled models, without PEFT and decoding")
    parser.add_argument(
        "--quick", "--tiny", dest="tiny", action="store_true", help="a tiny backbone: a test, no result"
    )
    parser.add_argument("--output", type=Path, default=results, help="folder for the JSON file and the table")
    return parser.parse_args(arguments)


def report(options: argparse.Namespace) -> None:
    """Build, check, time, print and save.

    Raises:
        SteerError: an option that cannot be used, a check that fails, or a folder that cannot be written.
    """
    if options.threads:
        torch.set_num_threads(options.threads)
    with torch.no_grad():
        setting = build(options)
        print(f"checking {len(setting.contenders)} variants of {setting.shape.about}", flush=True)
        phases = phases_of(setting, options)
        check(setting, phases)
        measured = {phase: measure(setting, phase, options) for phase in phases}
        calls = selections(setting, options)
    text = tables(setting, measured, calls, options)
    kind = torch.device(options.device).type
    held = f"-{options.held}" if options.held else ""
    stem = f"many_fields-{options.backbone}-{kind}{held}{'-compiled' * options.compile}"
    record = {
        "options": {key: value for key, value in vars(options).items() if key != "output"},
        "shape": setting.shape.about,
        "batch": list(setting.inputs.shape),
        "unit": "seconds of wall-clock time" if options.clock == "wall" else "seconds of processor time",
        "results": {phase: record_of(setting, rounds) for phase, rounds in measured.items()},
        "use": calls.record("one field"),
        "held": growth(setting),
    }
    save_json(record, options.output / f"{stem}.json", options.device)
    (options.output / f"{stem}.md").write_text(text + "\n")
    print(f"\n{text}\n\n{stem}.json and {stem}.md are in {options.output}")


def build(options: argparse.Namespace) -> Setting:
    """Return the models, their batch and its cache.

    Raises:
        SteerError: a number below 1, or a rank that is too large.
    """
    numbers = [options.rank, options.rows, options.rounds, *options.counts, *options.weighted]
    acting = max(*options.counts, *options.weighted, 1)
    held = options.held or acting
    if min(numbers) < 1 or (options.length or 2) < 2 or max(options.counts) > options.rows or held < acting:
        raise rs.SteerError(
            "--rank, --rows, --rounds and --counts are 1 or more, --length 2 or more, there is a row for every field, "
            f"and --held are no fewer than act; received {numbers}, {options.length} and {held}."
        )
    shape = SHAPES[options.backbone]
    model = shape.build(tiny=options.tiny, device=options.device)
    before = resident()
    added = add_fields(model, held, options.rank)
    taken = resident() - before
    contenders = fields(model, options.counts, options.weighted, options.rows, options.compile)
    if options.backbone == "gpt2" and has_peft() and not options.compile:
        peers = [count for count in PEER_COUNTS if count <= max(options.counts)]
        contenders += adapters(shape.build(tiny=options.tiny, device=options.device), peers, options.rows, options.rank)
    inputs = shape.batch(model, options.rows, options.length)
    token = cache = None
    if shape.cache is not None:
        rs.use(model, None)
        token, cache = inputs[:, :1], shape.cached(model, inputs)
    return Setting(shape, model, contenders, inputs, token, cache, added, taken)


def resident() -> int:
    """Return the bytes of memory that this process has, 0 where the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def growth(setting: Setting) -> dict[str, float]:
    """Return how many fields are held, what adding them took at both ends, and what they take, in seconds and bytes.

    The first field also freezes the model; so what is compared with the last ones are those that came next.
    """
    every = rs.fields(setting.model)
    window = min(10, max(1, len(setting.added) - 1))
    return {
        "fields": len(every),
        "add_first": statistics.median(setting.added[1 : 1 + window] or setting.added),
        "add_last": statistics.median(setting.added[-window:]),
        "weights": 4 * every[0].parameters,
        "taken": setting.taken / len(every),
    }


def phases_of(setting: Setting, options: argparse.Namespace) -> list[str]:
    """Return what can be timed: images are not decoded, nor is a cache that grows compiled."""
    return [
        phase for phase in options.phases if phase == "prefill" or (setting.cache is not None and not options.compile)
    ]


def check(setting: Setting, phases: Sequence[str]) -> None:
    """Hold every variant against what it is called, by other means.

    Raises:
        SteerError: a row's output is not what its field gives on its own, a weighted sum is none, or fields do nothing.
    """
    off = setting.contenders[0]
    for phase in phases:
        frozen = setting.run(phase, off, setting.before(phase, off))
        for contender in setting.contenders:
            if isinstance(contender.asked, list):
                check_rows(setting, phase, contender, frozen)
    for contender in setting.contenders:
        if isinstance(contender.asked, dict):
            check_weights(setting, contender, off)


def check_rows(setting: Setting, phase: str, contender: Contender, frozen: Tensor) -> None:
    """Hold the rows of a mixed batch against runs under one field each.

    Raises:
        SteerError: they differ, or are those of the frozen model.
    """
    mixed = setting.run(phase, contender, setting.before(phase, contender))
    size = frozen.abs().max().item()
    for name in dict.fromkeys(contender.asked):
        rows = [row for row, asked in enumerate(contender.asked) if asked == name]
        difference = (mixed[rows] - setting.alone(phase, contender, name, rows)).abs().max().item()
        if not difference <= TOLERANCE * size:
            raise rs.SteerError(
                f"{contender.name}, {phase}: rows of {name} differ by {difference:g} from {name} alone."
            )
        moved = (mixed[rows] - frozen[rows]).abs().max().item()
        if not moved >= MOVED * size:
            raise rs.SteerError(f"{contender.name}, {phase}: {name} moves the output by {moved:g} of {size:g} only.")


def check_weights(setting: Setting, contender: Contender, off: Contender) -> None:
    """Hold the stream that leaves the first block against the frozen one and Σ w·λ·H(z), by eq. 1 of arXiv 2606.24396.

    Raises:
        SteerError: they differ.
    """
    backbone = rs.find_backbone(setting.model)
    first, second = backbone.blocks[:2]
    streams: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        streams.append(backbone.read(args, kwargs).clone())

    handles = [block.register_forward_pre_hook(keep, with_kwargs=True) for block in (first, second)]
    try:
        for each in (off, contender):
            each.select()
            setting.shape.prefill(setting.model, setting.inputs[:2])
    finally:
        for handle in handles:
            handle.remove()
    z, frozen, _, mixed = streams
    acting = first.get_submodule("steering_block.fields")
    moved = sum(weight * acting[name].scale * acting[name](z) for name, weight in contender.asked.items())
    difference = (mixed - frozen - moved).abs().max().item()
    if not difference <= TOLERANCE * max(frozen.abs().max().item(), moved.abs().max().item()):
        raise rs.SteerError(f"{contender.name}: the first block differs by {difference:g} from the weighted sum.")


def measure(setting: Setting, phase: str, options: argparse.Namespace) -> Rounds:
    """Time every contender in turns."""
    rounds = options.rounds if phase == "prefill" else 3 * options.rounds
    print(f"timing {phase}: {rounds} rounds", flush=True)
    variants = [
        Variant(each.name, partial(setting.run, phase, each), partial(setting.before, phase, each))
        for each in setting.contenders
    ]
    return play(variants, rounds, device=options.device, clock=CLOCKS[options.clock])


def selections(setting: Setting, options: argparse.Namespace) -> Rounds:
    """Time the call of `use` itself."""
    own = [each for each in setting.contenders if each.reference == "one field"]
    variants = [Variant(each.name, lambda _, each=each: each.select()) for each in own]
    return play(variants, 3 * options.rounds, repeats=5, device=options.device, clock=CLOCKS[options.clock])


def record_of(setting: Setting, rounds: Rounds) -> dict[str, Any]:
    """Return one phase's numbers, each contender against its own reference."""
    found = {}
    for contender in setting.contenders:
        found[contender.name] = rounds.record(contender.reference)[contender.name]
    return found


def tables(setting: Setting, measured: dict[str, Rounds], calls: Rounds, options: argparse.Namespace) -> str:
    """Return the results as Markdown tables with notes."""
    own = [contender.name for contender in setting.contenders if contender.reference == "one field"]
    peers = [contender.name for contender in setting.contenders if contender.name not in own]
    heads = ["fields"] + [head for phase in measured for head in (f"{phase} (ms)", "÷ one field")] + ["use (µs)"]
    rows = []
    for name in own:
        cells = [name]
        for rounds in measured.values():
            cells += [f"{1e3 * rounds.time(name).median:.2f}", f"{rounds.ratio(name, 'one field'):.3f}"]
        rows.append([*cells, f"{1e6 * calls.time(name).median:.0f}"])
    parts = [markdown(heads, rows)]
    if peers:
        heads = ["PEFT's LoRA"]
        heads += [head for phase in measured for head in (f"{phase} (ms)", "÷ one adapter", "÷ as many fields")]
        rows = []
        for name in peers:
            same = name.removeprefix("PEFT: ").replace("one adapter", "one field")
            cells = [name.removeprefix("PEFT: ")]
            for rounds in measured.values():
                against = f"{rounds.ratio(name, same):.3f}" if same in own else "–"
                cells += [f"{1e3 * rounds.time(name).median:.2f}", f"{rounds.ratio(name, peers[0]):.3f}", against]
            rows.append(cells)
        parts.append(markdown(heads, rows))
    return "\n\n".join([*parts, notes(setting, options)])


def notes(setting: Setting, options: argparse.Namespace) -> str:
    """Say what the numbers are."""
    size = " × ".join(map(str, setting.inputs.shape))
    clock = "wall-clock time" if options.clock == "wall" else "processor time of all threads"
    what = f"a tiny model instead of {setting.shape.about}" if options.tiny else setting.shape.about
    held = growth(setting)
    lines = [
        f"{what}, random weights, fp32; a batch of {size}; fields of rank {options.rank} beside every block.",
        f"Medians of {options.rounds} interleaved rounds, {3 * options.rounds} for decoding and `use`, {clock}; ratios "
        "are taken within each round: their median, and their quartiles in brackets.",
        f"{held['fields']:,} fields stand, {held['weights'] / 1e6:.2f} MB of weights each, and the process grew "
        f"by {held['taken'] / 1e6:.2f} MB. Adding one took {1e3 * held['add_first']:.1f} ms at first and "
        f"{1e3 * held['add_last']:.1f} ms at last, medians of ten.",
        f"Every variant was checked first, row by row to {TOLERANCE:g} of the largest output.",
    ]
    if any(contender.plain is not setting.model for contender in setting.contenders):
        lines.append(f"PEFT's adapters: LoRA of rank {options.rank} on the attention's input, c_attn, of every block.")
    return "\n".join(f"- {line}" for line in lines)


if __name__ == "__main__":
    sys.exit(main())
