"""Problems and arms refuse what would waste a study, and worth follows the metric."""

import math
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import residual_steer as rs
from residual_steer.study import Arm, Problem, rates_around


def problem(**more):
    given_fields = {"name": "p", "fresh": None, "train": None, "score": None, "metric": "m", "better": "up", "steps": 3}
    return Problem(**{**given_fields, "identity": {}, **more})


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"better": "more"}, "`better` is 'up' or 'down'; received 'more'"),
        ({"steps": 0}, "`steps` is a positive integer; received 0"),
        ({"steps": True}, "received True"),
        ({"steps": 2.0}, r"received 2\.0"),
        ({"fit": {"seed": 3}}, "a study gives every run its seed"),
        ({"fit": {"resume": True}}, "keeps finished runs in its ledger"),
        ({"fit": {"lr": 3}}, "`fit` has no option 'lr'"),
        ({"fit": {"steps": 3}}, "`fit` has no option 'steps'"),
        ({"fit": {"warmup": -1}}, "`warmup` is a number from 0"),
    ],
)
def test_a_problem_that_cannot_be_is_refused_at_once(wrong, words):
    with pytest.raises(rs.SteerError, match=words):
        problem(**wrong)


def test_worth_is_larger_the_better_the_scores_are():
    up, down = problem(fit={"warmup": 0}), problem(better="down")
    assert up.worth({"m": 2.0, "n": math.nan}) > up.worth({"m": 1.0})
    assert down.worth({"m": 1.0}) > down.worth({"m": 2.0})
    for each in (up, down):
        for scores in (None, {"m": math.nan}, {"m": math.inf}, {"m": -math.inf}):
            assert each.worth(scores) == -math.inf
        with pytest.raises(rs.SteerError, match="`score` returns 'm' among its numbers; received n, o"):
            each.worth({"n": 1.0, "o": 2.0})


@pytest.mark.parametrize(
    "rates", [(), (1e-3, 1e-3), (1, 1.0), (0.0,), (-1.0,), (math.nan,), (math.inf,), ("1e-3",), (True,), (None,)]
)
def test_rates_are_different_positive_numbers(rates):
    with pytest.raises(rs.SteerError, match="`rates` are one or more different positive numbers; received"):
        Arm("a", "full", rates)


def test_rates_become_floats_so_that_a_run_has_one_key():
    rates = Arm("a", "full", [1, 2.5]).rates
    assert rates == (1.0, 2.5)
    assert all(type(rate) is float for rate in rates)


@settings(deadline=None)
@given(st.floats(1e-6, 1.0), st.integers(1, 9), st.floats(1.5, 10.0))
def test_rates_around_a_centre(centre, count, factor):
    rates = rates_around(centre, count, factor)
    assert len(rates) == count
    assert math.prod(rates) ** (1 / count) == pytest.approx(centre, rel=6e-3)
    for low, high in pairwise(rates):
        assert high / low == pytest.approx(factor, rel=1.1e-2)
    Arm("a", "full", rates)


def test_rates_are_round_numbers():
    assert rates_around(1e-2) == (0.00333, 0.01, 0.03)
    assert rates_around(2e-3, 1) == (0.002,)
    assert rates_around(1e-2, 2, 4.0) == (0.005, 0.02)


@pytest.mark.parametrize(
    "wrong", [(0,), (-1,), (math.nan,), (math.inf,), ("a",), (1, 0), (1, 2.0), (1, True), (1, 3, 1), (1, 3, math.inf)]
)
def test_rates_around_nothing_are_refused(wrong):
    with pytest.raises(rs.SteerError, match="learning rates are positive, at least one, and grow"):
        rates_around(*wrong)
