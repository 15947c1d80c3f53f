"""How steering trains transformers' Mamba where there are no CUDA kernels: through mambapy's linear scan."""

import importlib.util
import warnings

import pytest
import torch

import residual_steer as rs
from cases import CASES, LENGTH, randomise

TABLE = {case.name: case for case in CASES}
SCANNING = [pytest.param(TABLE[name], id=name) for name in ("mamba", "falcon-mamba")]


@pytest.fixture
def scans(monkeypatch):
    """Count the calls of mambapy's scan."""
    module = pytest.importorskip("mambapy.pscan", reason="mambapy is not installed")
    pscan, calls = module.pscan, []

    def counted(*args):
        calls.append(args[0].shape)
        return pscan(*args)

    monkeypatch.setattr(module, "pscan", counted)
    return calls


def flags(case, model):
    return [mixer.use_mambapy for mixer in case.modules(model, "mixer")]


@pytest.fixture
def no_mambapy(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "mambapy" else find(name, *rest)
    )


@pytest.mark.parametrize("case", SCANNING)
def test_training_takes_the_linear_scan_and_evaluation_the_models_own(case, scans):
    model = rs.steer(case.build(), rank=4)
    case.run(model.eval())
    assert not scans
    case.run(model.train())
    assert len(scans) == 2
    case.run(rs.unsteer(model))
    assert len(scans) == 2


@pytest.mark.parametrize("case", SCANNING)
def test_gradients_agree_with_those_of_the_models_own_scan(case, scans):
    fast = randomise(rs.steer(case.build().train(), rank=4))
    case.loss(fast).backward()
    slow = randomise(rs.steer(case.build(), rank=4))  # in evaluation mode: the same function, since nothing drops out
    case.loss(slow).backward()
    assert len(scans) == 2
    for actual, expected in zip(rs.parameters(fast), rs.parameters(slow), strict=True):
        torch.testing.assert_close(actual.grad, expected.grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("case", SCANNING)
def test_flags_stay_as_they_were(case, scans):
    model = rs.steer(case.build().train(), rank=4)
    assert flags(case, model) == [False, False]
    case.run(model)
    assert flags(case, model) == [False, False]
    rs.unsteer(model)
    assert flags(case, model) == [False, False]


@pytest.mark.parametrize("case", SCANNING)
def test_flags_stay_as_they_were_after_an_exception(case, scans):
    model = rs.steer(case.build().train(), rank=4)
    mixer = case.modules(model, "mixer")[0]
    with pytest.raises(RuntimeError):
        mixer(torch.zeros(2, LENGTH, 3))
    assert flags(case, model) == [False, False]


@pytest.mark.parametrize("case", SCANNING)
def test_flags_stay_as_they_were_after_checkpointing_stops_a_block_halfway(case, scans):
    model = randomise(rs.steer(case.build().train(), rank=4, site="input"))
    model.gradient_checkpointing_enable()
    case.loss(model).backward()
    assert len(scans) > 2
    assert flags(case, model) == [False, False]


def test_a_flag_that_the_user_set_stays(scans):
    case = TABLE["mamba"]
    model = case.build()
    for mixer in case.modules(model, "mixer"):
        mixer.use_mambapy = True
    rs.steer(model, rank=4)
    case.run(model.eval())
    assert len(scans) == 2
    case.run(model.train())
    rs.unsteer(model)
    assert flags(case, model) == [True, True]


@pytest.mark.parametrize("case", SCANNING)
def test_half_precision_weights_train_on_the_models_own_scan(case, scans):
    frozen = case.build(dtype=torch.bfloat16).train()
    model = randomise(rs.steer(case.build(dtype=torch.bfloat16).train(), rank=4))
    case.loss(model).backward()
    assert not scans
    assert all(p.grad.isfinite().all() for p in rs.parameters(model))
    with rs.use(model, None):
        assert torch.equal(case.run(model), case.run(frozen))


@pytest.mark.parametrize("case", SCANNING)
def test_autocast_trains_on_the_linear_scan(case, scans):
    model = randomise(rs.steer(case.build().train(), rank=4))
    with torch.autocast("cpu", torch.bfloat16):
        loss = case.loss(model)
    loss.backward()
    assert len(scans) == 2
    assert all(p.grad.isfinite().all() for p in rs.parameters(model))


@pytest.mark.usefixtures("no_mambapy")
@pytest.mark.parametrize("case", SCANNING)
def test_without_mambapy_a_warning_says_what_to_install(case):
    with pytest.warns(UserWarning, match=r"square of the length.*pip install 'residual-steer\[cpu-mamba\]'") as caught:
        model = rs.steer(case.build().train(), rank=4)
    assert caught[0].filename == __file__
    assert torch.equal(case.run(model), case.run(case.build().train()))


@pytest.mark.usefixtures("no_mambapy")
def test_a_warning_that_is_an_error_leaves_the_model_unsteered():
    model = TABLE["mamba"].build()
    keys = list(model.state_dict())
    with pytest.raises(UserWarning, match="Install mambapy"):
        rs.steer(model, rank=4)
    assert list(model.state_dict()) == keys
    with pytest.raises(rs.SteerError, match="not steered"):
        rs.summary(model)


@pytest.mark.usefixtures("no_mambapy")
@pytest.mark.parametrize("name", ["mamba2", "mamba_ssm-1", "gpt2"])
def test_other_families_need_no_mambapy(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rs.steer(TABLE[name].build(), rank=4)


def test_hooks_are_gone_after_unsteer():
    case = TABLE["mamba"]
    model = rs.steer(case.build(), rank=4)
    rs.steer(model, rank=2, name="second")
    rs.unsteer(model)
    for mixer in case.modules(model, "mixer"):
        assert not mixer._forward_hooks
        assert not mixer._forward_pre_hooks
        assert not mixer._forward_hooks_always_called


def test_the_stand_in_for_kernels_is_hidden_from_transformers():
    TABLE["mamba_ssm-1"].build()
    case = TABLE["mamba"]
    model = case.build()
    assert case.run(model).isfinite().all()
    assert case.run(model.train()).isfinite().all()
