"""BENCHMARKS.md, made of the JSON files of all benchmarks.

python benchmarks/page.py
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import cost
import growth
import loreft
import ssm
import startup
from aims import against_lora, aims_of, closer
from charts import Axis, Measured, Plot, Series, draw, svg, words
from environment import hardware, read_json
from gpu.summary import write_page
from options import RESULTS
from output import exit_status, markdown
from residual_steer import SteerError
from residual_steer._files import make_folder, write_whole
from rounds import spread
from shapes import SHAPES

PAGE = Path(__file__).parents[1] / "BENCHMARKS.md"
OURS = (
    "closer-",
    "cost-",
    "growth-",
    "last_blocks-",
    "loreft-",
    "many_fields-",
    "prefix-",
    "ssm-",
    "startup-",
)  # of all files
COLUMNS = """\
- **trainable**: parameters that train. **stored**: bytes of the safetensors that the method's own `save` writes for a
  task; for full fine-tuning all weights.
- **saved**: bytes that autograd keeps between the forward and the backward pass, parameters and batch left out, by
  saved-tensor hooks; every storage once.
- **peak**: the most bytes that tensors made in a forward and backward pass take at one time, gradients included, by a
  dispatch mode that sees every storage come and go; the optimizer's state is left out (AdamW: 8 bytes for each
  trainable parameter), and what a kernel sets aside for itself. On CUDA it is the allocator's own count.
- **FLOPs**: of matrix products, forward and backward, by torch's counter.
- **operations**: kernels of a forward pass per block, of the frozen model, and what a method adds to that; views and
  memory that is set aside are none.
- **step**: forward and backward pass, without an optimizer. **prefill**: a forward pass that gives the logits of the
  next token. **decode**: one more token behind the batch's length, from a copy of a cache. Seconds are wall-clock
  time; all methods take turns in every round, the ratio is taken within the round, and what stands here is the median
  of these ratios with its quartiles.
- All counts are the same in every run; tests hold those of H-Res against closed forms.
- *The floor* of a step is the frozen model's forward pass, and its backward pass to what leaves the first block.
  Full fine-tuning reads and decodes as the frozen model does. All methods stand on one copy of the frozen weights."""
VERDICTS = """\
Times of a step, of prefill and of decoding are medians of many rounds in which H-Res and LoRA take turns with the floor
or the frozen model alone (`benchmarks/closer.py`), with an interval that holds the median in 95 of 100 cases; other
times stand with the quartiles of their rounds. A verdict is computed; "by the median" means that the interval, or the
quartiles, lie on both sides of the aim, so that the machine was too noisy to tell."""
NO_GPU = """\
No GPU was at hand, so there are no numbers. Where there is one,
`python benchmarks/bench.py --device cuda --dtype bf16 --compile` measures the same table there, with `torch.compile`
and CUDA graphs for decoding, and with the compiled `mamba_ssm` and `causal_conv1d` kernels if they are installed; its
files are named after the device, and this section then shows them."""


def main(arguments: list[str] | None = None) -> int:
    """Write the page; return the exit status."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON files")
    parser.add_argument("--page", type=Path, default=PAGE, help="what is written")
    options = parser.parse_args(arguments)
    return exit_status(lambda: write(options.results, options.page))


def write(results: Path, page: Path) -> None:
    """Write the page and its pictures.

    Raises:
        SteerError: there are no results, or something cannot be written.
    """
    records = {path.stem: read_json(path) for path in sorted(results.glob("*.json")) if path.stem.startswith(OURS)}
    if not records:
        raise SteerError(f"the page is made of JSON files, and {results} holds none; `make bench` makes them.")
    pictures: dict[Path, bytes] = {}

    def picture(plot: Plot, stem: str) -> str:
        path = results / "pictures" / f"{stem}.svg"
        pictures[path] = svg(draw(plot), plot.title).encode()
        try:
            shown = path.resolve().relative_to(page.resolve().parent)
        except ValueError:
            shown = path
        return f"![{words(plot)}]({shown.as_posix()})"

    text = "\n\n".join([part for section in SECTIONS for part in section(records, picture)]) + "\n"
    for place in (page.parent, results / "pictures"):
        make_folder(place)
    write_whole({page: text.encode(), **pictures})
    write_page(page, results / "gpu")  # what `make gpu` found stays
    print(f"{page} is made of {len(records)} files")


Picture = Callable[[Plot, str], str]
Records = Mapping[str, Any]


def head(records: Records, picture: Picture) -> list[str]:
    """Say what this is, and where it was measured."""
    where: dict[str, list[str]] = {}
    for name, record in records.items():
        if "machine" in record:
            versions = ", ".join(f"{key} {value}" for key, value in record["versions"].items())
            where.setdefault(f"{hardware(record['machine'])}. {versions}.", []).append(name)
    made = [f"- {', '.join(names)}: {place}" for place, names in where.items()]
    tiny = any(one.get("options", {}).get(key) for one in records.values() for key in ("quick", "tiny"))
    return [
        "# What steering costs" + ": A TEST ON TINY SHAPES, NO RESULT" * tiny,
        "This page is generated by `make bench` from the JSON files in `benchmarks/results`; do not edit it. Backbones "
        "have well-known shapes and random weights, since timing needs no others; rank 32, fp32, unless a table says "
        "otherwise.",
        "\n".join(made),
    ]


def aimed(records: Records, picture: Picture) -> list[str]:
    """Set aims beside measurements."""
    rows = [[aim.what, aim.aim, aim.measured or "–", aim.verdict] for aim in aims_of(records)]
    parts = ["## Aims", markdown(["what", "aim", "measured", "verdict"], rows), VERDICTS]
    lines = []
    for name in SHAPES:
        if f"cost-{name}-cpu" in records:
            places = against_lora(closer(records, name))
            told = "; ".join(f"{place}: {', '.join(columns)}" for place, columns in places.items() if columns)
            lines.append(f"- {name}: {told or 'LoRA was not measured'}.")
    intro = "H-Res beside the block against PEFT's LoRA on its usual targets, not merged (H-Res ÷ LoRA in brackets):"
    return [*parts, intro, "\n".join(lines)] if lines else parts


def costs(records: Records, picture: Picture) -> list[str]:
    """Show every method on every backbone."""
    parts = ["## Every method", COLUMNS]
    for name, shape in SHAPES.items():
        if record := records.get(f"cost-{name}-cpu"):
            size = " × ".join(map(str, record["batch"]))
            about = (
                f"A batch of {size} for steps and prefill, rank {record['rank']}, {record['options']['rounds']} rounds."
            )
            parts += [f"### {shape.about}", about, cost.table(record)]
    if record := records.get("loreft-gpt2-cpu"):
        parts += [
            "### LoReFT, in an environment of its own",
            f"pyreft {record['pyreft']} needs transformers {record['versions']['transformers']}, so this was a process "
            f"of its own (`make bench-loreft`), and only its ratios are to be compared. A batch of "
            f"{' × '.join(map(str, record['batch']))}, rank {record['rank']}. LoReFT acts on the prompt alone, so that "
            "decoding is the frozen model's.",
            loreft.table(record),
        ]
    else:
        parts += ["LoReFT (pyreft) was not run: `make bench-loreft` gives it an environment and runs it."]
    return parts


def grown(records: Records, picture: Picture) -> list[str]:
    """Show the growth curves."""
    parts = ["## How the cost grows"]
    for name in growth.CURVES:
        if record := records.get(f"growth-{name}-cpu"):
            drawn = picture(growth.plot(record), f"growth-{name}") if record["points"] else ""
            parts += [f"### {name.capitalize()}", f"{record['about']}.", drawn, growth.table(record)]
    return [part for part in parts if part]


def below(records: Records, picture: Picture) -> list[str]:
    """Show the cached prefix, and what steering the last blocks alone reaches."""
    parts = ["## Below the floor", "`fit(..., cache_prefix=True)`: an epoch with the cache over the same without."]
    for name in SHAPES:
        if record := records.get(f"prefix-{name}-cpu"):
            least = {"first": "1", "later": f"{record['bound']:.3f}" if "bound" in record else "–"}
            rows = [[epoch, f"{spread(record[epoch]):.3f}", least[epoch]] for epoch in least]
            parts += [record["about"], markdown(["epoch", "with the cache ÷ without", "by count of blocks"], rows)]
    for name in ("digits", "retrieval"):  # experiments/last_blocks.py
        if record := records.get(f"last_blocks-{name}-cpu"):
            drawn = picture(plot_of_last_blocks(record), f"last_blocks-{name}")
            parts += [f"### The last k blocks: {name}", f"{record['about']}.", drawn, table_of_last_blocks(record)]
    return parts


def plot_of_last_blocks(record: Mapping[str, Any]) -> Plot:
    """Draw accuracy against the cost of a step, for H-Res and LoRA on the last k blocks."""
    methods: dict[str, list[str]] = {}
    for name in record["points"]:
        methods.setdefault(name.split(", ")[0], []).append(name)
    series = []
    for method, names in methods.items():
        x = tuple(record["cost"]["times"][name]["ratio"]["median"] for name in names)
        y = tuple(Measured.of(record["points"][name]) if record["points"][name] else None for name in names)
        series.append(Series(method, x, y, tuple(name.removeprefix(f"{method}, ") for name in names)))
    axes = Axis("training step ÷ floor of all blocks"), Axis(metric_of_last_blocks(record))
    return Plot(f"{record['task']}: the last k blocks", "scatter", *axes, tuple(series))


def table_of_last_blocks(record: Mapping[str, Any]) -> str:
    """Return accuracy and cost of every method and k as a Markdown table."""
    cost, rows = record["cost"], []
    for name, values in record["points"].items():
        ratio = cost["times"][name]["ratio"]
        step = f"{ratio['median']:.3f} ({ratio['low']:.3f}–{ratio['high']:.3f})"
        counts = [f"{cost[what][name]:.3f}" for what in ("flops", "saved")]
        rows.append([name, str(Measured.of(values)) if values else "–", step, *counts])
    heads = ["method", metric_of_last_blocks(record), "step ÷ floor", "FLOPs ÷ floor", "saved ÷ floor"]
    return markdown(heads, rows)


def metric_of_last_blocks(record: Mapping[str, Any]) -> str:
    """Return what a record measures, which it says behind the backbone's name."""
    about: str = record["about"]
    return about.split(": ", 1)[1].split(";")[0]


def small(records: Records, picture: Picture) -> list[str]:
    """Show the SSM and the start."""
    parts = []
    if record := records.get("ssm-cpu"):
        parts += ["## An SSM on a CPU", f"{record['shape']}, one row, one training step.", ssm.table(record)]
    if record := records.get("startup-cpu"):
        rounds = record["options"]["rounds"]
        parts += ["## Beginning", f"Medians of {rounds} fresh processes, with quartiles.", startup.table(record)]
    for name in records:
        if name.startswith("many_fields-"):
            parts += [
                "## Many fields in one batch",
                f"[{name}](benchmarks/results/{name}.md): a batch in which every row has its own field, beside PEFT's "
                "LoRA with an adapter per row.",
            ]
    return parts


def gpu(records: Records, picture: Picture) -> list[str]:
    """Show what was measured on a GPU, or say that nothing was."""
    parts = ["## On a GPU"]
    for name, record in records.items():
        if name.startswith("cost-") and "-cuda" in name:
            parts += [f"### {name}: {record['machine']['gpu']}", record["shape"], cost.table(record)]
    return parts if len(parts) > 1 else [*parts, NO_GPU]


SECTIONS = (head, aimed, costs, grown, below, small, gpu)

if __name__ == "__main__":
    sys.exit(main())
