"""Problems and arms refuse what would waste a study; sizes match a budget; and a digest tells backbones apart."""

import copy
import functools
import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import residual_steer as rs
from experiments.problem import Arm, Problem, adapted, digest, match_budget, rates_around, trainable
from residual_steer.errors import UnsuitableError
from studies import TABLE, problem_of

pytest.importorskip("timm")
pytest.importorskip("transformers")

MOST = 12
METHODS = [
    ("timm-vit", "lora", "rank", {}),
    ("timm-vit", "hres", "rank", {"layers": [1]}),
    ("timm-vit", "vpt-deep", "length", {}),
    ("gpt2", "prompt", "length", {}),
    ("gpt2", "lora", "rank", {"targets": ["c_fc"]}),
    ("mamba", "hres", "rank", {"site": "mixer"}),
]


def problem(name, **more):
    return problem_of(fresh=lambda seed: TABLE[name].build(), **{"train_also": (), **more})


@functools.cache
def counts(name, method, option, head):
    """Return how many parameters train with every size."""
    options = next(options for *row, options in METHODS if row == [name, method, option])
    build = problem(name, train_also=(head,) if head else ())
    arms = [Arm("a", method, (1.0,), {**options, option: size}) for size in range(1, MOST + 1)]
    return [trainable(adapted(build, arm, 0))[0] for arm in arms]


@pytest.mark.parametrize(("name", "method", "option", "options"), METHODS)
@pytest.mark.parametrize("head", [False, True])
def test_no_other_size_is_nearer(name, method, option, options, head):
    head = {"timm-vit": "head", "gpt2": "lm_head", "mamba": "lm_head"}[name] if head else ""
    if head and not any(path == head for path, _ in TABLE[name].build().named_modules()):
        head = ""
    sizes = counts(name, method, option, head)
    each = sizes[1] - sizes[0]
    budgets = {1, sizes[0], sizes[3], sizes[6] - 1, sizes[6] + each // 2 - 1, sizes[6] + each // 2 + 1, sizes[-1] + 1}
    for budget in budgets:
        found = match_budget(problem(name, train_also=(head,) if head else ()), method, option, budget, **options)
        assert found.keys() == {*options, option}
        assert all(found[key] == value for key, value in options.items())
        gap = abs(sizes[found[option] - 1] - budget)
        assert gap == min(abs(size - budget) for size in sizes)


def test_what_is_counted_is_what_trains():
    arm = Arm("a", "hres", (1.0,), {"rank": 3, "bias": False})
    model = adapted(problem("timm-vit", train_also=("head",)), arm, 0)
    width, blocks, classes = 16, 2, 3
    trains, total = trainable(model)
    assert trains == blocks * 2 * 3 * width + classes * (width + 1) == sum(p.numel() for p in rs.parameters(model))
    assert total == sum(p.numel() for p in model.parameters()) > trains


def test_a_model_is_made_from_its_seed_whatever_was_drawn_before():
    arm = Arm("a", "lora", (1.0,), {"rank": 2})
    models = []
    for state in (1, 2):
        torch.manual_seed(state)
        models.append(adapted(problem_of(), arm, 5).state_dict())
    assert all(torch.equal(tensor, models[1][name]) for name, tensor in models[0].items())


def test_what_cannot_be_matched_is_refused():
    vit = problem("timm-vit")
    for wrong in (0, -1, 2.5, True, None):
        with pytest.raises(rs.SteerError, match="`budget` is a positive number of parameters; received"):
            match_budget(vit, "hres", "rank", wrong)
    with pytest.raises(rs.SteerError, match=r"'hres' trains [0-9,]+ parameters whatever its 'scale' is"):
        match_budget(vit, "hres", "scale", 100, rank=2)
    with pytest.raises(rs.SteerError, match="`rank` is an integer from 1 to 16"):
        match_budget(vit, "hres", "rank", 10**6)
    with pytest.raises(rs.SteerError, match="no option 'rnak'"):
        match_budget(vit, "hres", "rnak", 100)
    with pytest.raises(UnsuitableError, match="'vpt-shallow'"):
        match_budget(vit, "prompt", "length", 100)


def made(**more):
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
        ({"fit": {"warmup": -1}}, "`warmup` is a number .* received -1"),
    ],
)
def test_a_problem_that_cannot_be_is_refused_at_once(wrong, words):
    with pytest.raises(rs.SteerError, match=words):
        made(**wrong)


def test_worth_is_larger_the_better_the_scores_are():
    up, down = made(fit={"warmup": 0}), made(better="down")
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


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.low = nn.Parameter(torch.randn(4).bfloat16())
        self.register_buffer("steps", torch.tensor(5))
        self.register_buffer("mask", torch.tensor([True, False]))
        self.register_buffer("none", torch.empty(0, 3))
        self.register_buffer("scratch", torch.randn(2), persistent=False)


def built():
    torch.manual_seed(3)
    return Net()


def test_copies_are_the_same_however_they_are_kept_in_memory():
    model = built()
    expected = digest(model)
    assert len(expected) == 16
    assert int(expected, 16) >= 0
    assert digest(copy.deepcopy(model).requires_grad_(False).train()) == expected
    model.layer.weight.data = model.layer.weight.data.T.contiguous().T  # the same numbers, column by column
    assert digest(model) == expected
    model.scratch.zero_()  # which is not stored
    assert digest(model) == expected


@settings(deadline=None)
@given(st.data())
def test_any_bit_that_changes_is_seen(data):
    model = built()
    before = digest(model)
    name = data.draw(st.sampled_from([name for name, tensor in model.state_dict().items() if tensor.numel()]))
    raw = model.state_dict()[name].view(-1).view(torch.uint8)
    place = data.draw(st.integers(0, raw.numel() - 1))
    bit = 1 if name == "mask" else 1 << data.draw(st.integers(0, 7))
    raw[place] ^= bit
    assert digest(model) != before
    raw[place] ^= bit
    assert digest(model) == before


@pytest.mark.parametrize("change", ["type", "shape", "empty", "name", "order", "more"])
def test_type_shape_and_name_count_too(change):
    model = built()
    before = digest(model)
    if change == "type":
        model.steps = model.steps.to(torch.int64).view(torch.float64)  # the same bits
    elif change == "shape":
        model.layer.weight = nn.Parameter(model.layer.weight.detach().view(3, 2))
    elif change == "empty":
        model.none = model.none.view(3, 0)
    elif change == "name":
        model.stratum = model.layer
        del model.layer
    elif change == "order":
        model.low.data = model.low.data.flip(0)
    else:
        model.register_buffer("more", torch.empty(0))
    assert digest(model) != before


def test_extra_state_that_is_no_tensor_is_left_out():
    class Extra(Net):
        def get_extra_state(self):
            return {"any": object()}

    model = built()
    before = digest(model)
    model.__class__ = Extra
    assert digest(model) == before
