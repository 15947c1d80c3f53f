"""Numbers as texts, which are marked as the best, and how methods look."""

import math

import pytest

from report_samples import METHODS, bars, curves, ranks, result, tradeoff
from residual_steer.report import Axis, Column, Measured, Plot, Series, Table, Verdict
from residual_steer.report.cells import best_of, head_of, is_numeric, notes_of, shown, text_of
from residual_steer.report.facts import duration, facts_of, hardware, paragraphs, seeds_of, verdicts_of
from residual_steer.report.styles import styles_for
from residual_steer.report.values import numbers_of


@pytest.mark.parametrize(
    ("cell", "digits", "text"),
    [
        (None, 2, "–"),
        ("", 2, "–"),
        ("LoRA", 2, "LoRA"),
        (math.nan, 2, "–"),
        (Measured.of([1.0, math.nan]), 2, "–"),
        (1234567, 2, "1,234,567"),
        (1234.5, 1, "1,234.5"),
        (82.1432, 2, "82.14"),
        (-0.5, 1, "−0.5"),
        (0.0, 3, "0.000"),
        (0.00001234, 3, "1.2e-05"),
        (1e20, 3, "1.0e+20"),
        (Measured(82.1432, 0.3123, 3), 2, "82.14 ± 0.31"),
        (Measured(82.1432, 0.00004, 3), 2, "82.14 ± 4.0e-05"),
        (Measured(82.1432, 0.0, 3), 2, "82.14 ± 0.00"),
        (Measured(82.1432, 0.0, 1), 2, "82.14"),
    ],
)
def test_cells_as_texts(cell, digits, text):
    assert text_of(cell, digits) == text


UP, DOWN = Column("a", "a", better="up"), Column("a", "a", better="down")


@pytest.mark.parametrize(
    ("column", "cells", "best"),
    [
        (UP, [1.0, 3.0, 2.0], {1}),
        (DOWN, [1.0, 3.0, 2.0], {0}),
        (Column("a", "a"), [1.0, 3.0], set()),
        (UP, [3.0, 1.0, 3.0], {0, 2}),
        (UP, [3.00001, 1.0, 3.0], {0, 2}),  # they read the same
        (UP, [3.0, 3.0], set()),  # nobody stands out
        (UP, [3.0], set()),
        (UP, [3.0, None, "n/a", math.nan], set()),
        (UP, [None, 3.0, 1], {1}),
        (UP, [Measured(3, 0.3, 5), Measured(2.5, 0.3, 5), Measured(1, 0.1, 5)], {0, 1}),
        (UP, [Measured(3, 0.2, 5), Measured(2.5, 0.2, 5), Measured(1, 0.1, 5)], {0}),
        (UP, [Measured(3, 0.3, 5), Measured(2.5, 0.3, 5)], set()),
        (DOWN, [Measured(3, 0.1, 5), Measured(2.5, 0.0, 1), Measured.of([math.nan, 1.0])], {1}),
        (DOWN, [Measured(2.55, 0.1, 5), Measured(2.5, 0.0, 1), 9], {0, 1}),
    ],
)
def test_the_best_is_marked_with_all_that_cannot_be_told_apart_from_it(column, cells, best):
    assert best_of(column, cells) == best


def test_rows_heads_and_notes():
    columns = (Column("m", "method"), Column("a", "accuracy", "%", "up", 1), Column("n", "note"))
    rows = ({"m": "H-Res", "a": Measured.of([82, 84])}, {"m": "LoRA", "a": Measured.of([70, 71, 72]), "n": "x"})
    table = Table("t", columns, rows, ("Own note.",))
    assert [[(cell.text, cell.best) for cell in row] for row in shown(table)] == [
        [("H-Res", False), ("83.0 ± 1.4", True), ("–", False)],
        [("LoRA", False), ("71.0 ± 1.0", False), ("x", False)],
    ]
    assert [head_of(column) for column in columns] == ["method", "accuracy (%) ↑", "note"]
    assert [is_numeric(table, column) for column in columns] == [False, True, False]
    first, second, last = notes_of(table)
    assert first == "Mean ± sample standard deviation over 2 to 3 seeds."
    assert "no more than both spreads" in second
    assert last == "Own note."


def test_notes_say_only_what_is_there():
    def notes(*cells, better="up"):
        return notes_of(Table("t", (Column("a", "a", better=better),), tuple({"a": cell} for cell in cells)))

    assert notes(1, "a", better=None) == []
    assert notes(1) == []
    assert notes(1, 2) == ["Bold: the best of a column; nothing is bold where that is every row."]
    assert notes(Measured.of([1])) == ["One seed, which has no spread."]
    assert notes(Measured.of([1]), Measured.of([1, 2]), better=None) == [
        "Mean ± sample standard deviation over 2 seeds. A number without ± is of a single seed."
    ]


def test_a_table_without_rows():
    assert shown(Table("t", (UP,), ())) == []


def test_the_numbers_of_a_plot():
    assert [column.label for column in numbers_of(curves()).columns] == ["steps", *METHODS]
    assert [row["x"] for row in numbers_of(curves()).rows] == list(range(0, 501, 50))
    assert [row["x"] for row in numbers_of(bars()).rows] == ["CIFAR-100", "SVHN", "digits 5–9"]
    points = numbers_of(tradeoff())
    assert [row["name"] for row in points.rows] == list(METHODS)
    assert points.rows[0]["y"] == tradeoff().series[0].y[0]
    assert [column.key for column in points.columns] == ["name", "x", "y"]
    assert [row["label"] for row in numbers_of(ranks()).rows][:4] == ["r = 4", "r = 16", "r = 64", "r = 4"]
    cloud = Series("a", tuple(range(100)), (1.0,) * 100)
    assert numbers_of(Plot("p", "scatter", Axis("x"), Axis("y"), (cloud,))) is None


def test_how_it_was_made():
    facts = dict(facts_of(result()))
    assert facts["seeds"] == "0–2 (3)"
    assert facts["hardware"] == "no GPU, a CPU"
    assert facts["took"] == "1.5 s"
    assert facts["setting: rates"] == "H-Res 0.02"
    assert seeds_of(result(seeds=(7,))) == "7"
    assert seeds_of(result(seeds=(0, 2, 4))) == "0, 2, 4"
    assert seeds_of(result(seeds=())) == "–"
    assert [duration(seconds) for seconds in (0, 59.96, 200, 7500)] == ["–", "60 s", "3 min 20 s", "2 h 5 min"]
    assert hardware({}) == "–"
    assert hardware({"gpu": "H100", "cpu": "X", "cores": 8, "threads": 4, "system": "Linux", "node": 3}) == (
        "H100, X, 8 cores, 4 threads, Linux, node 3"
    )
    assert paragraphs(" a\nb\n \nc ") == ["a\nb", "c"]


def test_a_method_looks_the_same_in_every_plot_and_like_no_other():
    few, many = styles_for(["H-Res", "LoRA"]), styles_for([*METHODS, *(f"method {i}" for i in range(40))])
    assert few["H-Res"] == many["H-Res"]
    assert few["LoRA"] == many["LoRA"]
    looks = [(style.color, style.marker) for style in many.values()]
    assert len(set(looks)) == len(looks) == 48
    assert styles_for(reversed([*many])) == many
    eight = styles_for(METHODS)
    assert len({style.color for style in eight.values()}) == len({style.marker for style in eight.values()}) == 8
    assert styles_for(["h-res"])["h-res"] == few["H-Res"]


def test_verdicts_come_by_claim_and_then_by_result():
    def judged(name, *claims):
        return result(name=name, verdicts=tuple(Verdict(claim, "holds", "", "", "") for claim in claims))

    pairs = verdicts_of([judged("a", 9, 2), judged("b", 1, 9)])
    assert [(verdict.claim, found.name) for verdict, found in pairs] == [(1, "b"), (2, "a"), (9, "a"), (9, "b")]
