"""Results of experiments: what they hold, and that a file says exactly that or is refused."""

import math

import numpy as np
import pytest

import residual_steer as rs
from residual_steer.report import (
    Axis,
    Column,
    Measured,
    Plot,
    Result,
    Series,
    Table,
    Verdict,
)


def result(**changes):
    """A small result with something of everything."""
    fields = {
        "name": "recall",
        "title": "Associative recall",
        "about": "Key and value pairs.\n\nFour of them.",
        "command": "python -m residual_steer.recall --steps 5",
        "seeds": (0, 1, 2),
        "settings": {"steps": 5, "rates": {"H-Res": 0.02}},
        "machine": {"cpu": "a CPU", "gpu": None},
        "versions": {"python": "3.11"},
        "tables": (
            Table(
                "Recall",
                (Column("method", "method"), Column("accuracy", "accuracy", "%", "up", 2)),
                ({"method": "H-Res", "accuracy": Measured.of([82.1, 82.4])}, {"method": "LoRA", "accuracy": None}),
                ("A note.",),
            ),
        ),
        "plots": (Plot("Recall", "lines", Axis("steps"), Axis("loss", "nats", True), (Series("H-Res", (1,), (2.5,)),)),),
        "verdicts": (Verdict(1, "holds", "3.78", "1.2 ± 0.1", "python -m residual_steer.recall", "SQuAD"),),
        "seconds": 1.5,
        "records": [{"seed": 0, "losses": [2.5, 1.0]}],
    }  # fmt: skip
    return Result(**{**fields, **changes})


def test_what_is_saved_is_loaded(tmp_path):
    saved = result()
    saved.save(tmp_path / "new" / "recall.json")
    loaded = Result.load(tmp_path / "new" / "recall.json")
    assert loaded == saved
    loaded.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "new" / "recall.json").read_bytes()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["recall.json"]


def test_measured_over_seeds():
    assert Measured.of([1.0, 2.0, 4.0]).mean == pytest.approx(7 / 3)
    assert Measured.of([1.0, 2.0, 4.0]).spread == pytest.approx(np.std([1.0, 2.0, 4.0], ddof=1))
    assert Measured.of([5]) == Measured(5.0, 0.0, 1)
    assert math.isnan(Measured.of([5, math.inf]).mean)
    assert Measured.of([5, math.nan]).count == 2
    for wrong in ((1.0, 0.5, 1), (1.0, -0.1, 2), (1.0, 0.0, 0)):
        with pytest.raises(rs.SteerError, match="count of 1 or more"):
            Measured(*wrong)
    with pytest.raises(rs.SteerError, match="at least one seed"):
        Measured.of([])


def test_a_measured_number_reads_as_far_as_its_spread_goes():
    assert str(Measured(82.1432, 0.3123, 3)) == "82.14 ± 0.31"
    assert str(Measured(1523.2, 41.7, 3)) == "1523 ± 42"
    assert str(Measured(3.05712, 0.00421, 3)) == "3.0571 ± 0.0042"
    assert str(Measured(5, 0, 1)) == "5"
    assert str(Measured.of([math.nan])) == "–"
