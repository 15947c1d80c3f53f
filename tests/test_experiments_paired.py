"""Paired differences: intervals against SciPy's, and what their signs say."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

import residual_steer as rs
from experiments.paired import Difference, difference

numbers = st.floats(-1e3, 1e3, allow_subnormal=False).map(lambda number: round(number, 6))
unhurried = settings(deadline=None, max_examples=40)
pairs = st.lists(st.tuples(numbers, numbers), min_size=2, max_size=12)


@unhurried
@given(given_pairs=st.lists(st.tuples(numbers, numbers), min_size=2, max_size=60))
def test_the_interval_is_that_of_students_t(given_pairs):
    gaps = [a - b for a, b in given_pairs]
    found = difference(*zip(*given_pairs, strict=True))
    assert found.count == len(gaps)
    assert found.mean == pytest.approx(sum(gaps) / len(gaps), abs=1e-9)
    exact = stats.t.ppf(0.975, len(gaps) - 1) * np.std(gaps, ddof=1) / math.sqrt(len(gaps))
    assert found.margin == pytest.approx(exact, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize(("count", "quantile"), [(2, 12.7062), (3, 4.3027), (10, 2.2622), (31, 2.0423), (1001, 1.9623)])
def test_quantiles_are_those_of_printed_tables(count, quantile):
    values = [math.sin(7 * index) for index in range(count)]
    assert difference(values, [0.0] * count).margin == pytest.approx(quantile * stats.sem(values), rel=3e-5)


@unhurried
@given(pairs)
def test_the_other_way_round_everything_changes_its_sign(given_pairs):
    one, other = zip(*given_pairs, strict=True)
    there, back = difference(one, other), difference(other, one)
    assert (there.mean, there.margin, there.sign) == (-back.mean, back.margin, -back.sign)
    assert difference(one, one) == Difference(0.0, 0.0, len(one))
    assert difference(one, one).sign == 0


@unhurried
@given(pairs, st.floats(0.1, 100), st.randoms())
def test_units_scale_it_and_the_order_of_seeds_does_not_matter(given_pairs, factor, random):
    found = difference(*zip(*given_pairs, strict=True))
    random.shuffle(given_pairs)
    scaled = difference(*zip(*[(factor * a, factor * b) for a, b in given_pairs], strict=True))
    assert scaled.mean == pytest.approx(factor * found.mean, rel=1e-6, abs=1e-6)
    assert scaled.margin == pytest.approx(factor * found.margin, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize(
    ("mean", "margin", "sign"),
    [(2.0, 1.0, 1), (-2.0, 1.0, -1), (1.0, 1.0, 0), (-1.0, 1.0, 0), (0.0, 0.0, 0), (0.5, 0.0, 1), (5.0, math.inf, 0)],
)
def test_the_sign_is_that_of_an_interval_without_zero(mean, margin, sign):
    assert Difference(mean, margin, 3).sign == sign


def test_pairing_takes_away_what_seeds_have_in_common():
    hard_and_easy = [10.0, 50.0, 90.0]
    better = [value + 1 + 0.01 * index for index, value in enumerate(hard_and_easy)]
    assert difference(better, hard_and_easy).sign == 1


def test_it_writes_itself_for_people():
    assert str(difference([1.0, 2.0, 4.0], [0.0, 0.0, 0.0])) == "+2.33 (95 % interval -1.46 to 6.13, 3 seeds)"
    assert str(difference([1.0], [3.5])) == "-2.5 (one seed)"
    assert difference([1.0], [3.5]).sign == 0


@pytest.mark.parametrize(
    ("one", "other", "words"),
    [
        ([], [], "received 0 and 0"),
        ([1.0, 2.0], [1.0], "received 2 and 1"),
        ([1.0, math.nan], [1.0, 2.0], "a run that diverged has none to compare; received nan and 2"),
        ([1.0, 3.0], [-math.inf, 2.0], "received 1 and -inf"),
        ([math.nan], [1.0], "received nan and 1"),
    ],
)
def test_what_cannot_be_compared_is_refused(one, other, words):
    with pytest.raises(rs.SteerError, match=words):
        difference(one, other)
