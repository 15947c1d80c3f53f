"""How steering trains transformers' Mamba on a CPU: through the linear scan, where the model's own forward is slow."""

import contextlib
import copy
import io

import pytest
import torch

import residual_steer as rs
from cases import TABLE, randomise, steered
from cases.case import before
from residual_steer import scan
from residual_steer._caches import cache_of

OLD = before("transformers", "5.15", falcon="FalconMamba normalises otherwise", parts="parts are called as modules")
NAMES = ("mamba", "jamba") if OLD else ("mamba", "falcon-mamba", "jamba")
SCANNING = [pytest.param(TABLE[name], id=name) for name in NAMES]


@pytest.fixture
def scans(monkeypatch):
    """Count the mixers that scan linearly."""
    calls, selective_scan = [], scan.selective_scan
    monkeypatch.setattr(scan, "selective_scan", lambda u, *rest: calls.append(u.shape) or selective_scan(u, *rest))
    return calls


def mixers(model):
    """The modules with a state."""
    return [module for module in model.modules() if "A_log" in module._parameters]


@pytest.fixture
def short_chunks(monkeypatch):
    """Cut the few tokens of a test into chunks of two, and its rows into groups of one."""
    monkeypatch.setattr(scan, "CHUNK", 2)
    monkeypatch.setattr(scan, "BUFFER", 1)


@pytest.mark.parametrize("case", SCANNING)
def test_training_takes_the_linear_scan_and_evaluation_the_models_own(case, scans):
    model = rs.steer(case.build(), rank=4)
    case.run(model.eval())
    assert not scans
    case.run(model.train())
    assert len(scans) == len(mixers(model)) >= 1
    case.run(rs.unsteer(model))
    assert len(scans) == len(mixers(model))


@pytest.mark.usefixtures("short_chunks")
@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("case", SCANNING)
def test_outputs_and_gradients_agree_with_those_of_the_models_own_scan(case, scans, padding):
    fast = randomise(rs.steer(case.build().train(), rank=4, train=[case.head]))
    slow = randomise(rs.steer(case.build(), rank=4, train=[case.head]))  # evaluates: the same, since nothing drops out
    batch = case.batch()
    if padding != "none":
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        batch["attention_mask"][0, slice(0, 2) if padding == "left" else slice(-2, None)] = 0
    outputs = []
    for model in (fast, slow):
        for mixer in mixers(model):
            torch.nn.init.ones_(mixer.conv1d.bias)  # without which padding leaves nothing behind it
        logits = model(**batch).logits
        logits.square().mean().backward()
        outputs.append(logits)
    assert len(scans) == len(mixers(fast))
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-6)
    for actual, expected in zip(rs.parameters(fast), rs.parameters(slow), strict=True):
        torch.testing.assert_close(actual.grad, expected.grad, rtol=1e-4, atol=1e-7)


@pytest.mark.filterwarnings("ignore:.* train too")
@pytest.mark.parametrize("case", SCANNING)
def test_every_weight_gets_the_gradient_of_the_models_own_scan(case, scans):
    fast, slow = (randomise(rs.steer(case.build(), rank=4)).requires_grad_(True) for _ in range(2))
    case.loss(fast.train()).backward()
    case.loss(slow).backward()
    assert len(scans) == len(mixers(fast))
    own = dict(slow.named_parameters())
    for name, parameter in fast.named_parameters():
        torch.testing.assert_close(parameter.grad, own[name].grad, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("case", SCANNING)
def test_what_an_adapter_adds_to_a_part_is_used_where_the_model_itself_uses_it(case):
    model = rs.steer(case.build(), rank=4)
    mixer, used = mixers(model)[0], {}
    for mode in (True, False):
        before = case.run(model.train(mode))
        for part in ("in_proj", "conv1d", "x_proj", "dt_proj", "out_proj"):
            handle = getattr(mixer, part).register_forward_hook(lambda module, args, output: output * 1.5)
            used.setdefault(part, []).append(not torch.allclose(case.run(model), before))
            handle.remove()
    assert OLD or all(training == evaluating for training, evaluating in used.values())
    assert used["in_proj"] == used["x_proj"] == used["out_proj"] == [True, True]


@pytest.mark.parametrize("case", SCANNING)
def test_with_a_cache_the_models_own_forward_runs_and_a_warning_says_what_to_set(case, scans):
    model = rs.steer(case.build().train(), rank=4)
    ids = case.batch()["input_ids"]
    with pytest.warns(UserWarning, match=r"trains with a cache.*model.config.use_cache = False"):
        output = model(ids, use_cache=True)
    assert cache_of(output) is not None
    assert not scans
    model.config.use_cache = False
    model(ids)
    assert len(scans) == len(mixers(model))


@pytest.mark.parametrize("bias", [{"use_bias": True}, {"use_conv_bias": False}], ids=["all", "no convolution's"])
def test_biases_count(bias):
    from transformers import MambaConfig, MambaForCausalLM

    model = MambaForCausalLM(MambaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, state_size=4, **bias))
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter) if name.endswith("bias") else None
    ids = torch.randint(50, (2, 7))
    expected = model.eval()(ids).logits
    torch.testing.assert_close(rs.steer(model, rank=4).train()(ids).logits, expected, rtol=1e-4, atol=1e-5)


def test_another_librarys_forward_around_ours_stays_and_no_longer_scans_after_unsteer(scans):
    case, model = steered("mamba")
    mixer, calls = mixers(model.train())[0], []
    ours = mixer.forward
    mixer.forward = lambda *args, **kwargs: calls.append(1) or ours(*args, **kwargs)
    case.run(model)
    assert (len(scans), len(calls)) == (2, 1)
    case.run(rs.unsteer(model))
    assert (len(scans), len(calls)) == (2, 2)


def test_what_the_scan_has_no_place_for_goes_to_the_models_own_forward(scans):
    case, model = steered("mamba")
    first, second = mixers(model.train())
    first.use_mambapy = True
    case.run(model)
    assert len(scans) == 1
    with contextlib.suppress(ValueError):  # newer releases refuse packed sequences on a CPU
        second(torch.zeros(1, 5, 16), seq_idx=torch.zeros(1, 5, dtype=torch.int32))
    second.use_mambapy = True
    case.run(model)
    assert len(scans) == 1


@pytest.mark.parametrize("case", SCANNING)
def test_checkpointing_runs_it_again_in_the_backward_pass(case, scans):
    model = randomise(rs.steer(case.build().train(), rank=4, site="input"))
    model.gradient_checkpointing_enable()
    plain = randomise(rs.steer(case.build().train(), rank=4, site="input"))
    case.loss(plain).backward()
    scans.clear()
    case.loss(model).backward()
    assert len(scans) == 2 * len(mixers(model))
    for actual, expected in zip(rs.parameters(model), rs.parameters(plain), strict=True):
        torch.testing.assert_close(actual.grad, expected.grad)


@pytest.mark.parametrize("how", ["weights", "autocast"])
@pytest.mark.parametrize("case", SCANNING)
def test_half_precision_trains_through_it(case, scans, how):
    dtype = torch.bfloat16 if how == "weights" else torch.float32
    model = randomise(rs.steer(case.build(dtype=dtype), rank=4))
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        own = case.run(model.eval())
        assert not scans
        output = case.run(model.train())
    assert ((output - own).norm() / own.norm()).item() < 1e-2
    output.float().square().mean().backward()
    assert len(scans) == len(mixers(model))
    assert all(p.grad.isfinite().all() for p in rs.parameters(model))


@pytest.mark.parametrize("case", SCANNING)
def test_copies_scan_with_their_own_weights(case, scans):
    model = rs.steer(case.build().train(), rank=4)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    twins = copy.deepcopy(model), torch.load(file, weights_only=False)
    expected = case.run(model)
    with torch.no_grad():
        mixers(model)[0].x_proj.weight.mul_(2)
    assert not torch.equal(case.run(model), expected)
    scans.clear()
    for twin in twins:
        assert torch.equal(case.run(twin), expected)
    assert len(scans) == 2 * len(mixers(model))


class Quantised(torch.nn.Linear):
    """As bitsandbytes has it: a layer whose weight means nothing outside of it."""


@pytest.mark.parametrize("part", ["dt_proj", "conv1d"])
@pytest.mark.parametrize("case", SCANNING)
def test_a_part_whose_weight_cannot_be_read_leaves_the_mixer_its_own_forward(case, part, scans):
    model = rs.steer(case.build(), rank=4).train()
    first = getattr(mixers(model)[0], part)
    if part == "dt_proj":
        first.__class__ = Quantised
    else:
        first.forward = first.forward  # as accelerate does to load weights that are elsewhere
    case.run(model)
    assert len(scans) == len(mixers(model)) - 1


@pytest.mark.parametrize("name", ["mamba2", "mamba_ssm-1", "gpt2"])
def test_other_families_keep_their_own_forward(name):
    model = rs.steer(TABLE[name].build(), rank=4)
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_nothing_is_left_after_unsteer():
    case, model = steered("mamba")
    rs.steer(model, rank=2, name="second")
    rs.unsteer(model)
    for mixer in case.modules(model, "mixer"):
        assert "forward" not in mixer.__dict__
        assert not (mixer._forward_hooks | mixer._forward_pre_hooks)


def test_the_stand_in_for_kernels_is_hidden_from_transformers():
    TABLE["mamba_ssm-1"].build()
    model = TABLE["mamba"].build()
    for mode in (False, True):
        assert TABLE["mamba"].run(model.train(mode)).isfinite().all()
