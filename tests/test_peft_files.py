"""A field in PEFT's files and in the library's own: what one writes, the other reads."""

import json
from pathlib import Path

import pytest
import torch

import residual_steer as rs
from peft_models import BY_NAME, MODELS, run, shake

peft = pytest.importorskip("peft")
HResConfig = rs.peft.HResConfig

pytestmark = pytest.mark.filterwarnings("ignore:Could not find a config file")  # of a base without a name
every = pytest.mark.parametrize("case", MODELS, ids=lambda case: case.name)
GPT2 = BY_NAME["gpt2"]


@every
@pytest.mark.parametrize("train", [(), "head"], ids=["field", "head"])
def test_a_native_field_goes_to_peft_and_back(case, train, tmp_path):
    head = case.head if train else ()
    model = shake(rs.steer(case.build(), rank={1: 4}, scale=0.5, activation="silu", dropout=0.1, train=head))
    on = run(case, model)
    rs.save(model, tmp_path / "adapter", format="peft")
    assert {file.name for file in (tmp_path / "adapter").iterdir()} >= {"adapter_config.json", "README.md"}
    whole = peft.PeftModel.from_pretrained(case.build(), tmp_path / "adapter", adapter_name="other")
    assert torch.equal(run(case, whole), on)
    again = rs.load(case.build(), tmp_path / "adapter", "again")
    assert torch.equal(run(case, again), on)
    assert rs.fields(again)[0].train == rs.fields(model)[0].train
    assert rs.parameters(again)
    whole.save_pretrained(tmp_path / "peft")
    assert torch.equal(run(case, rs.load(case.build(), tmp_path / "peft" / "other")), on)


@every
def test_a_field_made_in_peft_is_saved_natively(case, tmp_path):
    whole = shake(peft.get_peft_model(case.build(), HResConfig(rank=4)))
    on = run(case, whole)
    for format in ("native", "peft"):
        rs.save(whole, tmp_path / format, format=format)
        assert torch.equal(run(case, rs.load(case.build(), tmp_path / format)), on)
    assert torch.equal(run(case, peft.PeftModel.from_pretrained(case.build(), tmp_path / "peft")), on)
    rs.load(whole, tmp_path / "native", "more")
    with rs.use(whole, "more"):
        assert torch.equal(run(case, whole), on)


def test_an_adapter_that_version_0_2_wrote_loads():
    """Every tensor runs from -1 to 1, of a field beside the second of two blocks."""
    folder = Path(__file__).parent / "data" / "adapter-0.2"
    one = rs.load(GPT2.build(), folder)
    (field,) = rs.fields(one)
    assert (dict(field.ranks), field.scale, field.site) == ({1: 2}, 0.5, "block")
    for tensor in rs.parameters(one):
        assert torch.equal(tensor, torch.linspace(-1, 1, tensor.numel()).reshape(tensor.shape))
    assert torch.equal(run(GPT2, peft.PeftModel.from_pretrained(GPT2.build(), folder)), run(GPT2, one))


def test_what_the_other_files_cannot_hold_is_refused(tmp_path):
    model = rs.steer(GPT2.build(), rank=2, train="transformer.ln_f.bias")
    with pytest.raises(rs.SteerError, match=r"whole modules.*ln_f\.weight did not train"):
        rs.save(model, tmp_path / "part", format="peft")
    with pytest.raises(rs.SteerError, match="format"):
        rs.save(model, tmp_path / "part", format="zip")
    whole = peft.get_peft_model(GPT2.build(), HResConfig(rank=2, modules_to_save=["ln_f"]))
    for format in ("native", "peft"):
        with pytest.raises(rs.SteerError, match="in PEFT's wrappers"):
            rs.save(whole, tmp_path / "part", format=format)
    assert not (tmp_path / "part").exists()


def test_foreign_and_damaged_adapters_leave_the_model_as_it_was(tmp_path):
    rs.save(shake(rs.steer(GPT2.build(), rank=2)), tmp_path / "good", format="peft")
    config = json.loads((tmp_path / "good" / "adapter_config.json").read_text())
    weights = (tmp_path / "good" / "adapter_model.safetensors").read_bytes()

    def folder(name, changes, content=weights):
        place = tmp_path / name
        place.mkdir()
        (place / "adapter_config.json").write_text(json.dumps({**config, **changes}))
        if content is not None:
            (place / "adapter_model.safetensors").write_bytes(content)
        return place

    lora = tmp_path / "lora"
    other = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    peft.get_peft_model(GPT2.build(), other).save_pretrained(lora)
    model, keys = GPT2.build(), GPT2.build().state_dict().keys()
    for place, why in (
        (lora, "LORA.*no field"),
        (folder("torn", {}, weights[:100]), "could not read"),
        (folder("empty", {}, None), "could not read"),
        (folder("method", {"peft_type": "NONE"}), "could not read"),
        (folder("layers", {"layers": [0]}), r"left over are blocks\.1"),
        (folder("rank", {"rank": 3}), "shape"),
        (folder("far", {"layers": [9]}), "layer is an integer"),
        (folder("backbone", {"backbone": {"name": "gpt2", "widths": [8]}}), "trained on"),
    ):
        with pytest.raises(rs.SteerError, match=why):
            rs.load(model, place)
        assert model.state_dict().keys() == keys
    rs.load(model, tmp_path / "good")
