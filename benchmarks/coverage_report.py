"""COVERAGE.md and its twin in JSON."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

TITLES = {
    "causal": "Causal language models (transformers)",
    "masked": "Masked language models (transformers)",
    "seq2seq": "Sequence to sequence, text and speech (transformers)",
    "image": "Image classification (transformers)",
    "audio": "Audio classification and CTC (transformers)",
    "timm": "Modules of timm",
}
# What is behind the error of a model that fails, for people; the error itself stands in the JSON.
REASONS = {
    "flaubert": "a layer is no module: attentions and feed-forwards stand in lists of their own",
    "gemma4_unified_assistant": "reads the states and the keys and values of the model that it drafts for",
    "inkling2_loop_text": "as inkling2_text, and some layers pass several times",
    "inkling2_text": "the stream begins anew every few layers, which read the sums of all earlier ones by attention",
    "reformer": "reversible: its own backward pass computes layers again past every hook",
    "voxtral_realtime": "runs on sound and text of matching lengths alone",
    "xlm": "a layer is no module: attentions and feed-forwards stand in lists of their own",
}
PACKAGES = ("torch", "transformers", "timm")


def versions() -> dict[str, str]:
    """Return the releases that the table is about."""
    return {package: version(package) for package in PACKAGES}


def write(root: Path, rows: list[dict[str, Any]]) -> None:
    """Write both tables; nothing of the machine is in them."""
    kept = [{k: value for k, value in row.items() if k not in ("seconds", "key", "versions")} for row in rows]
    results = root / "benchmarks" / "results" / "coverage.json"
    results.write_text(json.dumps({"versions": versions(), "models": kept}, indent=1, ensure_ascii=False) + "\n")
    (root / "COVERAGE.md").write_text(markdown(rows))


def markdown(rows: list[dict[str, Any]]) -> str:
    """Return the table for people."""
    told = ", ".join(f"{package} {number}" for package, number in versions().items())
    lines = [
        "# Coverage",
        "",
        "Every model class of transformers and every module of timm, built small with random weights and steered with",
        f"no arguments by `make coverage` ({told}).",
        "",
        "*Works*: the output is the frozen model's to the last bit, every residual block has a field, all tensors of",
        "all fields get a gradient, `use(model, None)` gives the frozen output back to the last bit, and where the",
        "frozen model generates with its cache what it generates without, so does the steered one. *Refused*: there is",
        "no residual stream to steer, and `steer` says so. *Untested*: the model could not be built below 30M",
        "parameters or checked in a minute of a processor; nothing is claimed of it.",
        "",
        "| | works | refused | fails | untested | works, of those that were built and have a stream |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for kind, title in TITLES.items():
        count = {
            status: sum(row["kind"] == kind and row["status"] == status for row in rows)
            for status in ("works", "refused", "failed", "untested")
        }
        tried = count["works"] + count["failed"]
        share = f"{100 * count['works'] / tried:.1f} %" if tried else "–"
        lines.append(f"| {title} | {' | '.join(map(str, count.values()))} | {share} |")
    for kind, title in TITLES.items():
        mine = [row for row in rows if row["kind"] == kind]
        if mine:
            head = "| family | model | | described by | blocks | width | generates |"
            lines += ["", f"## {title}", "", head, "| --- " * 7 + "|"]
            lines += [_row(row) for row in mine]
    return "\n".join(lines) + "\n"


def _row(row: dict[str, Any]) -> str:
    if row["status"] == "works":
        cells = ["works", row["arch"], f"{row['blocks']} × {row['block']}", row["width"], row["generates"]]
    else:
        word = {"failed": "fails", "refused": "refused", "untested": "untested"}[row["status"]]
        why = REASONS.get(row["name"], row["why"]) if row["status"] == "failed" else row["why"]
        cells = [f"{word}: {why.replace('|', '/')}", "", "", "", ""]
    return f"| {row['name']} | {row['model']} | {' | '.join(cells)} |"
