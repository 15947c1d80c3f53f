"""Point 7 of the contract: rows routed to different fields equal the same rows run alone under each field."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import residual_steer as rs
from cases import CASES, DEVICES, RANK, TABLE, randomise
from cases.ssm import in_steps

# In a graph a row is found as without one: tokens, channels first, and a pair whose sum is the stream.
TRACED = [TABLE[name] for name in ("gpt2", "timm-resnet", "mamba_ssm-1")]
EXPANDED = [{"num_beams": 2, "num_return_sequences": 2}, {"do_sample": True, "num_return_sequences": 3}]
GENERATED = [pytest.param(case, {}, id=case.name) for case in CASES if case.generates]
GENERATED += [  # what `generate` repeats is its own, but for a cache and an encoder
    pytest.param(TABLE[name], more, id=f"{name}-{next(iter(more))}")
    for name in ("gpt2", "mamba", "t5", "jamba")
    for more in EXPANDED
    if not (TABLE[name].beams_fail and "num_beams" in more)
]
POINTS = [pytest.param(case, site, id=f"{case.name}-{site}") for case in CASES for site in case.points]
every_point = pytest.mark.parametrize(("case", "site"), POINTS)
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
pytestmark = pytest.mark.parametrize("device", DEVICES)


def steered(case, site="block", device="cpu", heads=False):
    """Return a model with three fields of different rank, layers and activation; `law` stands at another site too."""
    model = case.build(device)
    train = case.head if heads else ()
    layers = case.layers(site)
    rs.steer(model, rank=RANK, site=site, layers=layers, scale=0.7, name="law", train=train)
    rs.steer(model, rank={layers[-1]: 2}, site=site, name="art", activation="tanh", bias=False, train=train)
    rs.steer(model, rank=3, site="block", layers=[0], scale=-0.5, name="news")
    randomise(model)
    if heads:
        for seed, name in enumerate(("law", "art")):
            rs.use(model, name)
            own = {id(p) for p in model.parameters() if p.requires_grad}
            generator = torch.Generator().manual_seed(seed)
            with torch.no_grad():
                for key, p in model.named_parameters():
                    if id(p) in own and "steering_" not in key:
                        p += torch.randn(p.shape, generator=generator).to(p) * 0.3
    return model


def close(actual, expected, share=1e-5):
    torch.testing.assert_close(actual, expected, rtol=0, atol=share * max(1.0, expected.abs().max().item()))


def outputs(case, model):
    """Return the output under each field, and off."""
    found = {}
    for name in ("law", "art", "news", None):
        with rs.use(model, name):
            found[name] = case.run(model)
    return found


ROWS = [["law", "art"], ["news", None]]


@every_point
@torch.no_grad()
def test_rows_equal_runs_of_one_row(case, site, device):
    """The reference is a batch of one, as a user would serve it."""
    model = steered(case, site, device)
    call = case.inputs(model)
    rs.use(model, None)
    off = case.run(model)
    for rows in ROWS:
        rs.use(model, rows)
        mixed = case.run(model)
        for place, name in enumerate(rows):
            rs.use(model, name)
            one = {k: v[place : place + 1] if isinstance(v, torch.Tensor) else v for k, v in call.items()}
            output = model(**one)
            for attribute in ("logits", "last_hidden_state"):
                output = getattr(output, attribute, output)
            close(mixed[place], output[0])
            assert name is None or not torch.equal(mixed[place], off[place])


@every_case
@torch.no_grad()
def test_each_row_meets_the_head_that_its_field_trained(case, device):
    model = steered(case, device=device, heads=True)
    alone = outputs(case, model)
    for rows in [*ROWS, ["law", None]]:
        rs.use(model, rows)
        mixed = case.run(model)
        for place, name in enumerate(rows):
            close(mixed[place], alone[name][place])
    rs.use(model, None)
    assert torch.equal(case.run(model), alone[None])
    before = case.run(case.build(device))
    rs.unsteer(model)
    assert torch.equal(case.run(model), before)


@every_case
def test_gradients_of_rows_equal_those_of_separate_runs(case, device):
    model = steered(case, device=device).train(not case.mixes_rows)
    rs.thaw(model, "law")
    rs.thaw(model, "art")

    def gradients(mix):
        model.zero_grad()
        rs.use(model, mix)
        output = case.run(model)
        rows = range(2) if isinstance(mix, list) else [mix == "art"]
        sum((output[int(place)] ** 2).sum() for place in rows).backward()
        names = set(mix) if isinstance(mix, list) else {mix}
        return {name: [p.grad.clone() for p in rs.parameters(model, name)] for name in names}

    mixed = gradients(["law", "art"])
    for name in ("law", "art"):
        for actual, expected in zip(mixed[name], gradients(name)[name], strict=True):
            close(actual, expected, 1e-4)


@pytest.mark.parametrize(("case", "more"), GENERATED)
@torch.no_grad()
def test_generation_keeps_rows_with_their_field(case, device, more):
    """Prefill and cached decoding, beams and several sequences: as each row alone; sampling with a fixed seed."""
    model = steered(case, device=device)
    ids = case.inputs(model)["input_ids"]
    repeat = more.get("num_return_sequences", 1)

    def generate(ids, cache):
        torch.manual_seed(0)
        settings = {"do_sample": False, "max_new_tokens": 5, "min_new_tokens": 5, **more}
        return model.generate(ids, use_cache=cache, **settings)

    rows = ["law", "art"]
    alone = {}
    for name in rows:
        with rs.use(model, name):
            alone[name] = generate(ids, True)
    rs.use(model, rows)
    cached, whole = generate(ids, True), generate(ids, False)
    assert torch.equal(cached, whole)
    for place, name in enumerate(rows):
        own = slice(place * repeat, (place + 1) * repeat)
        assert torch.equal(cached[own], alone[name][own])
    if not more:  # an expanded search may come to the same tokens from different logits
        assert not torch.equal(alone["law"], alone["art"])


@pytest.mark.parametrize("case", [TABLE["mamba_ssm-1"], TABLE["mamba_ssm-2"]], ids=lambda case: case.name)
@torch.no_grad()
def test_stepwise_decoding_of_mamba_ssm_keeps_rows_with_their_field(case, device):
    model = steered(case, device=device)
    alone = outputs(case, model)
    rs.use(model, ["law", "art"])
    mixed = in_steps(model, case.inputs(model)["input_ids"])
    for place, name in enumerate(["law", "art"]):
        close(mixed[place], alone[name][place])


CHANGES = [{"law": w, "art": 1 - w} for w in (0.0, 0.5, -2.0)] + [{"news": 0.3}, {}]
ROUTES = [["law", "art"], ["art", "law"], [None, "news"], [None, None], ["news", "news"]]


@pytest.mark.parametrize("case", TRACED, ids=lambda case: case.name)
@torch.no_grad()
def test_neither_other_weights_nor_other_rows_compile_again(case, device):
    torch._dynamo.reset()
    model = steered(case, device=device)
    expected = {}
    for mix in CHANGES + ROUTES:
        rs.use(model, mix)
        expected[str(mix)] = case.run(model)
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for mixes in (CHANGES, ROUTES):
        before = counter.frame_count
        for mix in mixes:
            rs.use(compiled, mix)
            close(case.run(compiled), expected[str(mix)])
        assert counter.frame_count == before + 1, f"{counter.frame_count - before} graphs for {len(mixes)} mixes"


@torch.no_grad()
def test_exports_with_its_rows(device):
    case = TABLE["gpt2"]
    model = steered(case, device=device)
    rs.use(model, ["law", "art"])
    program = torch.export.export(model, (), case.inputs(model), strict=False)
    close(case.run(program.module()), case.run(model))


@pytest.mark.parametrize("name", ["gpt2", "timm-vit"])
@torch.no_grad()
def test_batches_of_other_sizes_share_one_dynamic_graph(name, device):
    torch._dynamo.reset()
    case = TABLE[name]
    model = steered(case, device=device)
    call = case.inputs(model)
    rs.use(model, ["law", "art"])
    case.run(model)  # the watch over blocks that work in place ends with the first eager call of a field there
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for size in (2, 3, 4, 5, 7):
        rs.use(model, (["law", "art", None, "news"] * 2)[:size])
        rows = {
            key: value.repeat(4, *[1] * (value.dim() - 1))[:size] if isinstance(value, torch.Tensor) else value
            for key, value in call.items()
        }
        actual, expected = compiled(**rows), model(**rows)
        actual, expected = (getattr(output, "logits", output) for output in (actual, expected))
        close(actual, expected)
    assert counter.frame_count == 2
