"""The report as Markdown, as GitHub shows it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from .cells import head_of, is_numeric, notes_of, shown
from .facts import facts_of, paragraphs, verdicts_of
from .pictures import Picture
from .plots import alt_text, remarks
from .result import Result
from .table import Table

__all__ = ["aligned", "code", "escaped", "markdown", "rule", "table_lines", "table_markdown"]


def markdown(results: Sequence[Result], picture: Callable[[Result, int], str]) -> str:
    """Return the report.

    Args:
        results: in the order of their sections.
        picture: gives the path of a result's plot, by its position, from where the report stands.
    """
    parts = ["# Results", "\n".join(f"- [{escaped(result.title)}](#{result.name})" for result in results)]
    if any(result.verdicts for result in results):
        parts += ["## The paper's claims", _verdicts(results)]
    for result in results:
        parts += [f'<a id="{result.name}"></a>\n\n## {escaped(result.title)}', *map(escaped, paragraphs(result.about))]
        for table in result.tables:
            parts += table_markdown(table)
        for index, shown_here in enumerate(result.plots):
            parts += _picture(shown_here, picture(result, index))
        parts += ["### How it was made", fenced(result.command), "\n".join(_facts(result))]
    return "\n\n".join(parts) + "\n"


def table_lines(heads: Sequence[str], rows: Sequence[Sequence[str]], numeric: Sequence[bool]) -> list[str]:
    """Return the lines of a table in aligned columns, those that are numeric to the right."""
    widths = [max(3, *(len(row[i]) for row in [heads, *rows])) for i in range(len(heads))]
    dashes = "|".join(rule(width, right) for width, right in zip(widths, numeric, strict=True))
    return [aligned(heads, widths, numeric), f"|{dashes}|", *(aligned(row, widths, numeric) for row in rows)]


def aligned(cells: Sequence[str], widths: Sequence[int], numeric: Sequence[bool]) -> str:
    """Return a line of a table."""
    texts = [
        cell.rjust(width) if right else cell.ljust(width)
        for cell, width, right in zip(cells, widths, numeric, strict=True)
    ]
    return f"| {' | '.join(texts)} |"


def rule(width: int, numeric: bool) -> str:
    """Return the dashes below a head; a colon says that numbers stand to the right."""
    return "-" * (width + 1) + (":" if numeric else "-")


def escaped(text: str) -> str:
    """Return text that Markdown shows as it is, in one line, also in a cell of a table."""
    line = " ".join(text.split())
    line = re.sub(r"([\\`*\[\]|$~])", r"\\\1", line)
    line = re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", line)  # inside a word it means itself
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    line = re.sub(r"^([-+](?=[-+ ]|$)|[#=])", r"\\\1", line)  # else a heading, a rule or a list
    return re.sub(r"^(\d+)([.)](?: |$))", r"\1\\\2", line)


def code(text: str) -> str:
    """Return text as code within a line, with as many ticks around it as it needs."""
    line = " ".join(text.split())
    ticks = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    edge = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{ticks}{edge}{line}{edge}{ticks}" if line else ""


def fenced(text: str) -> str:
    """Return text as a block of code."""
    ticks = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{ticks}\n{text}\n{ticks}"


def table_markdown(table: Table) -> list[str]:
    """Return a table in Markdown: its title, its lines, and its notes if it has any."""
    numeric = [is_numeric(table, column) for column in table.columns]
    rows = [[f"**{escaped(cell.text)}**" if cell.best else escaped(cell.text) for cell in row] for row in shown(table)]
    lines = table_lines([escaped(head_of(column)) for column in table.columns], rows, numeric)
    return [f"**{escaped(table.title)}**", "\n".join(lines), *_notes(notes_of(table))]


def _picture(picture: Picture, path: str) -> list[str]:
    return [f"![{escaped(alt_text(picture))}]({path})", *_notes([*remarks(picture), *picture.notes])]


def _notes(notes: Sequence[str]) -> list[str]:
    return ["\n".join(f"- {escaped(note)}" for note in notes)] if notes else []


def _facts(result: Result) -> list[str]:
    return [f"- {escaped(label)}: {escaped(text)}" for label, text in facts_of(result)]


def _verdicts(results: Sequence[Result]) -> str:
    rows = [
        [
            str(verdict.claim),
            *map(escaped, (verdict.verdict, verdict.ours, verdict.paper)),
            f"[{escaped(result.title)}](#{result.name})",
        ]
        for verdict, result in verdicts_of(results)
    ]
    heads = ["claim", "verdict", "ours", "the paper's", "result"]
    return "\n".join(table_lines(heads, rows, [True, False, False, False, False]))
