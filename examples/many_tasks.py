"""Serve many tasks from one frozen backbone, in one batch: every row is steered by the field of its own task.

    python examples/serve_many_tasks.py

A small GPT-2 and a small Mamba, pre-trained on Python's own source, get a field for each of three other kinds of text,
a small ViT that knows the digits 0–4 a field, with a head of its own, for each of three questions about all ten. The
fields are trained one by one and saved. Then a fresh backbone loads them all, and the script shows that

- each row is served by its task's field: a table of every task under every field;
- a row of a mixed batch gets what it would get in a batch of its own, in scoring and in cached generation;
- one mixed batch takes less time than one batch after another;
- fields can also be added up with weights, for a task that none was trained for.

The same lines do it for the Transformer, the SSM and the ViT. No network and no GPU are needed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from backbone_cache import default_cache
from hub_tasks import quiet_libraries
from small_backbones import LENGTH
from tasks import Task, seeded, small_tasks, some, with_new_head
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset, default_collate

import residual_steer as rs
from report import aligned, rule
from residual_steer.data import ByteBlocks, digits, english_prose, python_source
from residual_steer.training import evaluate

BATCH = 16  # rows of the mixed batch
PROMPT, NEW = 24, 32  # bytes that are read and bytes that are generated; GPT-2 has 64 positions
PAIRS = 9  # how often the mixed batch is timed against separate ones
TOLERANCE = 1e-5  # of the largest output: the same sums in another order


@dataclass(frozen=True)
class Served:
    """What came out for one backbone.

    Attributes:
        metric: by task and field, in the task's unit; the field None is the frozen model.
        scoring: largest difference of a row of a mixed batch from the same row in a batch of its own, as a share of
            the largest output.
        generation: the same for the logits of cached generation; None for images.
        ratio: time of a mixed batch ÷ time of separate batches, scoring.
        generation_ratio: the same for generation; None for images.
    """

    metric: dict[tuple[str, str | None], float]
    scoring: float
    generation: float | None
    ratio: float
    generation_ratio: float | None


def main(arguments: list[str] | None = None) -> int:
    """Run the example; return the exit status."""
    try:
        serve_all(parse(arguments))
    except rs.SteerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--rank", type=int, default=16, help="rank of the steering fields")
    parser.add_argument("--seed", type=int, default=0, help="of new heads, new fields and the data's order")
    parser.add_argument("--out", type=Path, default=Path("runs/serve_many_tasks"), help="folder for the fields")
    parser.add_argument("--cache", type=Path, default=default_cache(), help="folder of the pre-trained backbones")
    parser.add_argument("--quick", action="store_true", help="tiny backbones and few steps: a test, no result")
    return parser.parse_args(arguments)


def serve_all(options: argparse.Namespace) -> dict[str, Served]:
    """Train, save, load and serve fields on every backbone; return what came out for each.

    Raises:
        SteerError: a row was not served as it would be alone, or a folder or option cannot be used.
    """
    started = time.perf_counter()
    quiet_libraries()
    found = {}
    for small in small_tasks(options.cache, options.quick):
        base = replace(small, steps=4) if options.quick else small
        tasks = texts(base) if base.kind == "text" else questions(base)
        steps = f"each trained for {base.steps} steps of {base.batch}"
        print(f"\n{base.backbone}: {len(tasks)} fields, {steps}, saved, and loaded on a fresh backbone", flush=True)
        folders = train_fields(tasks, options)
        model = seeded(next(iter(tasks.values())), options.seed)
        for folder in folders:
            rs.load(model, folder)
        print(rs.summary(model).fields)
        found[base.backbone] = serve(model.eval(), tasks, base, pairs=2 if options.quick else PAIRS)
    print(f"\n{time.perf_counter() - started:.0f} s; the fields are in {options.out}")
    return found


def texts(base: Task) -> dict[str, Task]:
    """Return three kinds of text that are not what the backbone was pre-trained on."""
    prose, source = english_prose(), python_source(1_000_000)
    kinds = {
        "prose": prose,
        "capitals": source.upper(),
        "backwards": b"\n".join(line[::-1] for line in source.split(b"\n")),
    }
    return {name: on_text(base, name, text) for name, text in kinds.items()}


def on_text(base: Task, name: str, text: bytes) -> Task:
    """Return a task like `base` on another text."""
    blocks = ByteBlocks(text, LENGTH, "train"), some(ByteBlocks(text, LENGTH, "valid"), 128)
    return replace(base, about=name, train=blocks[0], valid=blocks[1])


def questions(base: Task) -> dict[str, Task]:
    """Return three questions about the same pictures; to each belongs a head with the answers no and yes."""
    yes = {"odd": {1, 3, 5, 7, 9}, "above four": {5, 6, 7, 8, 9}, "has a loop": {0, 6, 8, 9}}
    backbone = base.fresh()

    def about(digit: set[int], split: str) -> TensorDataset:
        images, labels = digits(split=split).tensors
        return TensorDataset(images, torch.isin(labels, torch.tensor(sorted(digit))).long())

    return {
        name.replace(" ", "-"): replace(
            base,
            about=name,
            fresh=lambda: with_new_head(backbone, classes=2),
            train=about(digit, "train"),
            valid=about(digit, "valid"),
        )
        for name, digit in yes.items()
    }


def train_fields(tasks: dict[str, Task], options: argparse.Namespace) -> list[Path]:
    """Train a field for every task, each on a backbone of its own, and save it; return the folders."""
    folders = []
    for name, task in tasks.items():
        model = seeded(task, options.seed)
        rs.steer(model, rank=options.rank, name=name, train=[task.head] if task.head else [])
        train, _ = task.loaders()
        rs.fit(model, train, steps=task.steps, lr=task.rates["H-Res"], seed=options.seed, progress=False)
        folders.append(rs.save(model, options.out / task.backbone.lower() / name))
    return folders


def serve(model: nn.Module, tasks: dict[str, Task], base: Task, pairs: int) -> Served:
    """Show what a steered model with a field for every task does with a mixed batch.

    Raises:
        SteerError: a row was not served as it would be alone.
    """
    everything = tasks | ({"Python": on_text(base, "Python", python_source(1_000_000))} if base.kind == "text" else {})
    metric = measure_all(model, everything, [None, *tasks])
    print(f"\n{table(metric, base)}\n")

    # From here on it is one batch: rows of all tasks in turn, and after them None, which is the frozen model.
    fields: list[str | None] = [[*tasks, None][row % (len(tasks) + 1)] for row in range(BATCH)]
    data = [everything.get(name or "Python", next(iter(tasks.values()))).valid for name in fields]
    inputs = batch_of(data)
    print(f"One batch of {BATCH} rows under rs.use(model, [{', '.join(map(repr, fields[:4]))}, …]):")
    scoring = largest_difference(model, fields, lambda rows: logits(model, inputs[rows]))
    ratio = mixed_to_separate(model, fields, lambda rows: logits(model, inputs[rows]), pairs)
    say("scoring", scoring, ratio)
    generation = generation_ratio = None
    if base.kind == "text":
        prompts = inputs[:, :PROMPT]
        generation = largest_difference(model, fields, lambda rows: generated_logits(model, prompts[rows]))
        generation_ratio = mixed_to_separate(model, fields, lambda rows: generated_logits(model, prompts[rows]), pairs)
        say(f"cached generation of {NEW} bytes", generation, generation_ratio)
        show_one_prompt(model, list(tasks))
        show_weights(model, on_text(base, "prose in capitals", english_prose().upper()))
    return Served(metric, scoring, generation, ratio, generation_ratio)


@torch.no_grad()
def logits(model: nn.Module, inputs: Tensor) -> Tensor:
    """Return the logits of a batch, `(rows, …)`."""
    output = model(inputs)
    return getattr(output, "logits", output)


@torch.no_grad()
def generate(model: Any, prompts: Tensor, **more: Any) -> Any:
    """Generate with the cache, greedily unless told otherwise; return what transformers' `generate` returns."""
    return model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=NEW,
        min_new_tokens=NEW,
        use_cache=True,
        output_logits=True,
        return_dict_in_generate=True,
        **{"do_sample": False, **more},
    )


def generated_logits(model: nn.Module, prompts: Tensor) -> Tensor:
    """Return the logits of every generated byte, `(rows, new, vocabulary)`."""
    return torch.stack(generate(model, prompts).logits, dim=1)


def batch_of(data: Sequence[Dataset[Any]]) -> Tensor:
    """Return one input from each data set, another one each time a data set comes again."""
    pairs = [each[(7 * row) % len(each)] for row, each in enumerate(data)]
    batch = default_collate(pairs)
    return batch["input_ids"] if isinstance(batch, dict) else batch[0]


def measure_all(
    model: nn.Module, tasks: dict[str, Task], fields: Sequence[str | None]
) -> dict[tuple[str, str | None], float]:
    """Measure every task under every field."""
    found = {}
    for field in fields:
        with rs.use(model, field):
            for name, task in tasks.items():
                found[name, field] = task.metric(evaluate(model, DataLoader(task.valid, batch_size=64)))
    return found


def largest_difference(model: nn.Module, fields: Sequence[str | None], run: Callable[[list[int]], Tensor]) -> float:
    """Run a mixed batch, and each field's rows alone; return the largest difference as a share of the largest output.

    Raises:
        SteerError: it is larger than rounding explains.
    """
    with rs.use(model, list(fields)):
        mixed = run(list(range(len(fields))))
    worst = 0.0
    for field, rows in by_field(fields).items():
        with rs.use(model, field):
            worst = max(worst, (run(rows) - mixed[rows]).abs().max().item())
    worst /= max(1.0, mixed.abs().max().item())
    if not worst <= TOLERANCE:
        raise rs.SteerError(f"rows of a mixed batch differ from separate runs by {worst:.1e} of the largest output.")
    return worst


def mixed_to_separate(
    model: nn.Module, fields: Sequence[str | None], run: Callable[[list[int]], Tensor], pairs: int
) -> float:
    """Time a mixed batch and its rows in one batch per field, `pairs` times in turns; return the ratios' median."""

    def mixed() -> None:
        rs.use(model, list(fields))
        run(list(range(len(fields))))

    def separate() -> None:
        for field, rows in by_field(fields).items():
            rs.use(model, field)
            run(rows)

    ratios = []
    for _ in range(pairs):
        seconds = []
        for work in (mixed, separate):
            started = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - started)
        ratios.append(seconds[0] / seconds[1])
    return statistics.median(ratios)


def by_field(fields: Sequence[str | None]) -> dict[str | None, list[int]]:
    """Return the rows of each field."""
    return {field: [row for row, own in enumerate(fields) if own == field] for field in dict.fromkeys(fields)}


def table(metric: dict[tuple[str, str | None], float], base: Task) -> str:
    """Return a Markdown table of tasks under fields, the best of each row in bold."""
    names, fields = list(dict.fromkeys(name for name, _ in metric)), list(dict.fromkeys(field for _, field in metric))
    best, arrow, places = (min, "↓", 2) if base.kind == "text" else (max, "↑", 1)
    heads = ["backbone", f"{base.unit} {arrow}", *(f"{field}" if field else "frozen (None)" for field in fields)]
    rows = []
    for name in names:
        texts = [f"{metric[name, field]:.{places}f}" for field in fields]
        winner = best(texts, key=float)
        rows.append([base.backbone, name, *(f"**{text}**" if text == winner else text for text in texts)])
    widths = [max(len(row[i]) for row in [heads, *rows]) for i in range(len(heads))]
    lines = [aligned(heads, widths), "|" + "|".join(rule(i, width) for i, width in enumerate(widths)) + "|"]
    return "\n".join(lines + [aligned(row, widths) for row in rows])


def say(what: str, difference: float, ratio: float) -> None:
    """Print how a mixed batch compares with separate ones."""
    exactly = f"{difference:.0e} of the largest output" if difference else "0, bit for bit the same"
    print(f"  {what}")
    print(f"    largest difference from one batch per field: {exactly}")
    print(f"    time: {ratio:.2f} of that of one batch per field, one after another", flush=True)


def show_one_prompt(model: nn.Module, names: Sequence[str]) -> None:
    """Give every field the same prompt, in one batch, and print what each goes on with."""
    prompt = b"# The name of "
    rows: list[str | None] = [*names, None]
    torch.manual_seed(0)
    with rs.use(model, rows):
        made = generate(model, torch.tensor([list(prompt)] * len(rows)), do_sample=True, top_k=4)
    print(f"  the same prompt on every row, {prompt.decode()!r}; it goes on (sampled):")
    for name, ids in zip(rows, made.sequences, strict=True):
        print(f"    {name or 'None':>10}: {bytes(ids[len(prompt) :].tolist()).decode(errors='replace')!r}")


def show_weights(model: nn.Module, task: Task) -> None:
    """Measure a text that no field was trained for under weighted sums of fields."""
    print(f"  {task.about}, which no field was trained for; {task.unit} ↓:")
    for mix in (None, "prose", "capitals", {"prose": 0.5, "capitals": 0.5}, {"prose": 0.5, "capitals": 1.0}):
        with rs.use(model, mix):
            measured = task.metric(evaluate(model, DataLoader(task.valid, batch_size=64)))
        print(f"    rs.use(model, {mix!r}): {measured:.2f}")


if __name__ == "__main__":
    sys.exit(main())
