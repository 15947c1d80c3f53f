"""A report of the results in a folder, as Markdown and as HTML with pictures, and CLAIMS.md.

    python -m experiments.report benchmarks/results/claims --out runs/report --claims CLAIMS.md

What is called ours comes from results alone; what the paper says stands in claims.toml.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from benchmarks.charts import INK, PAPER, QUIET, save, svg
from benchmarks.environment import hardware, read_json
from residual_steer import SteerError
from residual_steer._files import make_folder, write_whole

from .cells import NOTHING, escaped, head_of, is_numeric, markdown, notes_of, table_markdown, texts
from .plots import describe, draw
from .results import Result, Verdict, is_result

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["claims_page", "read_claims", "read_folder", "write_report"]

HERE = Path(__file__).parent
NOT_RUN = "not run here"
THEMED = {INK: "var(--ink)", QUIET: "var(--quiet)", PAPER: "var(--paper)"}  # colours that follow those of the page


def main(arguments: list[str] | None = None) -> int:
    """Make the report; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m experiments.report", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("folder", type=Path, help="with the JSON files that experiments wrote, at any depth")
    parser.add_argument("--out", type=Path, help="folder for the report; the same folder if left out")
    parser.add_argument("--claims", type=Path, help="file for the list of claims; CLAIMS.md beside the report")
    options = parser.parse_args(arguments)
    out = options.out or options.folder
    try:
        results, others = read_folder(options.folder)
        for line in others:
            print(line)
        for path in write_report(results, out, options.claims or out / "CLAIMS.md"):
            print(f"wrote {path}")
    except SteerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def read_folder(top: Path) -> tuple[list[Result], list[str]]:
    """Read every result below a folder.

    Returns:
        The results in the order of their names, and a line for each JSON file that is something else. A file that says
        that it is a result, but is damaged, is an error: a report that lacks it would not say so.

    Raises:
        SteerError: there is no such folder, or no result in it; a result is damaged; two have one name.
    """
    found: dict[str, tuple[Path, Result]] = {}
    others = []
    for path in sorted(top.rglob("*.json")):
        try:
            other = not is_result(read_json(path))
        except SteerError as error:
            others.append(f"skipped: {error}")
            continue
        if other:
            others.append(f"skipped: {path} holds something else than a result.")
            continue
        result = Result.load(path)
        if result.name in found:
            raise SteerError(
                f"results have different names; {found[result.name][0]} and {path} are both called {result.name!r}. "
                "Remove one of them."
            )
        found[result.name] = (path, result)
    if not found:
        raise SteerError(f"{top} holds no result, which are JSON files that an experiment wrote; run one first.")
    return [found[name][1] for name in sorted(found)], others


def write_report(results: Sequence[Result], folder: Path, claims: Path) -> list[Path]:
    """Write `report.md`, `report.html`, the pictures and the list of claims; return what was written."""
    drawings: dict[tuple[str, int], str] = {}
    contents: dict[Path, bytes] = {}
    for result in results:
        for index, picture in enumerate(result.plots):
            figure, stem = draw(picture), f"{result.name}-{index + 1}"
            drawings[result.name, index] = svg(figure, picture.title)
            contents[folder / "pictures" / f"{stem}.svg"] = drawings[result.name, index].encode()
            contents[folder / "pictures" / f"{stem}.png"] = save(figure, "png", metadata={"Software": None})
    contents[folder / "report.md"] = report_markdown(results).encode()
    contents[folder / "report.html"] = report_html(results, drawings).encode()
    contents[claims] = claims_page(results).encode()
    for parent in dict.fromkeys(path.parent for path in contents):
        make_folder(parent)
    write_whole(contents)
    return [*contents]


def read_claims() -> list[dict[str, Any]]:
    """Return the paper's claims in the order of their numbers."""
    claims: list[dict[str, Any]] = tomllib.loads((HERE / "claims.toml").read_text("utf-8"))["claim"]
    return claims


def claims_page(results: Sequence[Result]) -> str:
    """Return CLAIMS.md: a section for each claim, with every verdict that a result has on it.

    A claim on which none has a verdict is `not run here`.
    """
    claims, found = read_claims(), verdicts_of(results)
    rows = []
    for claim in claims:
        verdicts = dict.fromkeys(verdict.verdict for verdict, _ in found if verdict.claim == claim["number"])
        number = f"[{claim['number']}](#claim-{claim['number']})"
        rows.append([number, escaped(claim["text"]), escaped("; ".join(verdicts) or NOT_RUN)])
    parts = [
        "# The paper's claims, tested here",
        "H-Res, “Parallel Manifold Steering” (arXiv 2606.24396). Written by `python -m experiments.report` from "
        "the results of experiments; every number called ours is in one of them. ± is a sample standard deviation over "
        "the seeds.",
        markdown(["claim", "what the paper says", "verdict"], rows, [False] * 3),
    ]
    for claim in claims:
        parts += [
            f'<a id="claim-{claim["number"]}"></a>\n\n## {claim["number"]}. {escaped(claim["text"])}',
            f"- The paper: {escaped(claim['paper'])}.\n- A fair test: {escaped(claim['test'])}.",
        ]
        own = [_verdict(*pair) for pair in found if pair[0].claim == claim["number"]]
        run = f"- Command: {code(claim['command'])}\n- Missing: {escaped(claim['missing'])}."
        parts += own or [f"**{NOT_RUN}**\n\n{run}"]
    return "\n\n".join(parts) + "\n"


def _verdict(verdict: Verdict, result: Result) -> str:
    lines = [
        f"**{escaped(verdict.verdict)}**, by {escaped(result.title)} ({code(result.name)})\n",
        f"- Ours: {escaped(verdict.ours)}",
        f"- Held against, of the paper: {escaped(verdict.paper)}",
        f"- Seeds: {escaped(seeds_of(result))}",
        f"- Command: {code(verdict.command)}",
        f"- Hardware: {escaped(hardware(result.machine))}",
        f"- Versions: {escaped(plain(result.versions))}",
    ]
    return "\n".join([*lines, f"- Missing: {escaped(verdict.missing)}"] if verdict.missing else lines)


def report_markdown(results: Sequence[Result]) -> str:
    """Return the report as Markdown, as GitHub shows it."""
    parts = ["# Results", "\n".join(f"- [{escaped(result.title)}](#{result.name})" for result in results)]
    rows = [
        [str(one.claim), *map(escaped, (one.verdict, one.ours, one.paper)), f"[{escaped(by.title)}](#{by.name})"]
        for one, by in verdicts_of(results)
    ]
    if rows:
        heads = ["claim", "verdict", "ours", "the paper's", "result"]
        parts += ["## The paper's claims", markdown(heads, rows, [True, *[False] * 4])]
    for result in results:
        parts += [f'<a id="{result.name}"></a>\n\n## {escaped(result.title)}', *map(escaped, paragraphs(result.about))]
        for table in result.tables:
            parts += [f"**{escaped(table.title)}**", table_markdown(table)]
        for index, picture in enumerate(result.plots):
            parts.append(f"![{escaped(describe(picture))}](pictures/{result.name}-{index + 1}.svg)")
            if picture.notes:
                parts.append("\n".join(f"- {escaped(note)}" for note in picture.notes))
        facts = "\n".join(f"- {escaped(label)}: {escaped(text)}" for label, text in facts_of(result))
        parts += ["### How it was made", f"```\n{result.command}\n```", facts]
    return "\n\n".join(parts) + "\n"


def report_html(results: Sequence[Result], drawings: Mapping[tuple[str, int], str]) -> str:
    """Return the report as one page that needs no other file: pictures stand in it, and follow light and dark."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    tools = (facts_of, paragraphs, texts, head_of, is_numeric, notes_of)
    environment.globals.update({tool.__name__: tool for tool in tools})

    def figure(result: Result, index: int) -> str:
        return inline(drawings[result.name, index], describe(result.plots[index]), f"{result.name}-{index + 1}")

    page = environment.get_template("report.html.jinja")
    return page.render(results=results, verdicts=verdicts_of(results), figure=figure)


def inline(drawing: str, label: str, prefix: str) -> str:
    """Return a picture to stand in a page: with a name, in the page's colours, its ids its own."""
    text = re.sub(r"\s*<title>.*?</title>", "", drawing[drawing.index("<svg") :], count=1, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->\s*", "", text, flags=re.DOTALL)
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}-", text)
    text = re.sub(r'^<svg\b([^>]*?) width="[^"]*" height="[^"]*"', r"<svg\1", text)
    text = re.sub(r"\s*<defs>\s*<style\b.*?</style>\s*</defs>", "", text, count=1, flags=re.DOTALL)
    for color, themed in THEMED.items():
        text = text.replace(color, themed)
    return f'<svg role="img" aria-label="{jinja2.utils.markupsafe.escape(label)}"' + text.removeprefix("<svg").rstrip()


def verdicts_of(results: Sequence[Result]) -> list[tuple[Verdict, Result]]:
    """Return every verdict with its result, by the number of the claim."""
    found = [(verdict, result) for result in results for verdict in result.verdicts]
    return sorted(found, key=lambda pair: pair[0].claim)


def facts_of(result: Result) -> list[tuple[str, str]]:
    """Return label and text of everything that is needed to get a result again, but the command."""
    minutes, seconds = divmod(round(result.seconds), 60)
    took = f"{minutes} min {seconds} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
    found = [("seeds", seeds_of(result)), ("hardware", hardware(result.machine)), ("versions", plain(result.versions))]
    return [*found, ("took", took), *((f"setting: {key}", plain(value)) for key, value in result.settings.items())]


def seeds_of(result: Result) -> str:
    """Write seeds briefly: `0–4 (5)`."""
    seeds = result.seeds
    if len(seeds) > 2 and list(seeds) == list(range(seeds[0], seeds[0] + len(seeds))):
        return f"{seeds[0]}–{seeds[-1]} ({len(seeds)})"
    return ", ".join(map(str, seeds)) or NOTHING


def plain(value: Any) -> str:
    """Write JSON for people: texts, and lists and objects of them, as they are."""
    if isinstance(value, (str, type(None))):
        return value or NOTHING
    parts = list(value.values()) if isinstance(value, Mapping) else value
    if not isinstance(parts, (list, tuple)) or any(isinstance(part, (Mapping, list)) for part in parts):
        return json.dumps(value, ensure_ascii=False)
    named = isinstance(value, Mapping)
    return ", ".join(f"{k} {plain(v)}" for k, v in value.items()) if named else ", ".join(map(plain, parts)) or NOTHING


def paragraphs(text: str) -> list[str]:
    """Split a text at its blank lines."""
    return [part for part in re.split(r"\n\s*\n", text.strip()) if part]


def code(text: str) -> str:
    """Return text as code within a line, with as many ticks around it as it needs."""
    ticks = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{ticks}{' '.join(text.split())}{ticks}"


if __name__ == "__main__":
    sys.exit(main())
