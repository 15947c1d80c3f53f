"""From a folder of results to the files of a report."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from residual_steer.errors import SteerError
from residual_steer.files import as_path, make_folder, write_whole

from .claims import claims_page
from .html import html
from .markdown import markdown
from .plots import png, styles_of, svg
from .result import FORMAT, Result, read_json

__all__ = ["read_folder", "write_report"]

PICTURES = "pictures"


def read_folder(folder: str | os.PathLike[str]) -> tuple[list[Result], list[str]]:
    """Read every result below a folder.

    Returns:
        The results in the order of their names, and a line for each JSON file that is something else. A file that says
        that it is a result, but is damaged, is an error: a report that lacks it would not say so.

    Raises:
        SteerError: there is no such folder, or no result in it; a result is damaged; two have one name.
    """
    top = as_path(folder)
    if not top.is_dir():
        raise SteerError(f"results are read from a folder; received {top}.")
    found: dict[str, tuple[Path, Result]] = {}
    others = []
    for path in sorted(top.rglob("*.json"), key=lambda path: path.relative_to(top).parts):
        try:
            content = read_json(path)
        except SteerError as error:
            others.append(f"skipped: {error}")
            continue
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            others.append(f"skipped: {path} holds something else than a result.")
            continue
        result = Result.parse(content, str(path))
        if result.name in found:
            raise SteerError(
                f"results have different names; {found[result.name][0]} and {path} are both called {result.name!r}. "
                "Remove one of them."
            )
        found[result.name] = (path, result)
    if not found:
        raise SteerError(
            f"{top} holds no result: none of its {len(others)} JSON files is one that `Result.save` wrote."
        )
    return [found[name][1] for name in sorted(found)], others


def write_report(results: Sequence[Result], folder: Path, claims: Path) -> list[Path]:
    """Write `report.md`, `report.html`, the pictures and the list of claims; return what was written.

    Raises:
        SteerError: matplotlib is needed and not installed; something cannot be written.
    """
    styles = styles_of(picture for result in results for picture in result.plots)
    drawings: dict[tuple[str, int], str] = {}
    contents: dict[Path, bytes] = {}
    for result in results:
        for index, plot in enumerate(result.plots):
            drawings[result.name, index] = drawing = svg(plot, styles)
            stem = f"{result.name}-{index + 1}"
            contents[folder / PICTURES / f"{stem}.svg"] = drawing.encode()
            contents[folder / PICTURES / f"{stem}.png"] = png(plot, styles)

    def path_of(result: Result, index: int) -> str:
        return f"{PICTURES}/{result.name}-{index + 1}.svg"

    def drawing_of(result: Result, index: int) -> str:
        return drawings[result.name, index]

    contents[folder / "report.md"] = markdown(results, path_of).encode()
    contents[folder / "report.html"] = html(results, drawing_of).encode()
    contents[claims] = claims_page(results).encode()
    for parent in dict.fromkeys(path.parent for path in contents):
        make_folder(parent)
    write_whole(contents)
    return [*contents]
