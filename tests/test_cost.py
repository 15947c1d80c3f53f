"""What steering costs by count, which no clock disturbs: held against closed forms, on every backbone alike."""

import dataclasses
import importlib.util
import json

import pytest
import torch

import residual_steer as rs
from benchmarks.counters import operations
from beside import BENCHMARKS, scripts
from residual_steer import field

pytest.importorskip("transformers")
pytest.importorskip("timm")

RANK, WIDTH, BLOCKS = 8, 32, 2


@pytest.fixture(autouse=True)
def many_numbers(monkeypatch):
    """Count what is launched for more than a few tokens; for those GELU is three kernels on a CPU."""
    monkeypatch.setattr(field, "_FEW", 0)


@pytest.fixture(scope="module")
def cost():
    with scripts(BENCHMARKS) as script:
        yield script("cost")


@pytest.fixture(scope="module", params=["gpt2", "vit", "mamba"])
def built(cost, request):
    """Every method on a tiny backbone, its batch, and its tokens."""
    shape = cost.SHAPES[request.param]
    base = shape.build(tiny=True)
    methods, refused = cost.build(request.param, shape, base, RANK)
    inputs = shape.batch(base, 2, None)
    return shape, methods, refused, inputs, inputs.numel() if shape.length else 2 * 5


@pytest.fixture(scope="module")
def counted(cost, built):
    """The counts of every method, and the tokens of the batch."""
    shape, methods, refused, inputs, tokens = built
    return cost.counted(shape, methods, inputs, refused), tokens


def test_every_row_of_the_table_is_there_or_says_why_not(built):
    shape, methods, refused, _, _ = built
    names = [method.name for method in methods]
    wanted = ["frozen", "floor", "H-Res, block", "H-Res, mixer", "H-Res, input", "H-Res, 2 fields", "H-Res, 8 fields"]
    assert set(wanted) <= set(names)
    if importlib.util.find_spec("peft") is None:
        pytest.skip("the others are PEFT's")
    assert {"LoRA, usual targets", "full fine-tuning"} <= set(names)
    others = {"LoRA, all linear layers", "prompt tuning", "ShadowPEFT"}
    assert others <= {*names, *refused}
    works = {"keys and values": others, "states": {"prompt tuning"}, None: {"LoRA, all linear layers"}}
    assert set(refused) == others - works[shape.cache]
    assert all(len(reason) > 20 for reason in refused.values())


def test_all_methods_stand_on_the_same_memory(built):
    _, methods, _, _, _ = built
    places = [{p.data_ptr() for p in method.model.parameters()} for method in methods]
    assert all(places[0] <= other for other in places)
    assert [p.requires_grad for p in methods[0].model.parameters()].count(True) == 0


def test_what_is_stored_is_what_trains(built, counted):
    counts, _ = counted
    for method in built[1]:
        if method.stored is not None:
            bytes_ = 4 * counts[method.name].trainable
            assert bytes_ <= method.stored <= bytes_ + 60_000  # names and descriptions


def test_a_method_that_fails_is_a_row_with_its_reason(cost, built):
    shape, methods, _, inputs, _ = built

    class Broken(torch.nn.Module):
        def forward(self, *args, **kwargs):
            raise RuntimeError("no memory\nleft")

    refused = {}
    broken = [*methods[:2], cost.Method("broken", Broken(), Broken())]
    assert set(cost.counted(shape, broken, inputs, refused)) == {"floor"}
    assert refused == {"broken": "RuntimeError: no memory left"}
    options = cost.parse(["--quick"])
    times = cost.timed(shape, broken, inputs, options, refused)
    assert set(times["step"].seconds) == {"floor"}
    assert set(times["prefill"].seconds) == {"frozen"}
    assert set(refused) >= {"broken, step", "broken, prefill"}


def test_a_step_keeps_the_hidden_units_and_one_stream_beyond_the_floor(counted):
    """Before and after σ, rank wide; the streams are kept by the blocks anyway, but that which enters the first."""
    counts, tokens = counted
    more = counts["H-Res, block"].saved - counts["floor"].saved
    assert more == 4 * tokens * (BLOCKS * 2 * RANK + WIDTH)


def test_a_step_computes_two_products_and_their_gradients_beyond_the_floor(counted):
    counts, tokens = counted
    product = 2 * tokens * RANK * WIDTH
    more = counts["H-Res, block"].flops - counts["floor"].flops
    assert more == BLOCKS * (2 + 4) * product - product  # what enters the first block needs no gradient


def test_operations_of_a_step_are_those_that_are_launched_with_nothing_else_counted(built, counted):
    shape, methods, _, inputs, _ = built
    counts, _ = counted
    for method in methods[1:3]:
        model = method.model
        assert counts[method.name].operations == operations(lambda model=model: shape.loss(model, inputs).backward())
        model.zero_grad()


def test_steering_beside_the_block_keeps_and_computes_least(counted):
    counts, _ = counted
    others = [name for name in counts if name.startswith("LoRA")]
    assert others
    for name in others:
        for key in ("saved", "peak", "flops", "trainable"):
            assert getattr(counts["H-Res, block"], key) < getattr(counts[name], key)


def test_of_gpt2_small_a_step_keeps_two_per_cent_more_than_the_floor_at_most(cost):
    """Every block adds as much as the one before: two blocks and three tell of twelve."""
    from methods import floor, steered
    from shapes import twin

    shape = cost.SHAPES["gpt2"]
    small = {"vocab_size": 64, "n_positions": 128, "bos_token_id": 0, "eos_token_id": 0}
    saved = {}
    for blocks in (2, 3):
        base = shape.build(n_layer=blocks, **small)
        lowest = floor(twin(base))
        methods = [cost.Method("floor", lowest, lowest), steered(twin(base), 32)]
        saved[blocks] = cost.counted(shape, methods, shape.batch(base, 1, 128), {})
    least, own = (
        saved[3][name].saved + 9 * (saved[3][name].saved - saved[2][name].saved) for name in ("floor", "H-Res, block")
    )
    assert own - least == 4 * 128 * (12 * 2 * 32 + 768)
    assert 1 < own / least <= 1.02


@pytest.mark.parametrize(("bias", "expected"), [(True, 4), (False, 3)])
@pytest.mark.parametrize("name", ["gpt2", "vit", "mamba"])
@torch.no_grad()
def test_a_field_launches_three_operations_a_block_and_one_for_its_biases(cost, name, bias, expected):
    shape = cost.SHAPES[name]
    model = shape.build(tiny=True)
    inputs = shape.batch(model, 2, None)
    off = operations(lambda: shape.prefill(model, inputs))
    rs.steer(model, rank=RANK, bias=bias)
    shape.prefill(model, inputs)
    assert operations(lambda: shape.prefill(model, inputs)) - off == BLOCKS * expected
    with rs.use(model, None):
        assert operations(lambda: shape.prefill(model, inputs)) == off


@torch.no_grad()
def test_many_fields_launch_no_more_operations_than_two(cost):
    shape = cost.SHAPES["gpt2"]
    model = shape.build(tiny=True)
    inputs = shape.batch(model, 4, None)
    names = [f"f{index}" for index in range(6)]
    for name in names:
        rs.steer(model, rank=2, name=name)
    found = set()
    for number in range(2, 7):
        for mix in (dict.fromkeys(names[:number], 0.5), [names[row % number] for row in range(4)]):
            rs.use(model, mix)
            shape.prefill(model, inputs)
            found.add(operations(lambda: shape.prefill(model, inputs)))
    assert len(found) == 1


@pytest.mark.parametrize("name", ["gpt2", "vit", "mamba"])
def test_the_cache_of_the_prefix_is_timed_on_the_same_training(cost, name, tmp_path, capsys):
    import prefix

    arguments = ["--tiny", "--rank", "4", "--rounds", "1", "--backbone", name, "--output", str(tmp_path)]
    assert prefix.main(arguments) == 0
    record = json.loads((tmp_path / f"prefix-{name}-cpu.json").read_text())
    assert len(record["later"]) == len(record["first"]) == 1
    assert "the last 1 of 2 blocks steered" in capsys.readouterr().out
    assert prefix.main([*arguments, "--last", "2"]) == 1
    assert "--last is from 1 to 1; received 2" in capsys.readouterr().err


def test_the_benchmark_runs_from_end_to_end(cost, tmp_path, capsys):
    assert cost.main(["--quick", "--rank", "4", "--backbone", "gpt2", "vit", "--output", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "cost-gpt2-cpu.json").read_text())
    assert set(record["times"]) == {"step", "prefill", "decode, 1 row", "decode, 16 rows"}
    assert set(json.loads((tmp_path / "cost-vit-cpu.json").read_text())["times"]) == {"step", "prefill"}
    assert record["times"]["step"]["floor"]["ratio"]["median"] == 1
    for column in ("prefill", "decode, 1 row", "decode, 16 rows"):
        assert record["times"][column]["frozen"]["ratio"]["median"] == 1
        assert {"H-Res, block", "H-Res, 8 fields"} <= set(record["times"][column])
    assert record["counts"]["H-Res, block"]["trainable"] == BLOCKS * (2 * 4 * WIDTH + 4 + WIDTH)
    assert record["launched"]["H-Res, block"] - record["launched"]["frozen"] == 4 * BLOCKS
    printed = capsys.readouterr().out
    assert "| H-Res, block" in printed
    assert "- prompt tuning: " in printed
    assert cost.main(["--rank", "0"]) == 1
    assert "1 or more" in capsys.readouterr().err


def test_a_peer_that_no_gradient_reaches_is_named_and_the_others_are_measured(cost, monkeypatch, tmp_path):
    pytest.importorskip("peft")
    from gpu import costs
    from gpu.part import Job

    def with_spare_layer(tiny, changes):
        model = subject.shape.make(tiny, changes)
        model.spare = torch.nn.Linear(4, 4)  # never called, as mamba_ssm calls no projection
        return model

    subject = costs.SUBJECTS["gpt2"]
    shape = dataclasses.replace(subject.shape, make=with_spare_layer)
    monkeypatch.setitem(costs.SUBJECTS, "gpt2", dataclasses.replace(subject, shape=shape, targets=("spare",)))
    found = costs.Costs(Job(["gpt2"], tmp_path / "costs.json", "cpu", True, None), "gpt2")
    found.measure(False)
    assert {"floor", "H-Res, block", "H-Res, fields in bf16"} == set(found.times["step, eager"])
    assert "does not require grad" in found.refused["LoRA, usual targets, step, eager"]
