"""Checks of arguments: what passes is returned, what does not is an error with the rule and the value."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn

from residual_steer import SteerError
from residual_steer._checks import check_choice, check_flag, check_integer, check_model, check_number, check_options


@pytest.mark.parametrize("value", [1, 8, np.int64(3)])
def test_an_integer_in_its_range_is_returned_as_pythons_own(value):
    assert type(check_integer("rank", value, 1, 8)) is int
    assert check_integer("rank", value, 1, 8) == value


@pytest.mark.parametrize("value", [0, 9, True, 2.0, "2", None, torch.tensor(2), 10**400])
def test_what_is_no_integer_in_its_range_is_an_error(value):
    with pytest.raises(SteerError, match=r"`rank` is an integer from 1 to 8, units; received "):
        check_integer("rank", value, 1, 8, meaning="units")


@pytest.mark.parametrize("value", [0, 0.5, np.float32(0.5), Fraction(1, 2)])
def test_a_number_in_its_range_is_returned_as_a_float(value):
    assert type(check_number("dropout", value, at_least=0, below=1)) is float
    assert check_number("dropout", value, at_least=0, below=1) == value


@pytest.mark.parametrize("value", [-0.1, 1, False, float("nan"), float("inf"), "0", None, 10**400, [0.5]])
def test_what_is_no_number_in_its_range_is_an_error(value):
    with pytest.raises(SteerError, match=r"`dropout` is a number of at least 0 and below 1; received "):
        check_number("dropout", value, at_least=0, below=1)


@pytest.mark.parametrize(
    ("bounds", "value", "words"),
    [
        ({}, float("-inf"), "a finite number;"),
        ({"above": 0}, 0, "a number above 0;"),
        ({"above": 0, "at_most": 1}, 0.0, "a number above 0 and at most 1;"),
        ({"above": 0, "at_most": 1}, 1.1, "a number above 0 and at most 1;"),
        ({"at_least": 0, "at_most": 1}, -1, "a number from 0 to 1;"),
        ({"below": 3}, 3, "a number below 3;"),
    ],
)
def test_the_range_is_named(bounds, value, words):
    with pytest.raises(SteerError, match=words):
        check_number("share", value, **bounds)


def test_choices_flags_options_and_models():
    assert check_choice("split", "train", ("train", None)) == "train"
    assert check_choice("split", None, ("train", None)) is None
    for value in ("Train", 1, ["train"], torch.zeros(2)):
        with pytest.raises(SteerError, match=r"`split` is one of train, None, the part; received "):
            check_choice("split", value, ("train", None), meaning="the part")
    assert check_flag("bias", False) is False
    with pytest.raises(SteerError, match=r"`bias` is True or False; received 1\."):
        check_flag("bias", 1)
    check_options("fit", ["seed"], ["seed", "clip"])
    with pytest.raises(SteerError, match="`fit` has no option 'sed'; it has seed, clip"):
        check_options("fit", ["sed"], ["seed", "clip"])
    with pytest.raises(SteerError, match="`linear` has no option 'rank'; it has none"):
        check_options("linear", ["rank"], [])
    model = nn.Linear(1, 1)
    assert check_model(model) is model
    with pytest.raises(SteerError, match=r"torch\.nn\.Module; received str"):
        check_model("gpt2")
