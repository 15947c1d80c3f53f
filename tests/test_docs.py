"""Every snippet of the README and of the docs runs, and prints what stands below it; every public name has its place.

In a page, the ```python blocks run one after another in one namespace and an empty folder. A ```text block right
below one is what it prints; numbers with a point may differ in the last digits. A `title` makes a block a file. Of a
```bash block the lines that begin with `residual-steer` run; targets of make must be there. A page that needs a package
that not every machine has says so at its top: `<!-- needs: vllm -->`.
"""

import contextlib
import io
import json
import pkgutil
import re
import shlex
import sys
import types
from pathlib import Path

import pytest

from residual_steer.cli import main

for package in ("transformers", "timm", "peft", "sklearn", "matplotlib"):
    pytest.importorskip(package)

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
NAMES = {str(path.relative_to(ROOT)): path for path in PAGES}
FENCE = re.compile(r"^```(\w*)(?: +title=\"([^\"]+)\")?\n(.*?)^```$", re.DOTALL | re.MULTILINE)
NUMBER = re.compile(r"\d+\.\d+(?:e-?\d+)?")
LINK = re.compile(r"\]\(([^)\s#]+)(#[^)]*)?\)|(?:src|href)=\"([^\"#]+)\"")


def printed_by(language, code, namespace):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        if language == "python":
            exec(compile(code, "<page>", "exec"), namespace)
        for line in code.splitlines() if language == "bash" else ():
            if line.startswith("residual-steer "):
                assert main(shlex.split(line, comments=True)[1:]) == 0, line
            elif line.startswith("make "):
                assert re.search(rf"^{line.split()[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), line
    return out.getvalue()


def same(found, expected):
    """Whether two texts are the same, but for rounding in their decimals."""
    numbers = zip(NUMBER.findall(found), NUMBER.findall(expected), strict=False)
    rough = [NUMBER.sub("#", text).strip() for text in (found, expected)]
    return rough[0] == rough[1] and all(float(a) == pytest.approx(float(b), rel=0.02) for a, b in numbers)


@pytest.fixture
def page(tmp_path, monkeypatch):
    """An empty folder, and a module that classes of a page belong to."""
    monkeypatch.chdir(tmp_path)
    module = types.ModuleType("a_page")
    monkeypatch.setitem(sys.modules, "a_page", module)
    return vars(module)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", [name for name, path in NAMES.items() if "```" in path.read_text("utf-8")])
def test_what_a_page_shows_is_what_it_prints(name, page):
    text = NAMES[name].read_text("utf-8")
    for package in re.findall(r"<!-- needs: (\w+) -->", text):
        pytest.importorskip(package)
    out = ""
    for language, title, code in FENCE.findall(text):
        if title:
            Path(title).write_text(code, "utf-8")
        elif language == "text":
            assert same(out, code), f"it prints\n{out}"
        else:
            out = printed_by(language, code, page)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("path", sorted((DOCS / "tutorials").glob("*.ipynb")), ids=lambda path: path.stem)
def test_a_notebook_runs_on_few_steps_and_carries_what_it_printed(path, page):
    cells = [cell for cell in json.loads(path.read_text("utf-8"))["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1)), "run it whole, from the top"
    assert not [o for cell in cells for o in cell["outputs"] if o["output_type"] == "error"]
    assert sum(bool(cell["outputs"]) for cell in cells) >= len(cells) / 2
    for cell in cells:
        code = re.sub(r"^(STEPS|PRETRAIN) = \d+", r"\1 = 2", "".join(cell["source"]), flags=re.MULTILINE)
        printed_by("python", code, page)


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name):
    path = NAMES[name]
    links = [a or b for a, _, b in LINK.findall(FENCE.sub("", path.read_text("utf-8")))]
    assert [x for x in links if not x.startswith(("http", "mailto:")) and not (path.parent / x).exists()] == []


def test_numbers_may_differ_by_rounding_and_words_may_not():
    assert same("loss 1.005, 3 rows\n", "loss 1.000, 3 rows")
    assert not same("loss 1.5, 3 rows", "loss 1.0, 3 rows")
    assert not same("loss 1.0, 4 rows", "loss 1.0, 3 rows")


def test_the_readme_is_short():
    text = (ROOT / "README.md").read_text("utf-8")
    quickstart = next(code for language, _, code in FENCE.findall(text) if language == "python")
    assert len(text.splitlines()) <= 130
    assert len(text.split()) <= 800
    assert len(quickstart.splitlines()) <= 14


def test_every_public_name_is_in_the_reference():
    frozen = json.loads((ROOT / "tests" / "public_names.json").read_text("utf-8"))
    modules = {name for name, kind in frozen.items() if kind == "module"}
    tops = {name for name in frozen if name not in modules and name.rpartition(".")[0] in {"residual_steer", *modules}}
    shown = set()
    for path in (DOCS / "reference").glob("*.md"):
        # A module has the name of its function: residual_steer.export.export.
        text = re.sub(r"\.(\w+)\.\1$", r".\1", path.read_text("utf-8"), flags=re.MULTILINE)
        shown.update(re.findall(r"^::: ([\w.]+)$", text, re.MULTILINE))
    assert tops <= shown, "give these a `:::` line in docs/reference"
    assert modules - {"residual_steer.peft"} <= {name.rpartition(".")[0] for name in shown}


def test_what_the_reference_shows_is_markdown():
    names = [
        x
        for path in (DOCS / "reference").glob("*.md")
        for x in re.findall(r"^::: ([\w.]+)$", path.read_text("utf-8"), re.M)
    ]
    shown = {name: pkgutil.resolve_name(name).__doc__ or "" for name in names if ".vllm" not in name}
    assert [name for name, text in shown.items() if re.search(r"^ *={4,}", text, re.M)] == [], "write its table with |"
