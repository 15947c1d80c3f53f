"""The contract of every backbone: one body, run at every site of every case where the site matters, on every device.

The reference is the FROZEN model: PyTorch picks another matrix product where a weight requires a gradient, so that a
model that trains differs from itself in rounding.
"""

import copy
import dataclasses
import functools
import pickle
import re
from contextlib import contextmanager

import pytest
import torch
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint

import residual_steer as rs
from cases import CASES, DEVICES, RANK, TABLE, closed_form, first_output, first_tensor, randomise
from cases.ssm import in_steps
from residual_steer._controller import Steering
from residual_steer.injector import Injector

SCALE = 0.7
POINTS = [pytest.param(case, site, id=f"{case.name}-{site}") for case in CASES for site in case.points]

every_point = pytest.mark.parametrize(("case", "site"), POINTS)
# for what no site changes: every case at one of its sites, each in turn
TURNS = [(case, list(case.points)[index % len(case.points)]) for index, case in enumerate(CASES)]
every_case = pytest.mark.parametrize(("case", "site"), TURNS, ids=lambda value: getattr(value, "name", value))
pytestmark = pytest.mark.parametrize("device", DEVICES)


def steered(case, site, device="cpu", dtype=torch.float32, training=False, **more):
    """Return a steered model whose fields are random."""
    model = case.build(device, dtype).train(training)
    return randomise(rs.steer(model, rank=RANK, site=site, layers=case.layers(site), scale=SCALE, **more))


def brief(case):
    """Return the case with fewer tokens where a recurrence is unrolled, token by token, into what is traced."""
    if "mamba" not in case.name:
        return case
    return dataclasses.replace(case, batch=lambda: {**(given := case.batch()), "input_ids": given["input_ids"][:, :3]})


@functools.cache
def frozen_output(name, device, dtype=torch.float32, training=False):
    return TABLE[name].run(TABLE[name].build(device, dtype).train(training))


def base_keys(model):
    return {key: value for key, value in model.state_dict().items() if "steering_" not in key}


def close(actual, expected, dtype=torch.float32, share=1e-5):
    """Compare in fp64, to a share of the largest entry."""
    share = 2e-2 if dtype == torch.bfloat16 else share
    bound = share * expected.double().abs().max().item()
    torch.testing.assert_close(actual.double(), expected.double(), rtol=0, atol=bound)


TRACED = [brief(case) for case in CASES if not case.untraced]
EXPORTED = [(case, "block") for case in TRACED] + [
    (brief(TABLE[name]), "input") for name in ("timm-vit", "gpt2", "mamba")
]
# on a CPU the compiled backward pass of mamba_ssm-1, unsteered, fails
TRAINED = [brief(TABLE["mamba_ssm-2"]) if case.name == "mamba_ssm-1" else case for case in TRACED]


@contextmanager
def recorded(hosts):
    """Record what enters each module first and last of all hooks, and what leaves it last."""
    calls = [{} for _ in hosts]
    handles = []
    for host, call in zip(hosts, calls, strict=True):

        def enter(_, args, kwargs, call=call, key="entered"):
            call[key] = tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, (args, kwargs))

        def reach(_, args, kwargs, call=call, enter=enter):
            enter(_, args, kwargs, call, "reached")

        def leave(_, args, output, call=call):
            call["left"] = tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, output)

        handles.append(host.register_forward_pre_hook(enter, with_kwargs=True, prepend=True))
        handles.append(host.register_forward_pre_hook(reach, with_kwargs=True))
        handles.append(host.register_forward_hook(leave))
    yield calls
    for handle in handles:
        handle.remove()


@every_point
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_fresh_steering_is_the_identity(case, site, device, dtype, training):
    expected = frozen_output(case.name, device, dtype, training)
    model = rs.steer(case.build(device, dtype).train(training), rank=RANK, site=site, layers=case.layers(site))
    actual = case.run(model)
    if training and case.scans:
        close(actual, expected, dtype)
    else:
        assert torch.equal(actual, expected)


@every_point
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@torch.no_grad()
def test_stream_moves_by_the_field_and_nothing_else(case, site, device, dtype):
    model, frozen = steered(case, site, device, dtype), case.build(device, dtype)
    hosts, twins = case.modules(model, site), case.modules(frozen, site)
    enter, leave = (case.enter, case.leave) if site == "block" else (first_tensor, first_output)
    with recorded(hosts) as calls:
        case.run(model)
    for host, twin, call in zip(hosts, twins, calls, strict=True):
        field = getattr(host, f"steering_{site}").fields["default"]
        args, kwargs = call["entered"]
        z = enter(args, kwargs)
        if site == "input":
            before, after = z, enter(*call["reached"])
            args, kwargs = call["reached"]
            assert torch.equal(leave(call["left"]), leave(twin(*args, **kwargs)))
        else:
            before, after = leave(twin(*args, **kwargs)), leave(call["left"])
        assert after.dtype == before.dtype
        move = SCALE * closed_form(field, z)
        assert move.abs().max() > 0.05 * before.abs().max()
        close(after, before.double() + move, dtype)


@every_point
def test_only_fields_and_opened_modules_learn(case, site, device):
    model = rs.steer(case.build(device).train(), rank=RANK, site=site, layers=case.layers(site), train=case.head)
    learn = rs.parameters(model)
    fields = [p for m in model.modules() if isinstance(m, rs.HRes) for p in m.parameters()]
    assert len(fields) == 4 * len(case.layers(site))
    assert len(learn) > len(fields)
    optimizer = torch.optim.SGD(learn, lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        case.loss(model).backward()
        assert {id(p) for p in model.parameters() if p.grad is not None} == {id(p) for p in learn}
        optimizer.step()
    assert all(p.grad.abs().max() > 0 for p in fields)


@every_point
def test_off_and_unsteer_give_the_frozen_model_back(case, site, device):
    expected = frozen_output(case.name, device)
    model, seen = case.build(device), []
    keys = {key: value.clone() for key, value in model.state_dict().items()}
    for host in case.modules(model, site):
        host.register_forward_hook(lambda *_: seen.append("mine"))
    randomise(rs.steer(model, rank=RANK, site=site, layers=case.layers(site)))
    assert not torch.equal(case.run(model), expected)
    assert base_keys(model).keys() == keys.keys()
    with rs.use(model, None):
        assert torch.equal(case.run(model), expected)
    rs.unsteer(model)
    seen.clear()
    assert torch.equal(case.run(model), expected)
    assert len(seen) >= len(case.layers(site))  # ALBERT uses its blocks more than once
    assert model.state_dict().keys() == keys.keys()
    assert all(torch.equal(value, keys[key]) for key, value in model.state_dict().items())


@every_case
def test_saved_steering_loads_on_a_fresh_backbone_of_its_shape_alone(case, site, device, tmp_path):
    model = steered(case, site, device, train=case.head)
    with torch.no_grad():
        rs.parameters(model)[-1].add_(0.5)  # a base tensor that trains with the field
    rs.save(model, tmp_path / "field")
    fresh = rs.load(case.build(device), tmp_path / "field")
    assert torch.equal(case.run(fresh), case.run(model))
    with rs.use(fresh, None):
        assert torch.equal(case.run(fresh), frozen_output(case.name, device))

    short, number = case.build(device), len(case.paths("block"))
    blocks, last = re.match(r"(.*)\.(\d+)", case.paths("block")[-1]).groups()
    short.get_submodule(blocks).__delattr__(last)
    before = list(short.state_dict())
    with pytest.raises(rs.SteerError, match=rf"{number} blocks of width .*; this model has .*{number - 1} blocks"):
        rs.load(short, tmp_path / "field")
    assert list(short.state_dict()) == before


@every_case
@torch.no_grad()
def test_a_deep_copy_and_a_pickle_stand_on_their_own(case, site, device):
    model = steered(case, site, device)
    expected = case.run(model)
    twins = [copy.deepcopy(model)]
    if case.pickle_fails:
        with pytest.raises(RuntimeError, match=case.pickle_fails):
            pickle.dumps(case.build(device))
    else:
        twins.append(pickle.loads(pickle.dumps(model)))
    for twin in twins:
        assert torch.equal(case.run(twin), expected)
        randomise(twin, std=1.0)
        assert not torch.equal(case.run(twin), expected)
        assert torch.equal(case.run(model), expected)
        rs.use(twin, None)
        assert torch.equal(case.run(model), expected)
        rs.use(twin, "default")
    rs.unsteer(model)
    off = case.run(model)
    for twin in twins:
        assert not torch.equal(case.run(twin), off)
        assert torch.equal(case.run(rs.unsteer(twin)), off)
        hooks = [h for m in twin.modules() for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
        assert not any(isinstance(getattr(hook, "__self__", None), (Injector, Steering)) for hook in hooks)


@pytest.mark.parametrize(("case", "site"), [point for point in POINTS if point.values[0].generates])
def test_generation_with_and_without_the_cache_agree(case, site, device):
    case.needs("generate")
    model = steered(case, site, device)
    prompt = case.inputs(model)["input_ids"][:, :4]
    settings = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    cached, plain = (
        model.generate(prompt, min_new_tokens=5, max_new_tokens=5, use_cache=use_cache, **settings)
        for use_cache in (True, False)
    )
    assert torch.equal(cached.sequences, plain.sequences)
    close(torch.stack(cached.logits), torch.stack(plain.logits))
    with rs.use(model, None):
        off = model.generate(prompt, min_new_tokens=5, max_new_tokens=5, **settings)
    assert not torch.allclose(off.logits[0], cached.logits[0])


@pytest.mark.parametrize(("case", "site"), [p for p in POINTS if p.values[0].name.startswith("mamba_ssm")])
@torch.no_grad()
def test_prefill_and_steps_agree_with_the_whole_sequence(case, site, device):
    model = steered(case, site, device)
    close(in_steps(model, case.inputs(model)["input_ids"]), case.run(model))


@every_point
def test_gradient_checkpointing_gives_the_same_gradients(case, site, device):
    case.needs("checkpoint")
    plain, saving = (steered(case, site, device, training=True) for _ in range(2))
    if hasattr(saving, "set_grad_checkpointing"):
        saving.set_grad_checkpointing(True)
    elif getattr(saving, "supports_gradient_checkpointing", False):
        saving.gradient_checkpointing_enable()
    else:  # there is no switch for it: checkpoint the blocks by hand
        for block in case.modules(saving, "block"):
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    runs = [[], []]
    for model, seen in zip((plain, saving), runs, strict=True):
        for part in [part for block in case.modules(model, "block") for part in block.modules()]:
            part.register_forward_pre_hook(lambda *_, seen=seen: seen.append(1))
        case.loss(model).backward()
    assert len(runs[1]) > len(runs[0]) > 0, "no block was computed again"
    for expected, actual in zip(rs.parameters(plain), rs.parameters(saving), strict=True):
        close(actual.grad, expected.grad)


@pytest.mark.parametrize("case", TRACED, ids=lambda case: case.name)
@torch.no_grad()
def test_compiles_to_one_graph_that_follows_the_selection(case, device):
    model = steered(case, "block", device)
    expected, off = case.run(model), case.run(case.build(device))
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    close(case.run(compiled), expected)
    with rs.use(compiled, None):
        close(case.run(compiled), off)
    close(case.run(compiled), expected)


@pytest.mark.parametrize("case", TRAINED, ids=lambda case: case.name)
def test_compiled_training_gives_the_same_gradients(case, device):
    site = "input" if "input" in case.points else "block"
    plain, fast = (steered(case, site, device, training=True) for _ in range(2))
    case.loss(plain).backward()
    torch._dynamo.reset()
    case.loss(torch.compile(fast, fullgraph=True, backend="aot_eager")).backward()
    for expected, actual in zip(rs.parameters(plain), rs.parameters(fast), strict=True):
        close(
            actual.grad, expected.grad, share=1e-5 if device == "cpu" else 3e-4
        )  # cuDNN rounds as it finds: 1.3e-4 on an H200


@pytest.mark.parametrize(("case", "site"), EXPORTED, ids=lambda value: getattr(value, "name", value))
@torch.no_grad()
def test_exports(case, site, device):
    case.needs("export")
    model = steered(case, site, device)
    program = torch.export.export(model, (), case.inputs(model), strict=False)
    close(case.run(program.module()), case.run(model))
