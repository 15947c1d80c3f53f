"""The report as one page of HTML that needs no other file: pictures are drawn into it, and follow light and dark."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from html import escape

from .cells import head_of, is_numeric, notes_of, shown
from .facts import facts_of, paragraphs, verdicts_of
from .page import THEMED, page
from .pictures import Picture
from .plots import alt_text, remarks
from .result import Result, Verdict
from .table import Table
from .values import numbers_of

__all__ = ["html", "inline"]


def html(results: Sequence[Result], picture: Callable[[Result, int], str]) -> str:
    """Return the report.

    Args:
        results: in the order of their sections.
        picture: gives a result's plot, by its position, as SVG.
    """
    judged = any(result.verdicts for result in results)
    entries = [("claims", "The paper’s claims")] if judged else []
    entries += [(f"r-{result.name}", result.title) for result in results]
    links = "\n".join(f'<li><a href="#{name}">{escape(title)}</a></li>' for name, title in entries)
    parts = [f'<h1>Results</h1>\n<nav aria-label="Contents">\n<ul>\n{links}\n</ul>\n</nav>\n<main>']
    if judged:
        parts.append(f'<section id="claims">\n<h2>The paper’s claims</h2>\n{_verdicts(results)}\n</section>')
    parts += [_section(result, picture) for result in results]
    return page("Results", "\n".join([*parts, "</main>"]))


def inline(svg: str, label: str, prefix: str) -> str:
    """Return a picture to stand in a page: named for those who cannot see it, in the page's colours, its ids its own.

    Args:
        svg: as `plots.svg` returns it.
        label: what it shows.
        prefix: before every id.
    """
    text = re.sub(r"\s*<title>.*?</title>", "", svg[svg.index("<svg") :], count=1, flags=re.DOTALL)  # `label` says more
    text = re.sub(r"<!--.*?-->\s*", "", text, flags=re.DOTALL)
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}-", text)
    text = re.sub(r'^<svg\b([^>]*?) width="[^"]*" height="[^"]*"', r"<svg\1", text)
    text = re.sub(r"\s*<defs>\s*<style\b.*?</style>\s*</defs>", "", text, count=1, flags=re.DOTALL)
    for color, themed in THEMED.items():
        text = text.replace(color, themed)
    head = f'<svg role="img" aria-label="{escape(label)}" style="stroke-linejoin: round"'
    return head + text.removeprefix("<svg").rstrip()


def _section(result: Result, picture: Callable[[Result, int], str]) -> str:
    parts = [f'<section id="r-{result.name}">\n<h2>{escape(result.title)}</h2>']
    parts += [f"<p>{escape(part)}</p>" for part in paragraphs(result.about)]
    parts += [_table(table) + _notes(notes_of(table)) for table in result.tables]
    for index, plot in enumerate(result.plots):
        parts.append(_figure(plot, inline(picture(result, index), alt_text(plot), f"{result.name}-{index + 1}")))
    facts = "\n".join(f"<dt>{escape(label)}</dt><dd>{escape(text)}</dd>" for label, text in facts_of(result))
    made = f"<h3>How it was made</h3>\n<pre><code>{escape(result.command)}</code></pre>\n<dl>\n{facts}\n</dl>"
    return "\n".join([*parts, made, "</section>"])


def _table(table: Table) -> str:
    numeric = [is_numeric(table, column) for column in table.columns]
    kinds = [' class="number"' if right else "" for right in numeric]
    heads = [
        f'<th scope="col"{kind}>{escape(head_of(column))}</th>'
        for column, kind in zip(table.columns, kinds, strict=True)
    ]
    rows = []
    for row in shown(table):
        texts = [f"<strong>{escape(cell.text)}</strong>" if cell.best else escape(cell.text) for cell in row]
        first = f'<th scope="row"{kinds[0]}>{texts[0]}</th>'
        others = [f"<td{kind}>{text}</td>" for kind, text in zip(kinds[1:], texts[1:], strict=True)]
        rows.append(f"<tr>{first}{''.join(others)}</tr>")
    return _wide(table.title, "".join(heads), rows)


def _wide(title: str, heads: str, rows: Sequence[str]) -> str:
    """Return a table that scrolls by itself where it is wider than the page, by keyboard too."""
    body = "\n".join(rows)
    return (
        f'<div class="wide" role="region" tabindex="0" aria-label="{escape(title)}">\n<table>\n'
        f"<caption>{escape(title)}</caption>\n<thead>\n<tr>{heads}</tr>\n</thead>\n<tbody>\n{body}\n</tbody>\n</table>\n</div>"
    )


def _figure(picture: Picture, drawing: str) -> str:
    caption = f"<figcaption>{_notes([*remarks(picture), *picture.notes])}</figcaption>"
    numbers = numbers_of(picture)
    more = "" if numbers is None else f"\n<details>\n<summary>The numbers</summary>\n{_table(numbers)}\n</details>"
    return f"<figure>\n{drawing}\n{caption if 'li' in caption else ''}{more}\n</figure>"


def _notes(notes: Sequence[str]) -> str:
    lines = "\n".join(f"<li>{escape(note)}</li>" for note in notes)
    return f'\n<ul class="notes">\n{lines}\n</ul>' if notes else ""


def _verdicts(results: Sequence[Result]) -> str:
    heads = '<th scope="col" class="number">claim</th>' + "".join(
        f'<th scope="col">{head}</th>' for head in ("verdict", "ours", "the paper’s", "result")
    )
    return _wide("What these results say about them", heads, [_verdict(*pair) for pair in verdicts_of(results)])


def _verdict(verdict: Verdict, result: Result) -> str:
    cells = "".join(f"<td>{escape(text)}</td>" for text in (verdict.verdict, verdict.ours, verdict.paper))
    link = f'<td><a href="#r-{result.name}">{escape(result.title)}</a></td>'
    return f'<tr><th scope="row" class="number">{verdict.claim}</th>{cells}{link}</tr>'
