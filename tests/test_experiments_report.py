"""Results are kept as JSON that says exactly what was found, and every number of a page is in one of them."""

import json
import math
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import residual_steer as rs
from benchmarks.charts import look
from benchmarks.charts import svg as svg_of
from benchmarks.environment import command_line, hardware, machine, portable, versions
from experiments import report
from experiments.cells import best_of, escaped, is_numeric, notes_of, table_markdown, text_of, texts
from experiments.plots import describe, draw, factor_of
from experiments.results import (
    Arrows,
    Axis,
    Column,
    Flow,
    Matrix,
    Measured,
    Plot,
    Result,
    Series,
    Surface,
    Table,
    Trajectory,
    Verdict,
)

ROOT = Path(__file__).parents[1]
X, Y = Axis("first direction"), Axis("second", "m")
NAMES = ("H-Res", "LoRA", "prompt", "full fine-tuning", "a method", "another")
LINES = Plot(
    "Loss",
    "lines",
    Axis("steps"),
    Axis("loss", "nats", log=True),
    tuple(Series(name, (1.0, 2.0, 3.0), (2.5 + i, None, Measured.of([1.0, 1.5 + i]))) for i, name in enumerate(NAMES)),
    ("A note.",),
)
POINTS = Plot("Speed", "scatter", X, Y, tuple(Series(n, (1.0 + i,), (float(i),)) for i, n in enumerate(NAMES)))
RANKS = Plot("Ranks", "scatter", X, Y, (Series("H-Res", (1.0, 2.0), (3.0, Measured.of([2, 3])), ("r = 1", "r = 2")),))
BARS = Plot("By task", "bars", Axis("task"), Y, tuple(Series(n, ("digits", "prose"), (1.0, None)) for n in NAMES))
MATRIX = Matrix("Forgetting", X, Y, Axis("accuracy", "%"), ("a", "b"), ("a", "b"), ((90.0, None), (70.0, 80.0)))
PATHS = (Trajectory("frozen", (0.0, 0.5), (0.0, 0.5)), Trajectory("H-Res", (0.0, 3.0), (0.0, 1.0)))
SURFACE = Surface("Hills", X, Y, Axis("loss"), (0.0, 1.0, 2.0), (0.0, 1.0), ((1.0, 2.0, 3.0), (2.0, 3.0, 4.0)), PATHS)
FLOW = Flow("H-Res", (0.0, 1.0, 2.0), (0.0, 1.0, 0.0), (0.1, 0.2, 0.1), (0.1, 0.0, -0.1), ("0", "1", "0"))
ARROWS = Arrows("Fields", X, Y, (FLOW, replace(FLOW, name="LoRA")))
PICTURES = (LINES, POINTS, RANKS, BARS, MATRIX, SURFACE, ARROWS)


def table(*cells, better=None, **more):
    return Table("t", (Column("a", "a", better=better),), tuple({"a": cell} for cell in cells), **more)


def result(**changes):
    """A small result with something of everything."""
    recall = Table(
        "Recall",
        (Column("method", "method"), Column("accuracy", "accuracy", "%", "up", 2)),
        ({"method": "H-Res", "accuracy": Measured.of([82.1, 82.4])}, {"method": "LoRA", "accuracy": 71}),
        ("A note.",),
    )
    fields = {
        "name": "recall",
        "title": "Associative recall <b>",
        "about": "Key and value pairs.\n\nFour of them.",
        "command": "python -m experiments.recall --steps 5",
        "seeds": (0, 1, 2),
        "settings": {"steps": 5, "rates": {"H-Res": 0.02}},
        "machine": {"cpu": "a CPU", "gpu": None},
        "versions": {"python": "3.11"},
        "tables": (recall,),
        "plots": PICTURES,
        "verdicts": (Verdict(1, "holds", "3.78", "1.2 ± 0.1", "python -m experiments.recall", "SQuAD"),),
        "seconds": 200.0,
        "records": [{"seed": 0, "losses": [2.5, 1.0]}],
    }
    return Result(**{**fields, **changes})


@pytest.fixture
def saved(tmp_path):
    result().save(tmp_path / "new" / "recall.json")
    return tmp_path / "new" / "recall.json"


def test_what_is_saved_is_loaded(saved, tmp_path):
    assert Result.load(saved) == result()
    Result.load(saved).save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == saved.read_bytes()


finite = st.floats(allow_nan=False, allow_infinity=False)
letters = st.text(st.characters(blacklist_categories=["Cs", "Cc", "Cn"], blacklist_characters="/\\~"), max_size=8)
cells = st.one_of(
    st.none(), letters, st.integers(), finite, st.builds(Measured.of, st.lists(finite, min_size=1, max_size=1))
)


@settings(max_examples=40, deadline=None)
@given(st.lists(cells, max_size=4), st.dictionaries(letters, st.lists(finite, max_size=3), max_size=3))
def test_any_result_survives_a_file(tmp_path_factory, found, chosen):
    path = tmp_path_factory.getbasetemp() / "any.json"
    given_result = result(tables=(table(*found),), settings=chosen, plots=())
    given_result.save(path)
    assert Result.load(path) == given_result


def test_numbers_that_json_does_not_have(tmp_path):
    diverged = result(seconds=math.nan, records=[math.inf], tables=(table(Measured.of([1.0, math.nan]), math.nan),))
    diverged.save(tmp_path / "a.json")
    loaded = Result.load(tmp_path / "a.json")
    first, second = (row["a"] for row in loaded.tables[0].rows)
    assert math.isnan(loaded.seconds)
    assert math.isnan(first.mean)
    assert first.count == 2
    assert (second, loaded.records) == (None, [None])
    with pytest.raises(rs.SteerError, match="what JSON has not"):
        result(records={"a": object()}).save(tmp_path / "b.json")
    assert not (tmp_path / "b.json").exists()


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("seeds",), 3),
        (("seeds",), ["0"]),
        (("tables", 0, "rows", 0, "accuracy"), [1]),
        (("tables", 0, "columns", 1, "digits"), 1.5),
        (("tables", 0, "columns", 1, "better"), "higher"),
        (("plots", 0, "kind"), "pie"),
        (("plots", 0, "series", 2, "z"), 1),
        (("plots", 4, "values", 0), [1.0]),
        (("verdicts", 0, "verdict"), "true"),
        (("verdicts", 0, "claim"), 11),
        (("more",), 1),
        (("name",), "../up"),
        (("format_version",), 2),
        (("format",), "other"),
        (("versions", "python"), 3),
    ],
)
def test_a_file_with_a_field_added_or_of_another_kind_is_refused(saved, path, value):
    content = json.loads(saved.read_text())
    place = content
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    saved.write_text(json.dumps(content))
    with pytest.raises(rs.SteerError):
        Result.load(saved)


def test_a_file_that_lacks_a_field_is_refused(saved):
    content = json.loads(saved.read_text())
    for key in content:
        saved.write_text(json.dumps({name: value for name, value in content.items() if name != key}))
        with pytest.raises(rs.SteerError, match=r"recall\.json"):
            Result.load(saved)
    for text in ("", "[1]", "{", "\x00"):
        saved.write_text(text)
        with pytest.raises(rs.SteerError, match=r"recall\.json"):
            Result.load(saved)
    with pytest.raises(rs.SteerError, match="could not read"):
        Result.load(saved.parent / "none.json")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Table("t", (Column("a", "a"),) * 2, ()), "cells for a, a"),
        (lambda: Table("t", (Column("a", "a"),), ({"b": 1},)), "cells for a; received b"),
        (lambda: Series("s", (1, 2), (1,)), "2 x, 1 y and 0 labels"),
        (lambda: Plot("p", "lines", X, Y, ()), "different names"),
        (lambda: Plot("p", "pie", X, Y, (Series("s", (1,), (1,)),)), "one of lines, scatter, bars"),
        (lambda: replace(MATRIX, rows=("a",)), "1 rows of 2 values"),
        (lambda: Measured.of([]), "at least one seed"),
    ],
)
def test_what_makes_no_sense_is_refused_when_it_is_made(make, words):
    with pytest.raises(rs.SteerError, match=words):
        make()


def test_measured_over_seeds():
    assert Measured.of([1.0, 2.0, 4.0]).spread == pytest.approx(np.std([1.0, 2.0, 4.0], ddof=1))
    assert Measured.of([5]) == Measured(5.0, 0.0, 1)
    assert math.isnan(Measured.of([5, math.inf]).mean)
    wanted = {(82.1432, 0.3123, 3): "82.14 ± 0.31", (1523.2, 41.7, 3): "1523 ± 42", (5, 0, 1): "5"}
    assert {key: str(Measured(*key)) for key in wanted} == wanted


def test_where_and_with_what(monkeypatch):
    assert machine("cpu").keys() == {"system", "cpu", "cores", "threads", "gpu"}
    assert versions(["numpy", "no-such-package"]).keys() == {"python", "numpy", "torch"}
    assert versions()["torch"] == torch.__version__
    assert hardware({"gpu": "H100", "cpu": "X", "cores": 8, "threads": 4, "system": "Linux"}) == (
        "H100, X, 8 cores, 4 threads, Linux"
    )
    assert (hardware({}), hardware({"gpu": None, "cpu": "X"})) == ("–", "no GPU, X")
    monkeypatch.setattr(sys, "argv", ["examples/a.py", "--out", "/home/me/x", "two words"])
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    assert command_line() == "python examples/a.py --out x 'two words'"


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("/home/me/my runs/a", "a"),
        ("--out=/home/me/a", "--out=a"),
        ("~/runs/a", "a"),
        ("read from /home/me/data.json, twice", "read from data.json, twice"),
        (r"in C:\Users\me\a.txt", "in a.txt"),
        ("tokens/s and 1/2, and/or", "tokens/s and 1/2, and/or"),
        ("see https://example.org/a/b", "see https://example.org/a/b"),
        ("state-spaces/mamba-130m-hf", "state-spaces/mamba-130m-hf"),
    ],
)
def test_no_path_of_a_disk_stays(text, left):
    assert portable({"a": [text, 1, None]}) == {"a": [left, 1, None]}
    assert portable({"/data/one/x": 1, "/data/two/x": 2}) == {"x": 1, "x (2)": 2}
    assert portable(Path.cwd() / "runs" / "a") == "runs/a"


@pytest.mark.parametrize(
    ("cell", "digits", "text"),
    [
        (None, 2, "–"),
        ("", 2, "–"),
        (math.nan, 2, "–"),
        (Measured.of([1.0, math.nan]), 2, "–"),
        (1234567, 2, "1,234,567"),
        (-0.5, 1, "−0.5"),
        (0.00001234, 3, "1.2e-05"),
        (1e20, 3, "1.0e+20"),
        (Measured(82.1432, 0.3123, 3), 2, "82.14 ± 0.31"),
        (Measured(82.1432, 0.00004, 3), 2, "82.14 ± 4.0e-05"),
        (Measured(82.1432, 0.0, 1), 2, "82.14"),
    ],
)
def test_cells_as_texts(cell, digits, text):
    assert text_of(cell, digits) == text


@pytest.mark.parametrize(
    ("better", "found", "best"),
    [
        ("up", [1.0, 3.0, 2.0], {1}),
        ("down", [1.0, 3.0, 2.0], {0}),
        (None, [1.0, 3.0], set()),
        ("up", [3.00001, 1.0, 3.0], {0, 2}),  # they read the same
        ("up", [3.0, 3.0], set()),  # nobody stands out
        ("up", [3.0, None, "n/a", math.nan], set()),
        ("up", [Measured(3, 0.3, 5), Measured(2.5, 0.3, 5), Measured(1, 0.1, 5)], {0, 1}),
        ("up", [Measured(3, 0.2, 5), Measured(2.5, 0.2, 5), Measured(1, 0.1, 5)], {0}),
        ("down", [Measured(2.55, 0.1, 5), Measured(2.5, 0.0, 1), 9], {0, 1}),
    ],
)
def test_the_best_is_marked_with_all_that_cannot_be_told_apart_from_it(better, found, best):
    assert best_of(Column("a", "a", better=better), found) == best


def test_a_table_in_markdown():
    (one,) = result().tables
    assert [[text for text, _ in row] for row in texts(one)] == [["H-Res", "82.25 ± 0.21"], ["LoRA", "71"]]
    assert [is_numeric(one, column) for column in one.columns] == [False, True]
    lines = table_markdown(one).splitlines()
    assert lines[2].replace(" ", "") == "|H-Res|**82.25±0.21**|"
    assert lines[5].startswith("- Mean ± sample standard deviation over 2 seeds.")
    assert lines[-1] == "- A note."
    assert notes_of(table(1, "a")) == []
    assert notes_of(table(Measured.of([1]))) == ["One seed, which has no spread."]
    assert "of a single seed" in notes_of(table(Measured.of([1]), Measured.of([1, 2])))[0]


@pytest.mark.parametrize(
    ("text", "shown"),
    [("a*b_c_ |$ ~", r"a\*b_c\_ \|\$ \~"), ("<b> & c", "&lt;b&gt; &amp; c"), ("- a", r"\- a"), ("1. a", r"1\. a")],
)
def test_escaping_for_markdown(text, shown):
    assert escaped(text) == shown


@pytest.mark.parametrize("picture", PICTURES, ids=lambda picture: picture.title)
def test_pictures_are_drawn_described_and_the_same_each_time(picture):
    before = dict(matplotlib.rcParams)
    first, second = (svg_of(draw(picture), picture.title) for _ in range(2))
    assert first == second
    assert f"<title>{picture.title}</title>" in first
    assert dict(matplotlib.rcParams) == before
    assert describe(picture).startswith(f"{picture.title}. ")
    assert str(picture.x) in describe(picture)


def test_drawings_hold_the_numbers():
    lines, bars, hills, arrows, matrix = (draw(one).axes[0] for one in (LINES, BARS, SURFACE, ARROWS, MATRIX))
    assert lines.lines[0].get_xdata() == pytest.approx([1, 2, 3])
    assert np.isnan(lines.lines[0].get_ydata()[1])  # the line stops where there is no number
    assert len(lines.collections) == len(NAMES)  # a band for every spread
    assert [bar.get_height() for bar in bars.patches[::2]] == [1.0] * len(NAMES)
    assert hills.get_xlim()[1] >= 3  # a path that leaves the plane is shown whole
    quiver = arrows.collections[0]
    assert np.allclose(np.stack([quiver.U, quiver.V], 1), np.stack([FLOW.dx, FLOW.dy], 1))
    assert quiver.scale == 1 / factor_of(ARROWS) == 1
    assert {text.get_text() for text in matrix.texts} == {"90", "70", "80"}


@pytest.mark.parametrize("power", [-30, -5, -1, 2, 9])
def test_arrows_of_any_length_are_brought_into_sight_by_a_round_factor(power):
    scaled = replace(FLOW, dx=tuple(10.0**power * x for x in FLOW.dx), dy=tuple(10.0**power * y for y in FLOW.dy))
    found = Arrows("a", X, Y, (scaled,))
    factor = factor_of(found)
    assert 0.03 <= factor * 10.0**power * math.hypot(0.2 / 2, 0.1 / 1) <= 0.5
    assert f"{factor:.0e}"[0] in "125"
    assert (f"{factor:g} times" in describe(found)) == (factor != 1)


def test_a_method_looks_the_same_in_every_chart_and_like_no_other():
    names = [*NAMES, *(f"method {i}" for i in range(5))]
    found = [tuple(look(name, names).values()) for name in names]
    assert len(set(found)) == len(found)
    assert look("h-res") == look("H-Res", names)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The report of two results, and where the files are."""
    folder = tmp_path_factory.mktemp("report")
    result().save(folder / "a" / "recall.json")
    other = result(name="another", title="Another", plots=(), verdicts=(Verdict(9, "partly holds", "none", "2", "c"),))
    other.save(folder / "another.json")
    (folder / "other.json").write_text('{"a": 1}')
    (folder / "broken.json").write_text("{")
    assert report.main([str(folder), "--out", str(folder / "out"), "--claims", str(folder / "CLAIMS.md")]) == 0
    return folder


class Page(HTMLParser):
    """Checks that tags are closed, ids differ and links lead somewhere."""

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.links, self.fetched = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        if tag not in {"meta", "link", "img", "br"}:
            self.open.append(tag)
        self.ids += [found["id"]] if "id" in found else []
        self.links += [found["href"][1:]] if found.get("href", "").startswith("#") else []
        self.fetched += [found[key] for key in ("src", "href") if "//" in (found.get(key) or "")]

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_whole_and_fetches_nothing(made):
    text = (made / "out" / "report.html").read_text()
    page = Page(text)
    assert page.open == page.fetched == []
    assert len(set(page.ids)) == len(page.ids)
    assert set(page.links) <= set(page.ids)
    assert text.count("<svg") == text.count('role="img" aria-label="') == len(PICTURES)
    assert "var(--ink)" in text
    assert "Associative recall &lt;b&gt;" in text
    assert "<strong>82.25 ± 0.21</strong>" in text
    for fact in ("3 min 20 s", "0–2 (3)", "no GPU, a CPU", "H-Res 0.02"):
        assert fact in text


def test_the_report_in_markdown_has_everything(made):
    text = (made / "out" / "report.md").read_text()
    assert text.index('id="another"') < text.index('id="recall"')  # by name
    shown = re.findall(r"\]\((pictures/[^)]*)\)", text)
    assert len(shown) == len(PICTURES)
    for path in shown:
        assert (made / "out" / path).read_text().startswith("<?xml")
        assert (made / "out" / path).with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert "**82.25 ± 0.21**" in text
    assert "python -m experiments.recall --steps 5" in text


def test_claims_have_every_verdict_with_what_is_needed_to_get_it_again(made):
    text = (made / "CLAIMS.md").read_text()
    sections = re.split(r"\n## ", text)[1:]
    assert [int(section.split(".")[0]) for section in sections] == list(range(1, 11))
    facts = ("**holds**, by Associative recall", "1.2 ± 0.1", "3.78", "0–2 (3)", "`python -m experiments.recall`")
    for wanted in facts:
        assert wanted in sections[0]
    assert "**partly holds**, by Another" in sections[8]
    assert [number for number, section in enumerate(sections, 1) if "**not run here**" in section] == [
        number for number in range(1, 11) if number not in (1, 9)
    ]
    assert "Ours" not in sections[1]


def test_claims_md_is_made_of_the_results_that_lie_here():
    results, others = report.read_folder(ROOT / "benchmarks" / "results" / "claims")
    assert others == []
    assert report.claims_page(results) == (ROOT / "CLAIMS.md").read_text()


def test_what_a_verdict_tells_others_to_run_is_there():
    results, _ = report.read_folder(ROOT / "benchmarks" / "results" / "claims")
    commands = [claim["command"] for claim in report.read_claims()]
    commands += [text for one in results for text in (one.command, *(verdict.command for verdict in one.verdicts))]
    for command in commands:
        words = command.split()
        if words[0] == "make":
            assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), command
        else:
            assert (ROOT / "experiments" / f"{words[2].removeprefix('experiments.')}.py").exists(), command


def test_errors_are_one_line(tmp_path, capsys):
    def fails(words):
        assert report.main([str(tmp_path)]) == 1
        error = capsys.readouterr().err.strip()
        assert error.startswith("error: ")
        assert words in error
        assert "\n" not in error

    fails("holds no result")
    result().save(tmp_path / "a.json")
    result().save(tmp_path / "b.json")
    fails("both called 'recall'")
    content = json.loads((tmp_path / "b.json").read_text())
    (tmp_path / "b.json").write_text(json.dumps({**content, "seeds": None}))
    fails("b.json.seeds")
