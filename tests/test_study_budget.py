"""A matched budget is the best there is: held against every size, on small real models."""

import functools

import pytest
import torch

import residual_steer as rs
from residual_steer.errors import UnsuitableError
from residual_steer.study import Arm, adapted, match_budget, trainable
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
    with pytest.raises(rs.SteerError, match="`rank` is an integer from 1 to the width"):
        match_budget(vit, "hres", "rank", 10**6)
    with pytest.raises(rs.SteerError, match="no option 'rnak'"):
        match_budget(vit, "hres", "rnak", 100)
    with pytest.raises(UnsuitableError, match="'vpt-shallow'"):
        match_budget(vit, "prompt", "length", 100)
