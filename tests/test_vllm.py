"""What serving with vLLM needs of this library alone; tests/serving holds it to transformers within vLLM."""

import importlib.util
import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F

import residual_steer as rs
from apart import printed
from fields import rewrite, shake, vit
from residual_steer._field_file import TENSORS
from residual_steer.vllm._bank import Bank
from residual_steer.vllm._requests import Mix

OPTIONS = {
    "a": {"rank": {0: 4, 2: 2}, "scale": 0.5, "activation": "silu"},
    "b": {"rank": 3, "layers": [1, 2], "bias": False, "activation": "relu"},
    "c": {"rank": 1, "scale": -2.0, "activation": "tanh"},
}


@pytest.fixture
def folders(tmp_path):
    model = vit()
    for name, options in OPTIONS.items():
        shake(rs.steer(model, name=name, **options), name)
        rs.save(model, tmp_path / name, name)
    return {name: str(tmp_path / name) for name in OPTIONS}


def moved(folder, name, z, layer):
    """λ·H(z), from the file."""
    tensors = safetensors.torch.load_file(f"{folder}/{TENSORS}")
    part = {key.removeprefix(f"blocks.{layer}."): value for key, value in tensors.items() if f"blocks.{layer}." in key}
    if not part:
        return torch.zeros_like(z)
    act = {"a": F.silu, "b": F.relu, "c": torch.tanh}[name]
    hidden = act(F.linear(z, part["down.weight"], part.get("down.bias")))
    return OPTIONS[name].get("scale", 1) * F.linear(hidden, part["up.weight"], part.get("up.bias"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bank_adds_to_every_token_what_its_own_field_makes_of_it(folders, dtype):
    mixes = [{}, {"a": 1}, {"b": 1}, {"c": 2, "b": -0.5}]
    bank = Bank(32, 4, 6, device="cpu", dtype=dtype)
    for slot, mix in enumerate(mixes):
        asked = json.dumps({folders[name]: weight for name, weight in mix.items()})
        bank.put(slot, Mix.open(asked).read(dtype) if mix else {})
    bank.put(0, Mix.open(folders["a"]).read(dtype))
    bank.put(0, {})
    z, y = torch.randn(5, 32).to(dtype), torch.randn(5, 32).to(dtype)
    bound = {"rtol": 0, "atol": 1e-5 if dtype == torch.float32 else 0.1}
    for slots in ([1, -1, 3, 2, 1], [3] * 5, [-1, 2, -1, -1, -1], [-1] * 5, [0, 1, 2], [2, 3, 3]):
        bank.step(slots)
        assert bank.idle == (slots == [-1] * 5)
        for layer in range(3):
            found = y.clone()
            bank.add_(found, z, ("block", layer))
            for row, slot in enumerate(slots):
                parts = [
                    weight * moved(folders[name], name, z[row].float(), layer) for name, weight in mixes[slot].items()
                ]
                wanted = y[row].float() + (sum(parts) if slot >= 0 and parts else 0)
                torch.testing.assert_close(found[row].float(), wanted, **bound)
            left = [row for row in range(5) if row >= len(slots) or slots[row] < 1]
            assert torch.equal(found[left], y[left])


def test_what_overflows_in_one_field_stays_out_of_the_tokens_of_another(folders):
    bank = Bank(32, 2, 4, device="cpu", dtype=torch.float16)
    bank.put(0, Mix.open(folders["a"]).read(torch.float16))
    bank.put(1, Mix.open(folders["b"]).read(torch.float16))
    with torch.inference_mode():
        bank.tables["block", 2][0][:4] = 6e4
    bank.step([0, 1, -1])
    z, y = torch.randn(3, 32).abs(), torch.randn(3, 32)  # a stream of another type than the fields
    found = y.clone()
    bank.add_(found, z, ("block", 2))
    assert not found[0].isfinite().all()
    torch.testing.assert_close(found[1], y[1] + moved(folders["b"], "b", z[1], 2), rtol=0, atol=0.02)
    assert torch.equal(found[2], y[2])


def test_a_slot_that_was_filled_within_a_step_is_filled_again_outside_of_it(folders):
    bank = Bank(32, 1, 4, device="cpu", dtype=torch.float32)
    with torch.inference_mode():
        bank.put(0, Mix.open(folders["a"]).read())
    bank.put(0, {})
    bank.put(0, Mix.open(folders["b"]).read())
    assert set(bank.runs[0]) == {("block", 1), ("block", 2)}


def test_a_split_batch_is_an_error(folders):
    bank = Bank(32, 1, 4, device="cpu", dtype=torch.float32)
    bank.put(0, Mix.open(folders["a"]).read())
    bank.step([0, 0, 0])
    with pytest.raises(RuntimeError, match="has 2 tokens of a step with 3"):
        bank.add_(torch.zeros(2, 32), torch.zeros(2, 32), ("block", 0))


def test_a_path_names_the_contents_of_every_field(folders):
    path = Mix.open(json.dumps({folders["a"]: 0.5, folders["c"]: -1})).path
    assert Mix.open(path).path == path
    assert Mix.open(path).rank == 5
    rewrite(Path(folders["a"]), lambda tensors: tensors["blocks.0.up.bias"].add_(1))
    with pytest.raises(rs.SteerError, match="saved anew since"):
        Mix.open(path)
    assert Mix.open(folders["a"]).path != path


def test_what_cannot_be_served_is_refused(folders, tmp_path):
    model = vit()
    for name, options in {"inner": {"site": "mixer"}, "headed": {"train": "head"}}.items():
        rs.steer(model, rank=2, name=name, **options)
        rs.save(model, tmp_path / name, name)
    for asked, message in (
        (str(tmp_path / "inner"), "serves 'block' and 'after'"),
        (str(tmp_path / "headed"), r"trained base tensors \(head.weight, head.bias\)"),
        (str(tmp_path / "none"), "there is none, or a damaged one"),
        ('{"a": ', "weights by folder as JSON"),
        ("{}", "one folder or more"),
        (json.dumps({folders["a"]: 1, folders["a"] + "/": 2}), "each of them once"),
        (json.dumps({folders["a"]: "much"}), "is a finite number"),
    ):
        with pytest.raises(rs.SteerError, match=message):
            Mix.open(asked)


def test_it_is_imported_without_vllm():
    program = "import sys, residual_steer as rs; rs.vllm.request; print('vllm' in sys.modules)"
    assert printed(program)[0] == "False\n"


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
def test_a_request_without_vllm_tells_what_to_install(folders):
    with pytest.raises(ImportError, match=r"residual-steer\[vllm\]"):
        rs.vllm.request(folders["a"])
