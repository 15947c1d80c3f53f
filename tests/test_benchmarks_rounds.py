"""Timing in rounds: its arithmetic and its order, with a clock of our own. Nothing here asks how fast."""

import itertools
import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import residual_steer as rs
from benchmarks.rounds import Rounds, Spread, Variant, play, spread


class Clock:
    """A clock that only moves when it is told to."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def spend(self, seconds):
        self.now += seconds


def test_median_and_quartiles():
    assert spread([4.0, 1.0, 3.0, 2.0, 5.0]) == Spread(3.0, 2.0, 4.0)
    assert spread([1.0, 2.0]) == Spread(1.5, 1.25, 1.75)
    assert spread([7.0]) == Spread(7.0, 7.0, 7.0)
    assert f"{Spread(1.0, 0.5, 2.0):.1f}" == "1.0 (0.5–2.0)"


@settings(deadline=None, max_examples=40)
@given(st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=20))
def test_a_spread_lies_in_order_and_holds_its_median(values):
    found = spread(values)
    assert min(values) <= found.low <= found.median <= found.high <= max(values)
    assert found.median == pytest.approx(statistics.median(values), rel=1e-12)


def test_a_ratio_is_taken_within_each_round():
    measured = Rounds({"one": [1.0, 10.0, 2.0], "two": [2.0, 30.0, 2.0]})
    assert measured.ratio("two", "one").median == 2.0  # of 2, 3 and 1; the ratio of medians would be 1
    assert measured.ratio("one", "one") == Spread(1.0, 1.0, 1.0)
    record = measured.record("one")["two"]
    assert record["seconds"]["median"] == measured.time("two").median == 2.0
    assert record["ratio"] == {"median": 2.0, "low": 1.5, "high": 2.5}
    assert record["reference"] == "one"
    assert record["rounds"] == [2.0, 30.0, 2.0]


def test_warm_up_is_not_measured_and_every_other_round_goes_backwards():
    clock, calls = Clock(), []

    def variant(name, seconds):
        def before():
            clock.spend(100)  # not measured
            return name

        def run(given):
            assert given == name
            calls.append(name)
            clock.spend(seconds + (1000 if len(calls) <= 3 else 0))

        return Variant(name, run, before)

    measured = play([variant("a", 1), variant("b", 2), variant("c", 3)], 4, warmup=1, clock=clock)
    rounds = [calls[i : i + 3] for i in range(0, len(calls), 3)]
    assert len(rounds) == 5
    assert all(sorted(each) == ["a", "b", "c"] for each in rounds)
    assert rounds[2] == rounds[1][::-1]
    assert rounds[4] == rounds[3][::-1]
    assert measured.seconds == {"a": [1] * 4, "b": [2] * 4, "c": [3] * 4}


def test_everyone_runs_behind_everyone_else_and_the_order_is_the_same_each_time():
    def order():
        calls = []
        play([Variant(name, lambda _, name=name: calls.append(name)) for name in "abcd"], 40, warmup=0)
        return calls

    calls = order()
    assert calls == order()
    neighbours = [(one, other) for one, other in itertools.pairwise(calls) if one != other]
    assert min(neighbours.count(pair) for pair in itertools.permutations("abcd", 2)) >= 5


def test_before_is_called_for_every_measurement_and_run_as_often_as_repeats():
    clock, calls = Clock(), []

    def run(given):
        calls.append(given)
        clock.spend(2)

    variants = [Variant("a", run, lambda: calls.append("before")), Variant("b", lambda _: calls.append("other"))]
    measured = play(variants, 2, warmup=0, repeats=3, clock=clock)
    first, second = ["before", None, None, None], ["other"] * 3
    assert calls in (first + second + second + first, second + first + first + second)
    assert measured.seconds == {"a": [2.0] * 2, "b": [0.0] * 2}  # of one run


ONE = Variant("a", lambda _: None)


@pytest.mark.parametrize(
    ("work", "words"),
    [
        (lambda: play([], 1), "different names; received"),
        (lambda: play([ONE, ONE], 1), "different names; received"),
        (lambda: play([ONE], 0), "1 or more, `warmup` 0 or more; received 0"),
        (lambda: play([ONE], 1, repeats=0), "1 or more, `warmup` 0 or more; received"),
        (lambda: play([ONE], 1, warmup=-1), "1 or more, `warmup` 0 or more; received"),
        (lambda: Rounds({"a": [1.0]}).ratio("a", "b"), "one of a; received 'b'"),
        (lambda: Rounds({"a": [1.0], "b": [1.0]}).record("c"), "one of a, b; received 'c'"),
    ],
)
def test_what_cannot_be_timed_is_refused(work, words):
    with pytest.raises(rs.SteerError, match=words):
        work()
