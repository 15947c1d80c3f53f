"""From entries to tables: rows, numbers and notes, and that the report can show them."""

import json
import math
from dataclasses import replace

import pytest

import residual_steer as rs
from experiments.cells import table_markdown
from experiments.problem import Arm
from experiments.results import Column, Measured, Result, Table
from experiments.sweep import Entry, Run, sweep
from experiments.tables import comparison, measured, records
from studies import HRES, LINEAR, LORA, PROMPT, problem_of

COLUMN = Column("loss", "loss", "", "down", 2)
RATES = (1e-3, 1e-2, 1e-1)


def run(rate=1e-2, seed=0, loss=0.5, merged=None, seconds=0.02):
    scores = None if loss is None else {"loss": loss}
    return Run(
        rate,
        seed,
        scores,
        scores,
        None if merged is None else {"loss": merged},
        50,
        1000,
        seconds if scores else None,
        2.0,
    )


def entry(name, losses=(0.5, 0.7), rate=1e-2, rates=RATES, method="hres"):
    runs = tuple(run(rate, seed, loss) for seed, loss in enumerate(losses))
    trials = tuple(runs[0] if each == rate else run(each, 0, 0.9) for each in rates)
    return Entry(Arm(name, method, rates), rate, trials, runs)


LOST = Entry(Arm("lost", "hres", RATES), None, tuple(run(rate, 0, None) for rate in RATES), ())
REFUSED = Entry(Arm("refused", "prompt", RATES), None, (), (), "no words here.")


def table_of(*entries, **more):
    return comparison("Losses", problem_of(), entries, COLUMN, **more)


def test_a_row_for_every_method():
    table = table_of(entry("good"), entry("one", (0.25,)), scale=100)
    assert isinstance(table, Table)
    assert [row["method"] for row in table.rows] == ["good", "one"]
    good = table.rows[0]
    assert good["trainable"] == 50
    assert good["share"] == pytest.approx(5.0)  # per cent of 1000
    assert good["rate"] == "0.01"
    assert good["step"] == pytest.approx(20.0)  # milliseconds
    assert good["loss"] == Measured.of([50.0, 70.0])
    untimed = table_of(entry("good"), timed=False)
    assert {"trainable", "loss"} < untimed.rows[0].keys()
    assert "step" not in untimed.rows[0]
    assert all(column.key != "step" for column in untimed.columns)
    assert table.rows[1]["loss"] == Measured(25.0, 0.0, 1)
    assert {column.key: column.unit for column in table.columns} == {
        "method": "", "trainable": "", "share": "%", "rate": "", "loss": "", "step": "ms"
    }  # fmt: skip


def test_the_time_of_a_step_is_the_median_over_seeds_that_have_one():
    times = [run(seed=seed, seconds=seconds) for seed, seconds in enumerate([0.01, 0.5, 0.03])]
    given = Entry(Arm("a", "hres", (1e-2,)), 1e-2, (times[0],), (*times, run(seed=3, loss=None)))
    assert table_of(given).rows[0]["step"] == pytest.approx(30.0)


def test_what_has_no_number_shows_none_and_a_note_says_why():
    partly = entry("partly", (0.5, None, 0.6))
    nan = entry("nan", (0.5, math.nan))
    table = table_of(entry("good", (0.1, 0.2, 0.3)), partly, nan, LOST, REFUSED)
    rows = {row["method"]: row for row in table.rows}
    assert [name for name, row in rows.items() if row["loss"] is None] == ["partly", "nan", "lost", "refused"]
    assert (rows["lost"]["trainable"], rows["lost"]["rate"], rows["lost"]["step"]) == (50, None, None)
    assert rows["partly"]["rate"] == "0.01"
    assert set(rows["refused"]) == {"method", "loss"}
    about, *notes = table.notes
    assert notes == [
        "refused: no words here.",
        "Diverged at every learning rate: lost.",
        "Diverged with some of the seeds at the best learning rate, so that it has no number: partly (1), nan (1).",
    ]
    assert about == (
        "Steps for every method: 3. Learning rates tried with the first seed: 3; the best on validation data is used "
        "with every seed, of which there are 3. Measured on test data."
    )


def test_notes_say_how_many_rates_there_were_and_which_were_at_the_edge():
    table = table_of(entry("low", rate=1e-3), entry("high", rate=1e-1), entry("inner"), entry("one", rates=(1e-2,)))
    assert "first seed: 1 to 3;" in table.notes[0]
    assert table.notes[1:] == (
        "Best at the edge of the rates tried, so that a better one may lie beyond: low (0.001), high (0.1).",
    )
    assert len(table_of(entry("inner")).notes) == 1
    assert "first seed: 0; " in table_of(REFUSED).notes[0]
    assert "there are 0." in table_of(REFUSED).notes[0]


def test_measured_is_none_where_there_is_no_number():
    assert measured(entry("a", (1.0, 2.0)), "loss", scale=2.0) == Measured.of([2.0, 4.0])
    for other in (LOST, REFUSED, entry("a", (1.0, None)), entry("a", (1.0, math.inf))):
        assert measured(other, "loss") is None
    assert measured(entry("a"), "loss", merged=True) is None
    with pytest.raises(rs.SteerError, match="a score is one of loss; received 'accuracy'"):
        measured(entry("a"), "accuracy")


def test_lora_has_a_second_row_if_it_is_wanted():
    runs = tuple(run(seed=seed, loss=0.5, merged=0.5 + seed) for seed in range(2))
    lora = Entry(Arm("LoRA", "lora", (1e-2,)), 1e-2, runs[:1], runs)
    assert [row["method"] for row in table_of(entry("a"), lora).rows] == ["a", "LoRA"]
    rows = table_of(entry("a"), lora, replace(LOST, arm=Arm("l", "lora", RATES)), merged=True, scale=10).rows
    assert [row["method"] for row in rows] == ["a", "LoRA", "LoRA, merged", "l"]
    assert rows[2] == {"method": "LoRA, merged", "loss": Measured.of([5.0, 15.0])}
    partly = replace(lora, runs=(runs[0], run(seed=1, loss=None)))
    assert [row["loss"] for row in table_of(partly, merged=True).rows] == [None, None]


def test_records_hold_every_run_once():
    chosen = entry("a")
    found = records(problem_of(), [chosen, LOST, REFUSED])
    assert len(found) == len(chosen.every) + len(LOST.every) + 1
    assert [(one["rate"], one["seed"]) for one in found if one.get("chosen")] == [(1e-2, 0), (1e-2, 1)]
    assert found[-1] == {"problem": "images", "method": "refused", "options": {}, "refused": "no words here."}
    assert not any(one["chosen"] for one in found if one["method"] == "lost")
    assert found[0]["test"] == {"loss": 0.9}


def test_a_real_study_goes_through_the_report(tmp_path):
    pytest.importorskip("timm")
    pytest.importorskip("peft")
    problem = problem_of(score=lambda model, split, seed: {"loss": 1.0, "strange": math.nan})
    entries = sweep(problem, [HRES, LORA, LINEAR, PROMPT], (0, 1), progress=False)
    table = comparison("Images", problem, [*entries, LOST], COLUMN, merged=True)
    text = table_markdown(table)
    for name in ("H-Res", "LoRA", "LoRA, merged", "head alone", "prompt", "lost"):
        assert f"| {name}" in text
    assert "'vpt-shallow'" in text
    result = Result("study", "Study", "About.", "python study.py", (0, 1), {}, {}, {}, (table,),
                    records=records(problem, entries))  # fmt: skip
    result.save(tmp_path / "study.json")
    assert Result.load(tmp_path / "study.json").tables == (table,)
    kept = json.loads((tmp_path / "study.json").read_text())["records"]
    assert kept[0]["test"] == {"loss": 1.0, "strange": None}  # JSON has no NaN
