"""What holds, stores or measures fields follows one to all its sites: PEFT, export, diagnostics, caches."""

import peft
import pytest
import torch
import transformers
from torch import nn

import residual_steer as rs
from cases import LENGTH, TABLE, randomise
from residual_steer.diagnostics import control_effort
from residual_steer.peft import HResConfig
from test_contract import close

SCALE = 0.7
RANKS = {"input": 2, "mlp.c_fc": {1: 2}, "after": {-1: 3}}


def several(**more):
    return randomise(rs.steer(TABLE["gpt2"].build(), site=[*RANKS], rank=RANKS, **more))


@torch.no_grad()
def test_what_keeps_a_field_keeps_all_its_sites(tmp_path):
    case, model = TABLE["gpt2"], several()
    expected, info = case.run(model), rs.fields(model)[0]
    rs.save(model, tmp_path / "peft", format="peft")
    wrapped = peft.PeftModel.from_pretrained(case.build(), tmp_path / "peft")
    wrapped.save_pretrained(tmp_path / "again")
    model.save_pretrained(tmp_path / "whole")
    for again in (
        rs.load(case.build(), tmp_path / "peft"),
        wrapped,
        rs.load(case.build(), tmp_path / "again"),
        rs.from_pretrained(tmp_path / "whole"),
    ):
        assert torch.equal(case.run(again), expected)
        assert rs.fields(again)[0].sites == info.sites
    assert "rank | input: 2; after: 3; mlp.c_fc: 2 |" in rs.card(model, "me/mine")
    assert str(info).startswith(
        "default: rank 2 beside the input of blocks 0–1 and rank 3 after block 1 and rank 2 besid"
    )


def test_an_adapter_of_peft_says_its_sites_and_that_of_its_family():
    case = TABLE["gpt2"]
    model = peft.get_peft_model(case.build(), HResConfig(rank={"input": 4, "after": {-1: 2}}, site=("input", "after")))
    assert rs.fields(model)[0].sites == {"input": {0: 4, 1: 4}, "after": {1: 2}}
    assert (model.peft_config["default"].site, model.peft_config["default"].rank["after"]) == (
        ["input", "after"],
        {-1: 2},
    )
    model.add_adapter("two", HResConfig(rank=2))
    assert model.peft_config["two"].site == "block"
    model.add_adapter("three", HResConfig(rank={"input": 1, "after": 1}, site=["after", "input"]))
    randomise(model)
    model.base_model.add_weighted_adapter(["default", "three"], [0.5, -2.0], "sum")
    expected = []
    for mix in ({"default": 0.5, "three": -2.0}, "sum"):
        rs.use(model, mix)
        expected.append(case.run(model.eval()))
    close(*expected)


@torch.no_grad()
def test_lora_around_a_steered_linear_map_leaves_its_field(tmp_path):
    case, model = TABLE["gpt2"], several()
    expected = case.run(model)
    lora = peft.LoraConfig(r=2, target_modules=["c_fc", "c_attn"], fan_in_fan_out=True)
    assert torch.allclose(case.run(peft.get_peft_model(model, lora)), expected, atol=1e-6)
    other = peft.get_peft_model(case.build(), lora)
    before = case.run(other)
    assert torch.equal(case.run(rs.steer(other, site="mlp.c_fc", rank=2)), before)
    assert not torch.equal(case.run(randomise(other)), before)


@torch.no_grad()
def test_a_baked_model_has_what_is_after_its_blocks_and_no_linear_maps(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    case = TABLE["gpt2"]
    with pytest.raises(rs.SteerError, match=r"no place for a field at a linear map, 'mlp.c_fc'"):
        rs.export(several(), tmp_path / "out")
    model = randomise(rs.steer(case.build(), site=["block", "after", "input"], rank=9, scale=SCALE))
    rs.export(model, tmp_path / "out")
    auto = transformers.AutoModelForCausalLM
    baked = auto.from_pretrained(tmp_path / "out", trust_remote_code=True).eval()
    torch.testing.assert_close(case.run(baked), case.run(model), rtol=1e-5, atol=1e-6)


def test_control_effort_is_measured_site_by_site():
    model = several()
    found = control_effort(model, [TABLE["gpt2"].inputs(model)])
    assert [(one.site, one.layer) for one in found.layers] == [
        ("input", 0),
        ("input", 1),
        ("after", 1),
        ("mlp.c_fc", 1),
    ]
    assert sum(one.share for one in found.layers) == pytest.approx(1)
    assert [row["site"] for row in found.table().rows] == ["input", "input", "after", "mlp.c_fc"]
    found.plot()


@pytest.mark.parametrize("site", ["after", ["block", "after"], "mlp.c_fc"])
def test_a_cached_prefix_gives_the_same_losses(site):
    losses = []
    for cached in (False, True):
        model = TABLE["gpt2"].build()
        torch.manual_seed(0)
        rs.steer(model, rank=4, site=site, layers=[1])
        ids = torch.randint(3, 50, (8, LENGTH), generator=torch.Generator().manual_seed(1))
        data = [{"input_ids": part, "labels": part} for part in ids.split(4)]
        losses.append(rs.fit(model, data, steps=6, lr=1e-2, progress=False, cache_prefix=cached).train)
    assert [row["loss"] for row in losses[0]] == pytest.approx([row["loss"] for row in losses[1]], rel=1e-5)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@torch.no_grad()
def test_nested_streams_have_what_is_after_their_blocks():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    x, mask = torch.randn(2, 5, 16), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    backbone = rs.Backbone(blocks=list(model.layers), width=16, mixer="self_attn")
    randomise(rs.steer(model, backbone, rank=4, site="after"))
    whole = model(x, src_key_padding_mask=mask)
    torch.testing.assert_close(whole[1:, :3], model(x[1:, :3]))
    torch.testing.assert_close(whole[:1], model(x[:1]))
    rs.steer(rs.unsteer(model), backbone, rank=2, site="mixer.out_proj")
    with pytest.raises(rs.SteerError, match="would do nothing"):
        model(x, src_key_padding_mask=mask)
