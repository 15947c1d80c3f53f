"""Models that several processes share: losses, files and resumed runs are those of one process with the whole model."""

import json
import signal

import pytest
import torch
import transformers
from safetensors.torch import load_file

import residual_steer as rs
from apart import apart, killed
from programs import fit_shards

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
WAYS = ["ddp", "fsdp2", "fsdp1", "tp"]


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """Run all in two processes, kill them at the end, and run the same here in one."""
    folder = tmp_path_factory.mktemp("shards")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=24, num_key_value_heads=2, **SIZES)
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "base")
    assert killed(fit_shards.both, folder) == -signal.SIGKILL
    found = json.loads((folder / "found.json").read_text())
    for how in ("whole", "cache"):
        model = fit_shards.made(how, folder / "base")
        place = folder if how == "whole" else folder / "alone"
        rs.save(model, place / how / "fresh")
        found[f"one {how}"] = fit_shards.run(
            model, place / how / "run", **({"cache_prefix": True} if how == "cache" else {})
        )
        rs.save(model, place / how / "trained")
    return folder, found


def assert_alike(one, other):
    one, other = (load_file(folder / "steering.safetensors") for folder in (one, other))
    assert one.keys() == other.keys()
    for key, value in one.items():
        torch.testing.assert_close(value, other[key], rtol=0, atol=1e-5)


@pytest.mark.parametrize("how", WAYS)
def test_losses_and_files_are_those_of_one_process(how, shared):
    folder, found = shared
    assert len(found[how]) == 6
    for (loss, norm), (here, norm_here) in zip(found[how], found["one whole"], strict=True):
        assert loss == pytest.approx(here, abs=1e-6)
        assert norm == pytest.approx(norm_here, abs=1e-6)
        assert norm > 0.1  # every step was clipped
    fresh = [(folder / way / "fresh" / "steering.safetensors").read_bytes() for way in ("whole", how)]
    assert fresh[0] == fresh[1]
    assert_alike(folder / "whole" / "trained", folder / how / "trained")


def test_a_killed_run_of_a_sharded_model_is_resumed_exactly(shared):
    folder, found = shared
    apart(fit_shards.both, folder, True)
    assert json.loads((folder / "found.json").read_text())["killed"] == found["fsdp2"]
    files = [(folder / "fsdp2" / way / "steering.safetensors").read_bytes() for way in ("trained", "again")]
    assert files[0] == files[1]


def test_transformers_saves_a_sharded_model_by_one_process_alone(shared):
    folder, _ = shared
    stored = load_file(folder / "fsdp2" / "trained" / "steering.safetensors")
    model = rs.from_pretrained(folder / "fsdp2" / "whole")
    assert rs.save(model, folder / "again")
    again = load_file(folder / "again" / "steering.safetensors")
    assert again.keys() == stored.keys()
    assert all(torch.equal(again[key], value) for key, value in stored.items())
    base = transformers.LlamaForCausalLM.from_pretrained(folder / "base")
    for key, value in base.state_dict().items():
        assert torch.equal(value, model.state_dict()[key])


def test_processes_lend_each_other_what_is_cached(shared):
    folder, found = shared
    (*records, cache), (*here, cache_here) = found["cache"], found["one cache"]
    for (loss, norm), (loss_here, norm_here) in zip(records, here, strict=True):
        assert loss == pytest.approx(loss_here, abs=1e-6)
        assert norm == pytest.approx(norm_here, abs=1e-6)
    assert (cache["hits"], cache["misses"]) == (cache_here["hits"], cache_here["misses"]) == (9, 3)
    assert 0 < cache["rows"] < cache_here["rows"] == 10
    assert_alike(folder / "alone" / "cache" / "trained", folder / "cache" / "trained")


def test_what_cannot_be_gathered_or_shared_is_refused_before_anything_is_written(shared):
    folder, found = shared
    for name, word in {
        "part": "applied to a part of what trains",
        "inner": "Give the outermost wrapper",
        "way": "could not make the folder",
        "cached": "its blocks have no weights",
        "wrapped": "Steer first, wrap after",
    }.items():
        assert word in found["refused"][name]
    assert not (folder / "refused").exists()


@pytest.mark.parametrize("stage", [2, 3])
def test_what_deepspeed_sharded_is_left_to_its_engine(stage, shared):
    """A class of that name, and what ZeRO-3 marks every parameter with that it takes apart, stand in for it here."""
    folder, _ = shared
    model = rs.steer(transformers.LlamaForCausalLM.from_pretrained(folder / "base"), rank=2)
    if stage == 2:
        engine = type("DeepSpeedEngine", (torch.nn.Module,), {"__module__": "deepspeed.runtime.engine"})()
        engine.module = model
        model = engine
    for parameter in model.parameters() if stage == 3 else ():
        parameter.ds_id = 0
    with pytest.raises(rs.SteerError, match="DeepSpeed takes the steps"):
        rs.fit(model, [{"input_ids": torch.zeros(1, 2, dtype=torch.long)}], steps=1)


@pytest.mark.parametrize("stage", ["2", "3"])
def test_what_zero_sharded_is_gathered(stage, shared):
    pytest.importorskip("deepspeed", reason="deepspeed is not installed; constraints.txt leaves it out")
    from programs import train_deepspeed

    folder, _ = shared
    apart(train_deepspeed.both, folder, int(stage))
    files = [(folder / stage / way / "steering.safetensors").read_bytes() for way in ("fresh", "again")]
    assert files[0] == files[1]
