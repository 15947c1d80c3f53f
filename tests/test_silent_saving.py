"""Faults that were silent: what is frozen, what trains and what is saved are one set."""

import copy

import pytest
import torch
import transformers
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.nn.utils import prune

import residual_steer as rs
from cases import randomise
from silent import RESNET, TABLE, Residual, fresh, ids, three, tiny


def test_statistics_of_the_frozen_base_stay_in_a_loop_of_ones_own(tmp_path):
    base = RESNET.build().eval()
    keys = {key: value.clone() for key, value in base.state_dict().items()}
    with torch.no_grad():
        off = RESNET.run(base)
    trained = rs.steer(base, rank=2).train()
    optimizer = torch.optim.AdamW(rs.parameters(trained), lr=1e-2)
    for _ in range(3):
        RESNET.loss(trained).backward()
        optimizer.step()
    trained.eval()
    with torch.no_grad():
        on = RESNET.run(trained)
        rs.save(trained, tmp_path)
        assert torch.equal(RESNET.run(rs.load(RESNET.build().eval(), tmp_path)), on)
        with rs.use(trained, None):
            assert torch.equal(RESNET.run(trained), off)
        rs.unsteer(trained)
    assert all(torch.equal(value, keys[key]) for key, value in trained.state_dict().items())
    trained.train()
    RESNET.run(trained)
    assert any(not torch.equal(value, keys[key]) for key, value in trained.state_dict().items())  # as before steering


@pytest.mark.parametrize("kind", ["batch", "instance"])
@pytest.mark.parametrize("frozen_before", [True, False])
def test_statistics_that_a_field_trains_are_its_own_and_the_bases_come_back(kind, frozen_before):
    norm = nn.BatchNorm1d(8, momentum=0.3)
    if kind == "instance":
        norm = nn.InstanceNorm1d(8, momentum=0.3, affine=True, track_running_stats=True)

    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks, self.norm = nn.ModuleList([Residual(8)]), norm

        def forward(self, x):
            return self.norm(self.blocks[0](x).transpose(1, 2))

    model, x = Head(), torch.randn(4, 5, 8)
    model.blocks.requires_grad_(not frozen_before)  # by somebody who left the norm open
    before = {name: getattr(norm, name) for name in ("momentum", "track_running_stats")}
    off = model.eval()(x)
    rs.steer(model, rs.Backbone(blocks=model.blocks, width=8), rank=2, train="norm")
    mean = norm.running_mean.clone()
    model.train()(x + 3)
    assert not torch.equal(norm.running_mean, mean)
    rs.use(model, None)
    model(x + 3)
    assert torch.equal(norm.running_mean, mean)
    torch.testing.assert_close(model.eval()(x), off)
    rs.unsteer(model)
    assert {name: getattr(norm, name) for name in before} == before
    torch.testing.assert_close(model(x), off)


class Counting(nn.Module):
    """A block with a stored buffer of its own kind, which moves in training."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x):
        if self.training:
            self.seen.add_(1)
        return x + self.linear(x)


def test_a_frozen_buffer_that_moves_all_the_same_is_said():
    model = nn.Sequential(Counting(), Counting())
    rs.steer(model, rs.Backbone(blocks=list(model), width=8), rank=2)
    model.train()
    with pytest.warns(UserWarning, match=r"changed 0\.seen, 1\.seen, which is frozen"):
        model(torch.ones(1, 2, 8))
    model.eval()
    model(torch.ones(1, 2, 8))


@three
def test_what_trains_and_is_not_saved_is_said(case, tmp_path):
    model = rs.steer(case.build().train(), rank=2)
    key, opened = next((k, p) for k, p in model.named_parameters() if "steering_" not in k and p.is_floating_point())
    opened.requires_grad_(True)
    with pytest.warns(UserWarning, match=rf"{key} train too, and `save` does not store"):
        case.loss(model)
    case.loss(model)  # said once
    with pytest.warns(UserWarning, match=rf"{key} require a gradient and belong to no field"):
        rs.save(model, tmp_path)
    rs.use(model, None)
    rs.use(model, "default")
    assert opened.requires_grad, "what somebody opened is theirs"


@pytest.mark.filterwarnings("ignore:Could not find a config file")  # older PEFT, of a model without a name
@pytest.mark.parametrize("first", ["lora", "steering"])
def test_lora_and_a_field_train_together_in_both_orders(first, tmp_path):
    peft = pytest.importorskip("peft")
    case = TABLE["gpt2"]
    model = case.build()
    with torch.no_grad():
        off = case.run(model)
    config = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    if first == "lora":
        whole = peft.get_peft_model(model, config)
        rs.steer(whole, rank=2)
    else:
        rs.steer(model, rank=2)
        whole = peft.get_peft_model(model, config)
        whole.train()
        with pytest.warns(UserWarning, match="'?default'? is selected and does not train: somebody closed"):
            case.loss(whole)  # PEFT closes whatever is not its own
        rs.use(whole, "default")
    lora = [p for n, p in whole.named_parameters() if "lora_" in n]
    for _ in range(2):  # the second time after another selection
        assert all(p.requires_grad for p in lora)
        assert all(p.requires_grad for p in rs.parameters(whole, "default"))
        rs.use(whole, None)
        rs.use(whole, "default")
        rs.freeze(whole)
        rs.thaw(whole)
    whole.train()
    case.loss(whole).backward()
    assert all(p.grad is not None for p in (*lora, *rs.parameters(whole)))
    rs.save(whole, tmp_path / "field")
    whole.save_pretrained(tmp_path / "lora")
    with torch.no_grad(), rs.use(whole, None), whole.disable_adapter():
        torch.testing.assert_close(case.run(whole.eval()), off)
    rs.load(case.build(), tmp_path / "field")
    assert rs.steer(whole, rank=2, name="more") is whole
    assert len(rs.fields(whole)) == 2
    rs.unsteer(whole)
    assert all(p.requires_grad for p in lora)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize("tool", ["dynamic", "torchao", "prune", "all-linear"])
def test_tools_that_convert_every_linear_leave_fields_alone(tool, tmp_path):
    case = TABLE["gpt-neox"]
    model = randomise(rs.steer(case.build(), rank=4))
    with torch.no_grad():
        before = case.run(model)
        if tool == "dynamic":
            model = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
        elif tool == "torchao":
            quantization = pytest.importorskip("torchao.quantization")
            quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
        elif tool == "prune":
            for module in [m for m in model.modules() if isinstance(m, nn.Linear)]:
                prune.l1_unstructured(module, "weight", 0.01)
        else:
            peft = pytest.importorskip("peft")
            peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear", r=2, task_type="CAUSAL_LM"))
        assert (case.run(model) - before).abs().max() < 0.2 * before.abs().max()
    rs.save(model, tmp_path)
    rs.load(case.build(), tmp_path)


def test_save_refuses_what_load_would_refuse(tmp_path):
    model = fresh(TABLE["gpt2"])
    rs.save(model, tmp_path / "good")
    before = {file.name: file.read_bytes() for file in (tmp_path / "good").iterdir()}
    field = next(m for m in model.modules() if isinstance(m, rs.HRes))
    with torch.no_grad():
        field.up.weight[0, 0] = float("nan")
    with pytest.raises(rs.SteerError, match="NaN"):
        rs.save(model, tmp_path / "good")
    field.reset()
    field.down.register_parameter("extra", nn.Parameter(torch.ones(2)))
    with pytest.raises(rs.SteerError, match="left over"):
        rs.save(model, tmp_path / "good")
    assert {file.name: file.read_bytes() for file in (tmp_path / "good").iterdir()} == before


def test_a_class_that_steers_itself_starts_at_zero_after_from_pretrained(tmp_path):
    class Mine(transformers.GPT2LMHeadModel):
        def __init__(self, config):
            super().__init__(config)
            rs.steer(self.transformer, rank=4)

    base = tiny()
    base.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        mine = Mine.from_pretrained(tmp_path / "base").eval()
        assert torch.equal(mine(ids()).logits, base(ids()).logits)
        assert all(m.down.weight.std() > 0 for m in mine.modules() if isinstance(m, rs.HRes))
        trained = randomise(mine)
        trained.save_pretrained(tmp_path / "steered")
        again = Mine.from_pretrained(tmp_path / "steered").eval()
        assert torch.equal(again(ids()).logits, trained(ids()).logits)


@three
def test_a_model_steered_on_meta_starts_at_zero_when_it_is_materialised(case):
    base = case.build()
    model = rs.steer(case.build().to("meta"), rank=2).to_empty(device="cpu")
    fields = [m for m in model.modules() if isinstance(m, rs.HRes)]
    model.load_state_dict(base.state_dict(), strict=False)
    for buffer, other in zip(model.named_buffers(), base.named_buffers(), strict=True):
        buffer[1].copy_(other[1])
    assert all(not f.up.weight.any() and f.down.weight.abs().max() <= 1 for f in fields)
    with torch.no_grad():
        torch.testing.assert_close(case.run(model.eval()), case.run(base.eval()))
    other = rs.steer(case.build().to("meta"), rank=2)
    other.load_state_dict(randomise(rs.steer(case.build(), rank=2)).state_dict(), assign=True)
    assert all(f.up.weight.any() for f in other.modules() if isinstance(f, rs.HRes))


@pytest.mark.parametrize("name", ["gpt2-classifier", "timm-vit"])
def test_a_head_beside_a_bf16_base_keeps_small_updates(name, tmp_path):
    case = TABLE[name]
    model = rs.steer(case.build("cpu", torch.bfloat16), rank=2, train=case.head)
    with torch.no_grad():
        assert torch.equal(case.run(model), case.run(case.build("cpu", torch.bfloat16)))
    inside = {id(p) for m in model.modules() if isinstance(m, rs.HRes) for p in m.parameters()}
    heads = [p for p in rs.parameters(model) if id(p) not in inside]
    assert heads
    assert all(p.dtype == torch.float32 and isinstance(p, nn.Parameter) for p in heads)
    assert {id(p) for p in heads} <= {id(p) for p in model.parameters()}
    before = [p.detach().clone() for p in heads]
    optimizer = torch.optim.SGD(heads, lr=1e-6)
    case.loss(model).backward()
    optimizer.step()
    assert all((p != q).any() for p, q in zip(heads, before, strict=True))
    with torch.no_grad():
        for p in heads:
            p += 0.5
        on = case.run(model)
        rs.save(model, tmp_path)
        assert torch.equal(case.run(rs.load(case.build("cpu", torch.bfloat16), tmp_path)), on)
        assert torch.equal(case.run(copy.deepcopy(model)), on)
        with rs.use(model, None):
            assert torch.equal(case.run(model), case.run(case.build("cpu", torch.bfloat16)))
        assert torch.equal(case.run(model), on)
        rs.steer(model, rank=2, name="b", train=case.head)
        rs.use(model, ["default", None])
        torch.testing.assert_close(case.run(model)[0], on[0], rtol=0.05, atol=0.05)
        rs.unsteer(model)
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    assert {type(m) for m in model.modules()} == {type(m) for m in case.build().modules()}


SELECTED = ["a", None, {"a": 1.0, "b": 0.5}, ["a", "b"]]


@pytest.mark.parametrize("then", SELECTED, ids=str)
@pytest.mark.parametrize("now", SELECTED, ids=str)
@torch.no_grad()
def test_a_state_dict_has_every_fields_head_whatever_is_selected(then, now):
    case = TABLE["gpt2-classifier"]

    def outputs(model):
        found = []
        for name in ("a", "b", "plain", None, now):
            rs.use(model, name)
            found.append(case.run(model))
        return found

    def made():
        model = case.build()
        for name in ("a", "b"):
            rs.steer(model, rank=2, name=name, train=case.head)
        return rs.steer(model, rank=2, name="plain")

    first, second = randomise(made()), made()
    for place, name in enumerate(("a", "b", "plain")):
        for parameter in rs.parameters(first, name):
            parameter += 0.1 * (place + 1)
    rs.use(first, then)
    state = {key: value.clone() for key, value in first.state_dict().items()}
    rs.use(second, now)
    second.load_state_dict(state)
    given = case.run(second)
    for one, other in zip(outputs(second), outputs(first), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(given, case.run(first)), "what was in place while it was loaded, too"
    rs.unsteer(second)
    assert second.state_dict().keys() == case.build().state_dict().keys()


@torch.no_grad()
def test_a_distributed_checkpoint_has_every_fields_head():
    case = TABLE["gpt2-classifier"]
    first, second = case.build(), case.build()
    for model in (first, second):
        for name in ("a", "b"):
            rs.steer(model, rank=2, name=name, train=case.head)
    randomise(first)
    rs.use(first, None)
    set_model_state_dict(second, get_model_state_dict(first))
    for name in ("a", "b"):
        for model in (first, second):
            rs.use(model, name)
        assert torch.equal(case.run(second), case.run(first))
    assert "residual_steer" not in vars(rs.unsteer(first))


def test_ids_of_tokens_and_storage_make_no_other_backbone(tmp_path):
    rs.save(rs.steer(tiny(), rank=2), tmp_path)
    rs.load(tiny(pad_token_id=3, eos_token_id=5, bos_token_id=4, id2label={0: "x"}), tmp_path)
    with pytest.warns(UserWarning, match=r"n_head 2 against 4|layer_norm_epsilon"):
        rs.load(tiny(n_head=4), tmp_path)


def test_a_difference_inside_a_config_is_named():
    from residual_steer._field_file import differences

    def backbone(**config):
        return {"class": "k", "config": config}

    stored = backbone(**{"rope.theta": 1.0, "heads": 2})
    there = backbone(**{"rope.theta": 2.0, "heads": 2})
    assert differences(stored, there) == "config: rope.theta 1.0 against 2.0"
    assert not differences(stored, backbone(heads=2))
