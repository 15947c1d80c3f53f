"""What steering costs by count, which no clock disturbs: held against closed forms, on every backbone alike."""

import json
import sys
from pathlib import Path

import pytest
import torch

import residual_steer as rs
from residual_steer.study.counters import operations

pytest.importorskip("transformers")
pytest.importorskip("timm")

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
RANK, WIDTH, BLOCKS = 8, 32, 2


@pytest.fixture(scope="module")
def cost():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import cost

        yield cost
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module", params=["gpt2", "vit", "mamba"])
def counted(cost, request):
    """The counts of every method on a tiny backbone, and the tokens of its batch."""
    options = cost.parse(["--tiny", "--rank", str(RANK)])
    shape = cost.SHAPES[request.param]
    methods = cost.build(request.param, shape, options)
    inputs = shape.batch(methods[0].model, 2, None)
    tokens = inputs.numel() if shape.length else 2 * 5
    return {name: row.counts for name, row in cost.counted(shape, methods, inputs).items()}, tokens


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


def test_steering_beside_the_block_keeps_and_computes_least(counted):
    counts, _ = counted
    others = [name for name in counts if name.startswith("LoRA")]
    assert others
    for name in others:
        assert counts["H-Res, block"].saved < counts[name].saved
        assert counts["H-Res, block"].flops < counts[name].flops


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
    arguments = ["--tiny", "--rank", "4", "--rounds", "1", "--backbone", "gpt2", "--output", str(tmp_path)]
    assert cost.main(arguments) == 0
    record = json.loads((tmp_path / "cost-gpt2-cpu.json").read_text())
    assert record["times"]["step"]["floor"]["ratio"]["median"] == 1
    assert record["times"]["prefill"]["frozen"]["ratio"]["median"] == 1
    assert record["counts"]["H-Res, block"]["trainable"] == BLOCKS * (2 * 4 * WIDTH + 4 + WIDTH)
    assert "| H-Res, block" in capsys.readouterr().out
    assert cost.main(["--rank", "0"]) == 1
    assert "1 or more" in capsys.readouterr().err
