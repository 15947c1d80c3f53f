"""The comparison's table, its record in JSON and its learning curves."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from residual_steer.report import command_line, machine, portable, versions
from residual_steer.report.styles import styles_for
from tasks import Task

if TYPE_CHECKING:
    from compare_transformer_mamba import Outcome

Results = list[tuple[Task, "dict[str, Outcome]"]]

STYLES = styles_for(["new head alone", "H-Res", "full fine-tuning"])


def table_of(results: Results) -> str:
    """Return the results as a Markdown table with notes."""
    heads = ["backbone", "metric", "trainable", "share", "before", "H-Res", "full", "gap closed"]
    heads += ["s/step H-Res", "s/step full"]
    rows = [[str(value) for value in row_of(task, outcomes)] for task, outcomes in results]
    widths = [max(len(row[i]) for row in [heads, *rows]) for i in range(len(heads))]
    lines = [aligned(heads, widths), "|" + "|".join(rule(i, width) for i, width in enumerate(widths)) + "|"]
    lines += [aligned(row, widths) for row in rows]
    return "\n".join([*lines, "", *notes(results)])


def row_of(task: Task, outcomes: dict[str, Outcome]) -> list[str]:
    """Return a backbone's cells."""
    before, steered, full = outcomes["before"], outcomes["H-Res"], outcomes["full fine-tuning"]
    closed = gap_closed(before.metric, steered.metric, full.metric)
    digits = 3 if task.kind == "text" else 1
    return [
        task.backbone,
        f"{task.unit} {'↓' if task.kind == 'text' else '↑'}",
        f"{steered.trainable:,}",
        f"{steered.trainable / steered.total:.1%}",
        f"{before.metric:.{digits}f}",
        f"{steered.metric:.{digits}f}",
        f"{full.metric:.{digits}f}",
        "–" if closed is None else f"{closed:.0%}",
        f"{steered.seconds_per_step:.3f}",
        f"{full.seconds_per_step:.3f}",
    ]


def gap_closed(before: float, steered: float, full: float) -> float | None:
    """Return the share of full fine-tuning's change that steering reaches; None where that changed next to nothing."""
    return (steered - before) / (full - before) if abs(full - before) > 1e-3 else None


def aligned(cells: list[str], widths: list[int]) -> str:
    """Return a line of the table, numbers to the right."""
    texts = [c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))]
    return f"| {' | '.join(texts)} |"


def rule(index: int, width: int) -> str:
    """Return the dashes below a head; a colon says that numbers stand to the right."""
    return "-" * (width + 2) if index < 2 else "-" * (width + 1) + ":"


def notes(results: Results) -> list[str]:
    """Say below the table what its numbers are."""
    lines = []
    for task, outcomes in results:
        rates = ", ".join(f"{name} {task.rates[name]:g}" for name in outcomes if name in task.rates)
        size = f"{task.steps} steps of {task.batch}"
        lines.append(f"{task.backbone}: {task.about}; {size} for every method; learning rates: {rates}.")
    if any(task.kind == "images" for task, _ in results):
        lines.append("Before, for images: the frozen backbone with a new head, trained for as many steps.")
    lines.append("All on validation data. Gap closed: (H-Res − before) / (full − before).")
    return lines


def save_table(table: str, path: Path) -> None:
    """Write the table as Markdown."""
    path.write_text(table.replace("\n\n", "\n\n- ", 1).replace(".\n", ".\n- ") + "\n")


def save_json(results: Results, options: argparse.Namespace, seconds: float, path: Path) -> None:
    """Write every number with what is needed to get it again."""
    rows = []
    for task, outcomes in results:
        numbers = {name: outcome.metric for name, outcome in outcomes.items()}
        rows.append({
            "backbone": task.backbone,
            "task": task.about,
            "unit": task.unit,
            "steps": task.steps,
            "batch": task.batch,
            "learning_rates": task.rates,
            "gap_closed": gap_closed(numbers["before"], numbers["H-Res"], numbers["full fine-tuning"]),
            "methods": {name: asdict(outcome) for name, outcome in outcomes.items()},
        })  # fmt: skip
    record: dict[str, Any] = {
        "command": command_line(),
        "options": portable(vars(options)),
        "seed": options.seed,
        "seconds": round(seconds, 1),
        "machine": machine(),
        "versions": versions(),
        "results": rows,
    }
    path.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n")


def save_curves(results: Results, path: Path) -> None:
    """Draw the validation metric against the steps, a panel per backbone."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(
        1, len(results), figsize=(4.2 * len(results), 3.8), squeeze=False, layout="constrained"
    )
    for panel, (task, outcomes) in zip(panels[0], results, strict=True):
        before = outcomes["before"]
        if task.kind == "text":
            panel.axhline(before.metric, color="0.45", linestyle="-.", linewidth=1.2, label="frozen, before")
        for name, style in STYLES.items():
            if name in outcomes:
                start = [(0, before.metric)] if task.kind == "text" else []
                steps, values = zip(*start, *outcomes[name].curve, strict=True)
                look = {"color": style.color, "linestyle": style.dashes, "marker": style.marker}
                panel.plot(steps, values, label=name, markersize=5, linewidth=1.8, **look)
        panel.set_title(f"{task.backbone}\n{task.about}", fontsize=11)
        panel.set_xlabel("optimizer steps")
        panel.set_ylabel(f"validation {task.unit}")
        panel.set_xlim(left=-0.02 * task.steps)
        panel.grid(alpha=0.25)
        panel.legend(fontsize=9)
    figure.savefig(path, dpi=150)
    plt.close(figure)
