"""What steering costs: a training step against the floor, prefill and decoding against the frozen model.

    python benchmarks/cost.py
    python benchmarks/cost.py --backbone mamba --rounds 20

The floor of a training step is the forward pass of the frozen model, and the backward pass to what leaves its first
block: whatever learns beside that block needs as much. Steering, PEFT's LoRA and full fine-tuning take turns with it
(see residual_steer.study), with random weights of well-known shapes. Beside the times stand counts, which no clock
disturbs.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import residual_steer as rs
from contenders import has_peft
from output import exit_status, markdown, save_json
from residual_steer.study.counters import Counts, count
from residual_steer.study.rounds import Rounds, Variant, play
from shapes import SHAPES, Shape

SITES = ("block", "mixer", "mlp", "input")
USUAL = {"gpt2": ["c_attn"], "vit": ["qkv"], "mamba": ["in_proj", "x_proj"]}
AIMS = {"step": 1.03, "saved": 1.02, "prefill": 1.02, "decode": 1.05}


@dataclass(frozen=True)
class Method:
    """One way to adapt a backbone.

    Attributes:
        name: as in the table.
        model: prepared; what trains requires a gradient.
    """

    name: str
    model: nn.Module


@dataclass(frozen=True)
class Row:
    """What was found for one method.

    Attributes:
        counts: of a training step; None for the frozen model, which has none.
        saved: bytes kept for the backward pass, as a multiple of the floor's.
        flops: as a multiple of the floor's.
    """

    counts: Counts | None
    saved: float | None
    flops: float | None


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; return the exit status."""
    return exit_status(lambda: report(parse(arguments)))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    results = Path(__file__).parent / "results"
    parser.add_argument("--backbone", choices=SHAPES, nargs="+", default=tuple(SHAPES), help="whose shapes")
    parser.add_argument("--rank", type=int, default=32, help="of fields and adapters")
    parser.add_argument("--rows", type=int, default=2, help="of the batch")
    parser.add_argument("--length", type=int, help="tokens of a row; 64 for GPT-2, 16 for Mamba")
    parser.add_argument("--rounds", type=int, default=10, help="of each measurement")
    parser.add_argument("--threads", type=int, help="of PyTorch on the CPU")
    parser.add_argument("--device", default="cpu", help="as PyTorch names it")
    parser.add_argument("--tiny", action="store_true", help="tiny backbones: a test, no result")
    parser.add_argument("--output", type=Path, default=results, help="folder for JSON files and tables")
    return parser.parse_args(arguments)


def report(options: argparse.Namespace) -> None:
    """Measure every backbone, print and save.

    Raises:
        SteerError: an option that cannot be used, or a folder that cannot be written.
    """
    if min(options.rank, options.rows, options.rounds) < 1:
        raise rs.SteerError(
            f"--rank, --rows and --rounds are 1 or more; received {options.rank}, {options.rows}, {options.rounds}."
        )
    if options.threads:
        torch.set_num_threads(options.threads)
    for name in options.backbone:
        shape = SHAPES[name]
        methods = build(name, shape, options)
        inputs = shape.batch(methods[0].model, options.rows, options.length)
        print(f"{shape.about}: {len(methods)} methods, a batch of {' × '.join(map(str, inputs.shape))}", flush=True)
        rows = counted(shape, methods, inputs)
        times = timed(shape, methods, inputs, options)
        text = table(methods, rows, times)
        record = {
            "options": {key: value for key, value in vars(options).items() if key != "output"},
            "shape": shape.about,
            "batch": list(inputs.shape),
            "aims": AIMS,
            "counts": {key: asdict(row.counts) for key, row in rows.items() if row.counts is not None},
            "times": {key: rounds.record(reference_of(key)) for key, rounds in times.items()},
        }
        stem = f"cost-{name}-{torch.device(options.device).type}"
        save_json(record, options.output / f"{stem}.json", options.device)
        (options.output / f"{stem}.md").write_text(text + "\n")
        print(f"\n{text}\n", flush=True)


def build(name: str, shape: Shape, options: argparse.Namespace) -> list[Method]:
    """Return the frozen model, the floor, and every method that there is for this backbone."""

    def fresh() -> nn.Module:
        model = shape.build(tiny=options.tiny, device=options.device)
        for module in model.modules():
            if hasattr(module, "use_mambapy"):
                module.use_mambapy = True  # the linear scan for everybody: what is compared is not the scan
        return model

    methods = [Method("frozen", fresh()), Method("floor", _floor(fresh()))]
    rank = min(options.rank, *rs.find_backbone(methods[0].model).widths)
    for site in SITES:
        if site in rs.find_backbone(methods[0].model).sites:
            methods.append(Method(f"H-Res, {site}", _steered(fresh(), site, rank)))
    if has_peft():
        methods.append(Method(f"LoRA on {', '.join(USUAL[name])}", _lora(fresh(), USUAL[name], rank)))
        if name != "mamba":  # where PEFT refuses out_proj, and an adapter on dt_proj is never run in training
            methods.append(Method("LoRA on all linear layers", _lora(fresh(), "all-linear", rank)))
    methods.append(Method("full fine-tuning", fresh().requires_grad_(True)))
    return methods


def _floor(model: nn.Module) -> nn.Module:
    """Let what leaves the first block require a gradient, as if something beside it were learning."""
    backbone = rs.find_backbone(model)
    backbone.blocks[0].register_forward_hook(
        lambda _, args, output: backbone.write(output, lambda z: z.detach().requires_grad_(torch.is_grad_enabled()))
    )
    return model


def _steered(model: nn.Module, site: str, rank: int) -> nn.Module:
    rs.steer(model, rank=rank, site=site)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in rs.parameters(model):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model


def _lora(model: nn.Module, targets: Sequence[str] | str, rank: int) -> nn.Module:
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(model, peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=targets)).eval()


def loss_of(shape: Shape, model: nn.Module, inputs: Tensor) -> Tensor:
    """Return the loss of a batch: of the next token, or of a class."""
    if shape.length is None:
        return F.cross_entropy(model(inputs), torch.arange(len(inputs), device=inputs.device))
    return model(input_ids=inputs, labels=inputs).loss


def counted(shape: Shape, methods: Sequence[Method], inputs: Tensor) -> dict[str, Row]:
    """Count what a training step of each method costs."""
    found: dict[str, Row] = {methods[0].name: Row(None, None, None)}
    floor = count(methods[1].model, lambda: loss_of(shape, methods[1].model, inputs), inputs)
    for method in methods[1:]:
        counts = count(method.model, lambda method=method: loss_of(shape, method.model, inputs), inputs)
        found[method.name] = Row(counts, counts.saved / floor.saved, counts.flops / floor.flops)
    return found


def timed(shape: Shape, methods: Sequence[Method], inputs: Tensor, options: argparse.Namespace) -> dict[str, Rounds]:
    """Time a training step, prefill and, where there is a cache, one step of decoding."""

    def step(method: Method) -> Callable[[Any], object]:
        def run(_: Any) -> None:
            loss_of(shape, method.model, inputs).backward()
            method.model.zero_grad()

        return run

    def without_gradient(run: Callable[[Any], object]) -> Callable[[Any], object]:
        return torch.no_grad()(run)

    learning, running = methods[1:], [method for method in methods if method.name != "floor"]
    found = {"step": play([Variant(m.name, step(m)) for m in learning], options.rounds, device=options.device)}
    prefill = [Variant(m.name, without_gradient(lambda _, m=m: shape.prefill(m.model, inputs))) for m in running[:-1]]
    found["prefill"] = play(prefill, options.rounds, device=options.device)
    if shape.cache is not None:
        with torch.no_grad():
            cache = shape.cached(methods[0].model, inputs)
        decode = [
            Variant(
                m.name,
                without_gradient(lambda cache, m=m: shape.decode(m.model, inputs[:, :1], cache)),
                lambda: shape.fresh(cache),
            )
            for m in running[:-1]
        ]
        found["decode"] = play(decode, 3 * options.rounds, device=options.device)
    return found


def reference_of(column: str) -> str:
    """Return what a column's times are multiples of."""
    return "floor" if column == "step" else "frozen"


def table(methods: Sequence[Method], rows: dict[str, Row], times: dict[str, Rounds]) -> str:
    """Return a Markdown table; a dash where a method has no such number."""
    heads = ["method", "trainable", "saved ÷ floor", "FLOPs ÷ floor", "operations"]
    heads += [f"{column} ÷ {reference_of(column)}" for column in times]
    lines = []
    for method in methods:
        row = rows[method.name]
        cells = ["–"] * 4
        if row.counts is not None and row.saved is not None and row.flops is not None:
            cells = [
                f"{row.counts.trainable:,}",
                f"{row.saved:.3f}",
                f"{row.flops:.3f}",
                f"{row.counts.operations:,}",
            ]
        for column, rounds in times.items():
            there = method.name in rounds.seconds
            cells.append(f"{rounds.ratio(method.name, reference_of(column)):.3f}" if there else "–")
        lines.append([method.name, *cells])
    return markdown(heads, lines)


if __name__ == "__main__":
    sys.exit(main())
