"""Heat maps, surfaces and arrows: what they hold, and where they stand in a report."""

import copy
import json
import math
import re
import struct
import sys
import xml.etree.ElementTree as ElementTree

import pytest

import residual_steer as rs
from picture_samples import arrows, flow, forgetting, matrix, surface
from report_samples import ranks, result, tradeoff
from residual_steer.report import Arrows, Axis, Flow, Matrix, Plot, Result, Surface, Table, Trajectory
from residual_steer.report.__main__ import main
from residual_steer.report.html import html
from residual_steer.report.markdown import markdown
from residual_steer.report.plots import DPI, alt_text, remarks, styles_of
from residual_steer.report.values import numbers_of

GROUPED = arrows(flow("before", groups=("cat", "dog")), flow("after", seed=1, groups=("cat", "dog")))
EVERY = (matrix(), forgetting(), surface(), surface(paths=(), log=True), arrows(), GROUPED)
X, Y, Z = Axis("x"), Axis("y"), Axis("z")
NASTY = 'a <b> & "c" $d_e$ \\f'


def test_what_is_saved_is_loaded(tmp_path):
    saved = result(plots=(tradeoff(), *EVERY))
    saved.save(tmp_path / "a.json")
    loaded = Result.load(tmp_path / "a.json")
    assert loaded == saved
    assert [type(picture) for picture in loaded.plots] == [Plot, Matrix, Matrix, Surface, Surface, Arrows, Arrows]
    loaded.save(tmp_path / "b.json")
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


def objects(value):
    """Every object in JSON."""
    if isinstance(value, dict):
        yield value
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from objects(part)


@pytest.mark.parametrize("picture", [matrix(), surface(side=3), arrows(flow("a", count=2))], ids=lambda p: p.title)
def test_a_file_with_a_field_lost_added_or_of_another_kind_is_refused(picture, tmp_path):
    result(plots=(tradeoff(), picture)).save(tmp_path / "a.json")
    content = json.loads((tmp_path / "a.json").read_text())
    count = len(list(objects(content["plots"][1])))
    tried = 0
    for index in range(count):
        for key in list(list(objects(content["plots"][1]))[index]):
            for change, said in (("lose", f"lacks {key}"), ("add", "unknown more"), ("replace", "")):
                damaged = copy.deepcopy(content)
                found = list(objects(damaged["plots"][1]))[index]
                if change == "lose":
                    del found[key]
                elif change == "add":
                    found["more"] = 1
                else:
                    found[key] = {"a": 1}
                with pytest.raises(rs.SteerError, match=r"file\.plots\[1\]") as raised:
                    Result.parse(damaged, "file")
                assert said in str(raised.value)
                tried += 1
    assert tried > 50


def test_a_picture_is_known_by_its_fields(tmp_path):
    result(plots=(matrix(),)).save(tmp_path / "a.json")
    content = json.loads((tmp_path / "a.json").read_text())
    for wrong in (5, "matrix", [], None, {}, {"title": "t"}):
        with pytest.raises(rs.SteerError, match=r"file\.plots\[0\]"):
            Result.parse({**content, "plots": [wrong]}, "file")
    with pytest.raises(rs.SteerError, match=r"Result\.plots\[0\]"):
        result(plots=(Z,))
    short = {**content["plots"][0], "rows": ["only one"]}
    with pytest.raises(rs.SteerError, match=r"file\.plots\[0\]: the matrix 'Forgetting' has 1 rows of 4 values"):
        Result.parse({**content, "plots": [short]}, "file")


def test_what_is_no_number_is_an_empty_cell_of_a_matrix_and_nothing_else(tmp_path):
    diverged = matrix(values=[[math.nan, 1, math.inf, None]] * 4)
    assert diverged.values[0] == (None, 1.0, None, None)
    result(plots=(diverged,)).save(tmp_path / "a.json")
    assert Result.load(tmp_path / "a.json").plots == (diverged,)
    result(plots=(surface(side=3),)).save(tmp_path / "a.json")
    content = json.loads((tmp_path / "a.json").read_text())
    content["plots"][0]["values"][2][1] = None
    with pytest.raises(rs.SteerError, match=r"row 2 of the surface .* number 1 is none"):
        Result.parse(content, "file")


def plane(**changes):
    return surface(**{"side": 2, "values": [[1, 2], [3, 4]], "across": (0, 1), "up": (0, 1), "paths": (), **changes})


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: matrix(values=[[1, 2, 3, 4]] * 3), "4 rows of 4 values; received 3 rows of 4 values"),
        (lambda: matrix(values=[[1, 2, 3, 4]] * 3 + [[1, 2]]), "4 rows of 2 or 4 values"),
        (lambda: matrix(values=[[1, 2, 3]] * 4), "received 4 rows of 3 values"),
        (lambda: matrix(values=[]), "received 0 rows of no values"),
        (lambda: matrix(rows=(), values=[]), "at least 1 rows and 1 columns; received 0 and 4"),
        (lambda: matrix(columns=(), values=[[]] * 4), "received 4 and 0"),
        (lambda: matrix(values=[["a"] * 4] * 4), "one of float, None"),
        (lambda: matrix(rows=(1, 2, 3, 4)), "a text"),
        (lambda: matrix(1, 2, values=[[1, -2e100]]), r"row 0 of the matrix .* up to ±1e\+100; number 1 is none"),
        (lambda: matrix(1, 1, values=[[1e-300]], z=Axis("z", log=True)), "'z' of 'Forgetting' has 1e-300"),
        (lambda: plane(values=[[1, 2], [3, 1e200]]), "row 1 of the surface .* number 1 is none"),
        (
            lambda: matrix(values=[[0, 1, 2, 3]] * 4, z=Axis("z", log=True)),
            "'z' of 'Forgetting' has 0",
        ),
        (lambda: plane(values=[[1, 2]]), "2 rows of 2 values; received 1 rows"),
        (lambda: plane(values=[[1, 2], [3]]), "1 or 2 values"),
        (lambda: plane(up=(0,), values=[[1, 2]]), "at least 2 rows and 2 columns; received 1 and 2"),
        (lambda: plane(across=(0,), values=[[1], [2]]), "received 2 and 1"),
        (lambda: plane(across=(1, 0)), "across of the surface .* increases"),
        (lambda: plane(up=(1, 1)), "up of the surface .* increases"),
        (lambda: plane(up=(0, math.nan)), "up of the surface .* number 1 is none"),
        (lambda: plane(values=[[1, 2], [math.nan, 4]]), "row 1 of the surface .* number 0 is none"),
        (lambda: plane(values=[[1, 2], [None, 4]]), "number 0 is none"),
        (lambda: plane(values=[[1, 2], [0, 4]], z=Axis("z", log=True)), "positive numbers .* 'z' of .* has 0"),
        (lambda: plane(x=Axis("x", log=True)), "positive numbers .* 'x' of .* has 0"),
        (lambda: plane(up=(1, 2), y=Axis("y", log=True), paths=(Trajectory("a", (1,), (-1,)),)), "'y' of .* has -1"),
        (lambda: plane(paths=(Trajectory("a", (0,), (0,)),) * 2), "paths have different names; received 'a', 'a'"),
        (lambda: Trajectory("a", (), ()), "at least one point, with as many x as y; received 0 x, 0 y"),
        (lambda: Trajectory("a", (1, 2), (1,)), "received 2 x, 1 y"),
        (lambda: Trajectory("a", (1, math.inf), (1, 2)), "x of the path 'a' has finite numbers up to .*; number 1"),
        (lambda: Flow("a", (1,), (1,), (1,), ()), "received 1 x, 1 y, 1 dx, 0 dy"),
        (lambda: Flow("a", (), (), (), ()), "at least one point"),
        (lambda: Flow("a", (1,), (1,), (math.nan,), (1,)), "dx of the flow 'a'"),
        (lambda: Flow("a", (1,), (1,), (1,), (1,), ("g", "h")), "1 arrows and 2 groups"),
        (lambda: Arrows("t", X, Y, ()), "1 to 4 panels; 't' has 0"),
        (lambda: arrows(*(flow(name, count=1) for name in "abcde")), "has 5"),
        (lambda: arrows(flow("a"), flow("a")), "panels have different names"),
        (lambda: arrows(flow("a", groups=("g",)), flow("b")), "all panels of arrows have groups or none"),
        (lambda: arrows(x=Axis("x", log=True)), "linear axes"),
    ],
)
def test_what_makes_no_sense_is_refused_when_it_is_made(make, said):
    with pytest.raises(rs.SteerError, match=said):
        make()


def test_tables_beside_pictures():
    table = numbers_of(forgetting())
    assert table.title == "Forgetting: accuracy (%)"
    assert [column.label for column in table.columns[1:]] == list(forgetting().columns)
    assert list(table.rows[1].values()) == ["SVHN", 83.0, 91.0, None, None, None]
    upside = numbers_of(plane())
    assert [list(row.values()) for row in upside.rows] == [["1", 3.0, 4.0], ["0", 1.0, 2.0]]  # as it is seen
    moves = numbers_of(arrows(flow("a", count=3, groups=("g", "h")), flow("b", count=2, groups=("g",))))
    assert [(row["name"], row["group"]) for row in moves.rows] == [(*"ag",), (*"ah",), (*"ag",), (*"bg",), (*"bg",)]
    assert numbers_of(matrix(61, 2)) is None
    assert numbers_of(matrix(2, 24)) is None


def test_pictures_in_words():
    assert alt_text(forgetting()) == (
        "Forgetting. Heat map of 5 × 5 cells: accuracy (%) by after training on (rows) and evaluated on (columns), "
        "from 62 to 94."
    )
    assert "Paths over it: frozen; H-Res." in alt_text(surface())
    assert "H-Res (40); LoRA (40)." in alt_text(arrows())
    assert remarks(forgetting()) == ["A hatched cell has no number."]
    assert remarks(matrix()) == remarks(surface()) == remarks(arrows()) == []
    outside = surface(paths=(Trajectory("a", (0, 9), (0, 0)), Trajectory("b", (0, 1), (0, 0))))
    assert remarks(outside) == ["Beyond the plane that was measured, for a part of the way: a."]
    assert [*styles_of(EVERY)] == ["frozen", "H-Res", "LoRA"]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A report of all of them, and a big matrix that is an image."""
    pytest.importorskip("matplotlib")
    folder = tmp_path_factory.mktemp("pictures")
    long = arrows(flow("H-Res", length=9.0), notes=("Own note.",))
    result(title="Pictures", plots=(forgetting(), surface(side=5, title=NASTY), long, matrix(51, 51))).save(
        folder / "a.json"
    )
    assert main([str(folder)]) == 0
    return folder


def test_the_pages_have_the_pictures(report):
    text = (report / "report.html").read_text()
    pictures = re.findall(r'<svg role="img" aria-label="([^"]*)"', text)
    assert [picture.partition(":")[0] for picture in pictures] == [
        "Forgetting. Heat map of 5 × 5 cells",
        "a &lt;b&gt; &amp; &quot;c&quot; $d_e$ \\f. Contours",
        "Displacement of the stream. Arrows",
        "Forgetting. Heat map of 51 × 51 cells",
    ]
    assert text.count("<title>") == 1  # of the page; a picture's would only hide its label
    assert text.count("<summary>The numbers</summary>") == 3
    ids = re.findall(r'\bid="([^"]*)"', text)
    assert len(ids) == len(set(ids))
    assert {name[1:] for name in re.findall(r"url\(([^)]*)\)", text)} <= set(ids)
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in re.findall(r'href="([^"]*)"', text))
    page = (report / "report.md").read_text()
    assert page.count("](pictures/recall-") == 4
    for note in ("A hatched cell has no number.", "Own note.", "Arrows are drawn at 1/"):
        assert f"<li>{note}" in text
        assert f"- {note}" in page
    for index in range(1, 5):
        root = ElementTree.parse(report / "pictures" / f"recall-{index}.svg").getroot()
        assert root[0].tag.endswith("title")
    assert ElementTree.parse(report / "pictures" / "recall-2.svg").getroot()[0].text == NASTY


@pytest.mark.parametrize("picture", [matrix(2, 2), surface(side=3), arrows(flow("a")), ranks()], ids=lambda p: p.title)
def test_a_picture_is_written_by_the_ending_of_its_name(picture, tmp_path):
    pytest.importorskip("matplotlib")
    picture.save(tmp_path / "new" / "a.svg")
    picture.save(tmp_path / "a.PNG")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.svg"]
    written = (tmp_path / "new" / "a.svg").read_text()
    assert written == picture._repr_svg_()
    assert f"<title>{picture.title}</title>" in written
    content = (tmp_path / "a.PNG").read_bytes()
    assert content[:4] == b"\x89PNG"
    assert struct.unpack(">I", content[16:20]) == (round(7.2 * DPI),)


def test_a_picture_that_cannot_be_written_is_an_error(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    for name in ("a.pdf", "a", "svg", "a.svg.gz"):
        with pytest.raises(rs.SteerError, match=r"\.svg or \.png; received"):
            matrix().save(tmp_path / name)
    (tmp_path / "file").touch()
    with pytest.raises(rs.SteerError, match="could not make the folder"):
        matrix(2, 2).save(tmp_path / "file" / "a.svg")
    (tmp_path / "b.svg").mkdir()
    with pytest.raises(rs.SteerError, match="could not write"):
        matrix(2, 2).save(tmp_path / "b.svg")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for picture in (*EVERY, tradeoff()):
        with pytest.raises(rs.SteerError, match=r"pip install 'residual-steer\[plots\]'"):
            picture.save(tmp_path / "c.png")
        assert picture._repr_svg_() is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.svg", "file"]


def test_a_table_prints_as_markdown():
    table = result().tables[0]
    assert str(table).splitlines() == [
        "**Recall**",
        "",
        "| method | accuracy (%) ↑ |",
        "|--------|---------------:|",
        "| H-Res  |   82.25 ± 0.21 |",
        "| LoRA   |              – |",
        "",
        "- Mean ± sample standard deviation over 2 seeds.",
        "- A note.",
    ]
    assert isinstance(table, Table)
    assert repr(table).startswith("Table(title='Recall'")


def test_pages_without_a_drawing_need_no_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for page in (html, markdown):
        assert "Heat map" in page([result(plots=EVERY)], lambda found, index: "<svg/>")
