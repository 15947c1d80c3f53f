"""The report and the list of claims, from a folder of results to files, and the command that makes them."""

import json
import re
import sys
from html.parser import HTMLParser

import pytest

import residual_steer as rs
from report_samples import bars, result, tradeoff
from residual_steer.report import Column, Measured, Result, Table, Verdict
from residual_steer.report.__main__ import main
from residual_steer.report.claims import CLAIMS, claims_page
from residual_steer.report.folder import read_folder
from residual_steer.report.html import html, inline
from residual_steer.report.markdown import code, escaped, fenced, markdown, table_lines

NASTY = '<script>alert("1")</script> a|b & *c* _d_ `e` [f](g) $h$ ~i~ \\j'
VOID = {"meta", "br", "img", "hr", "link", "input"}


def no_picture(result, index):
    return "<svg/>"


def a_path(result, index):
    return f"pictures/{result.name}-{index + 1}.svg"


class Page(HTMLParser):
    """A page, held against the rules that browsers forgive."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.ids, self.links, self.tags, self.data = [], [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.note(tag, attributes)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.note(tag, attributes)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.data.append((self.open[-1] if self.open else "", data))

    def note(self, tag, attributes):
        found = dict(attributes)
        assert len(found) == len(attributes)
        self.tags.append((tag, found))
        self.ids += [found["id"]] if "id" in found else []
        self.links += [value for key, value in attributes if key in {"src", "href", "xlink:href", "action", "data"}]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """A folder as experiments leave it, with other things in it."""
    folder = tmp_path_factory.mktemp("results")
    first = result(name="speed", title=f"Speed {NASTY}", about=NASTY, plots=(tradeoff(),), command="x '</pre>'")
    first.save(folder / "speed.json")
    judged = (
        Verdict(1, "does not hold", "3.78", "4.1 ± 0.2", "python a.py"),
        Verdict(9, "can't be tested here", "–", NASTY, "b | `c`", "a GPU"),
    )
    result(name="bars-1", title="Bars", plots=(bars(),), verdicts=judged).save(folder / "deep" / "bars.json")
    result(name="a.plain", title="Plain", plots=(), tables=(), verdicts=()).save(folder / "deep" / "er" / "plain.json")
    (folder / "other.json").write_text(json.dumps({"format": "something else"}))
    (folder / "list.json").write_text("[]")
    (folder / "half.json").write_text('{"format": "residual_steer.result", "na')
    (folder / "notes.txt").write_text("no JSON")
    return folder


@pytest.fixture(scope="module")
def report(results, tmp_path_factory):
    pytest.importorskip("matplotlib")
    out = tmp_path_factory.mktemp("report") / "new"
    assert main([str(results), "--out", str(out)]) == 0
    return out


def test_every_file_is_there_and_named(results, report, capsys, tmp_path):
    claims = tmp_path / "docs" / "OURS.md"
    assert main([str(results), "--out", str(tmp_path / "again"), "--claims", str(claims)]) == 0
    printed = capsys.readouterr().out.splitlines()
    skipped = [line for line in printed if line.startswith("skipped: ")]
    assert [line.split()[1].rpartition("/")[2] for line in skipped] == ["half.json", "list.json", "other.json"]
    wrote = {line.removeprefix("wrote ") for line in printed if line not in skipped}
    again = {str(path) for path in [*(tmp_path / "again").rglob("*"), claims] if path.is_file()}
    assert wrote == again
    names = {path.relative_to(report).as_posix() for path in report.rglob("*") if path.is_file()}
    pictures = {f"pictures/{name}-1.{kind}" for name in ("speed", "bars-1") for kind in ("svg", "png")}
    assert names == {"report.md", "report.html", "CLAIMS.md", *pictures}
    for name in names:
        other = claims if name == "CLAIMS.md" else tmp_path / "again" / name
        assert (report / name).read_bytes() == other.read_bytes()


def test_the_report_lies_beside_the_results_unless_told_otherwise(tmp_path, capsys):
    result(plots=()).save(tmp_path / "a.json")
    assert main([str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"a.json", "report.md", "report.html", "CLAIMS.md"}
    assert main([str(tmp_path)]) == 0  # again, over what is there


def test_errors_are_one_line(tmp_path, capsys, monkeypatch):
    def said(*arguments):
        assert main([str(argument) for argument in arguments]) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        return error

    assert "holds no result" in said(tmp_path)
    assert "read from a folder" in said(tmp_path / "none")
    result().save(tmp_path / "a.json")
    result().save(tmp_path / "b.json")
    assert "both called 'recall'" in said(tmp_path)
    (tmp_path / "b.json").unlink()
    (tmp_path / "file").touch()
    assert "could not make the folder" in said(tmp_path, "--out", tmp_path / "file" / "x")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib", None)
        assert "residual-steer[plots]" in said(tmp_path, "--out", tmp_path / "x")
    assert not (tmp_path / "x").exists()
    content = json.loads((tmp_path / "a.json").read_text())
    content["tables"][0]["titel"] = content["tables"][0].pop("title")
    (tmp_path / "a.json").write_text(json.dumps(content))
    assert "a.json.tables[0] lacks title" in said(tmp_path)  # a report must not silently lack a result


def test_results_come_in_the_order_of_their_names(results):
    assert [found.name for found in read_folder(results)[0]] == ["a.plain", "bars-1", "speed"]


def test_the_page_is_whole_and_fetches_nothing(report):
    text = (report / "report.html").read_text()
    page = Page(text)
    assert len(page.ids) == len(set(page.ids))
    assert page.links
    assert all(link.startswith("#") and link[1:] in page.ids for link in page.links)
    assert set(re.findall(r"url\(([^)]*)\)", text)) <= {f"#{name}" for name in page.ids}
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "link", "iframe", "object", "img", "base", "form"}
    assert "@import" not in text
    assert "prefers-color-scheme: dark" in text
    assert "<metadata" not in text
    assert all(key[:2] != "on" for _, attributes in page.tags for key in attributes)


def test_the_page_can_be_read_by_everybody(report):
    page = Page((report / "report.html").read_text())
    tags = page.tags
    assert tags[0] == ("html", {"lang": "en"})
    pictures = [attributes for tag, attributes in tags if tag == "svg"]
    assert len(pictures) == 2
    assert all(picture["role"] == "img" and len(picture["aria-label"]) > 40 for picture in pictures)
    assert {attributes["scope"] for tag, attributes in tags if tag == "th"} == {"row", "col"}
    assert sum(tag == "caption" for tag, _ in tags) == sum(tag == "table" for tag, _ in tags) >= 5
    assert [tag for tag, _ in tags if re.fullmatch(r"h[1-6]", tag)][:3] == ["h1", "h2", "h2"]
    assert sum(tag == "main" for tag, _ in tags) == sum(tag == "nav" for tag, _ in tags) == 1
    titles = [data for tag, data in page.data if tag == "h2"]
    assert f"Speed {NASTY}" in titles
    assert [data for tag, data in page.data if tag == "summary"] == ["The numbers"] * 2


def test_pictures_follow_light_and_dark(report):
    text = (report / "report.html").read_text()
    assert "fill: var(--ink)" in text
    assert "#1b1b1f" not in text.partition("</style>")[2]
    assert "#1b1b1f" in (report / "pictures" / "speed-1.svg").read_text()
    assert "#0072b2" in text


def test_an_inline_picture_keeps_its_ids_to_itself():
    drawn = (
        '<?xml version="1.0"?>\n<!DOCTYPE svg>\n<svg width="1pt" height="2pt" viewBox="0 0 1 2">\n <defs>\n'
        '  <style type="text/css">*{stroke: red}</style>\n </defs><!-- a > b -->'
        '<path id="p"/><use xlink:href="#p" style="fill: #1b1b1f" clip-path="url(#c)"/></svg>\n'
    )
    found = inline(drawn, 'a "b" <c>', "n-1")
    assert found.startswith('<svg role="img" aria-label="a &quot;b&quot; &lt;c&gt;"')
    assert '<path id="n-1-p"/><use xlink:href="#n-1-p" style="fill: var(--ink)" clip-path="url(#n-1-c)"/>' in found
    assert not any(part in found for part in ("<!--", "<style", "width=", "DOCTYPE"))
    assert 'viewBox="0 0 1 2"' in found


def test_best_cells_are_marked_on_both_pages():
    columns = (Column("m", "method"), Column("a", "accuracy", "%", "up", 1))
    table = Table("t", columns, ({"m": "x", "a": 80.0}, {"m": "y|z", "a": Measured.of([82.0, 82.5])}))
    some = [result(tables=(table,), plots=())]
    assert '<td class="number"><strong>82.2 ± 0.4</strong></td>' in html(some, no_picture)
    assert '<th scope="col" class="number">accuracy (%) ↑</th>' in html(some, no_picture)
    lines = [line for line in markdown(some, a_path).splitlines() if line.startswith("|")]
    assert lines[-4:] == [
        "| method | accuracy (%) ↑ |",
        "|--------|---------------:|",
        "| x      |           80.0 |",
        r"| y\|z   | **82.2 ± 0.4** |",
    ]


def cells(line):
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def test_markdown_shows_texts_as_they_are(report):
    text = (report / "report.md").read_text()
    assert "<script" not in text
    assert "![Quality against speed. Points:" in text
    assert "](pictures/speed-1.svg)" in text
    tables = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    assert len(tables) >= 3
    for lines in tables:
        assert len({len(line) for line in lines}) == 1
        assert len({len(cells(line)) for line in lines}) == 1
    assert "```\nx '</pre>'\n```" in text
    assert re.search(r'^<a id="bars-1"></a>$', text, re.MULTILINE)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a|b", r"a\|b"),
        ("<b>&amp;", "&lt;b&gt;&amp;amp;"),
        ("*a* _b_ snake_case", r"\*a\* \_b\_ snake_case"),
        ("`a` [b](c) $d$ ~e~", r"\`a\` \[b\](c) \$d\$ \~e\~"),
        ("a\\b", "a\\\\b"),
        ("two\nlines", "two lines"),
        ("# a", r"\# a"),
        ("- a", r"\- a"),
        ("-0.5", "-0.5"),
        ("---", r"\---"),
        ("===", r"\==="),
        ("1. a", r"1\. a"),
        ("3.18 ± 0.03", "3.18 ± 0.03"),
        ("–", "–"),
    ],
)
def test_escaping_for_markdown(text, shown):
    assert escaped(text) == shown


def test_code_in_markdown():
    assert code("a `b` c") == "``a `b` c``"
    assert code("`a`") == "`` `a` ``"
    assert code("a\nb") == "`a b`"
    assert code("") == ""
    assert fenced("a ``` b") == "````\na ``` b\n````"
    assert table_lines(["a", "b"], [], [False, True]) == ["| a   |   b |", "|-----|----:|"]


def sections(text):
    return dict(enumerate(text.split('<a id="claim-')[1:], start=1))


def test_claims_without_a_verdict_are_not_run_and_have_no_number_of_ours():
    page = claims_page([])
    for claim in CLAIMS:
        section = sections(page)[claim.number]
        assert "**not run here**" in section
        assert escaped(claim.paper) in section
        assert escaped(claim.missing) in section
        assert "Ours" not in section
        assert claim.command in section
    assert [claim.number for claim in CLAIMS] == list(range(1, 11))
    rows = [cells(line) for line in page.splitlines() if line.startswith("| [")]
    assert [row[2] for row in rows] == ["not run here"] * 10


def test_claims_list_every_verdict_with_what_is_needed_to_get_it_again(report):
    page = (report / "CLAIMS.md").read_text()
    first = sections(page)[1]
    assert first.index("**does not hold**, by Bars (`bars-1`)") < first.index("**holds**, by Speed")
    assert "- Ours: 4.1 ± 0.2\n- Held against, of the paper: 3.78\n- Seeds: 0–2 (3)\n- Command: `python a.py`" in first
    assert "- Hardware: no GPU, a CPU\n- Versions: python 3.11" in first
    assert first.count("- Missing: ") == 1
    assert "`` b | `c` ``" in sections(page)[9]
    rows = [cells(line) for line in page.splitlines() if line.startswith("| [")]
    assert [row[2] for row in rows][:2] == ["does not hold; holds", "not run here"]
    assert "<script" not in page
    assert "3.78 against 5.17" in first


def test_the_words_of_the_claims_are_the_papers():
    """The numbers of the paper's abstract, table 1 and table 2."""
    words = {claim.number: claim.paper for claim in CLAIMS}
    for number, told in ((1, "3.78"), (1, "5.17"), (1, "5.61"), (3, "59.37"), (3, "46.83"), (4, "79.37"), (4, "82.14")):
        assert told in words[number]


def test_the_command_runs_as_a_module_and_needs_no_matplotlib_without_plots(tmp_path, monkeypatch):
    import runpy

    result(plots=()).save(tmp_path / "a.json")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(sys, "argv", ["report", str(tmp_path)])
    monkeypatch.delitem(sys.modules, "residual_steer.report.__main__")
    with pytest.raises(SystemExit) as left:
        runpy.run_module("residual_steer.report", run_name="__main__")
    assert left.value.code == 0
    assert (tmp_path / "report.html").exists()


def test_a_result_that_names_no_result_is_refused():
    with pytest.raises(rs.SteerError, match="is no result"):
        Result.parse({"format": "other"}, "x")
