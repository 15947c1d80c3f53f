"""LoRA in place: where it goes, that it is called, and that merging leaves nothing of it."""

import copy
import sys
from importlib.machinery import ModuleSpec, PathFinder

import peft
import pytest
import torch
from torch import nn

import residual_steer as rs
from cases import WIDTH
from cases.case import before
from held import HELD
from residual_steer.errors import UnsuitableError

BY_NAME = {case.name: case for case in HELD}
OLD_PEFT = bool(before("peft", "0.16", refuses="it adapts what is never called"))
every_case = pytest.mark.parametrize("case", HELD, ids=lambda case: case.name)

WHERE = {
    "timm-vit": {"attn.qkv"},
    "timm-eva": {"attn.proj"},  # it reads the weight of qkv itself
    "timm-deit": {"attn.qkv"},
    "hf-vit": {"attention.q_proj", "attention.v_proj"},
    "hf-deit": {"attention.q_proj", "attention.v_proj"},
    "hf-dinov2": {"attention.attention.query", "attention.attention.value"}
    if before("transformers", "5.18", names="the attention's parts are named otherwise")
    else {"attention.q_proj", "attention.v_proj"},
    "hf-clip": {"self_attn.q_proj", "self_attn.v_proj"},
    "gpt2": {"attn.c_attn"},
    "gpt2-classifier": {"attn.c_attn"},
    "mamba": {"mixer.in_proj", "mixer.x_proj"},
    "mamba2": {"mixer.in_proj"},
    "falcon-mamba": {"mixer.in_proj", "mixer.x_proj"},
    "mamba_ssm-1": {"mixer.x_proj", "mixer.out_proj"},  # it multiplies the weight of in_proj itself
    "mamba_ssm-2": {"mixer.in_proj"},
}


def lora(case, **options):
    torch.manual_seed(4)
    model = case.build() if isinstance(case, type(HELD[0])) else case
    return rs.baselines.apply(model, "lora", **{"rank": 2, **options})


def adapted(model):
    """Return the paths inside blocks of what LoRA adapts."""
    found = [name for name, module in model.named_modules() if isinstance(module, peft.tuners.lora.LoraLayer)]
    return {name.split(".0.", 1)[-1].split(".1.", 1)[-1] for name in found}


def shaken(model):
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(3)) * 0.3)
    return model


@every_case
def test_it_goes_where_it_acts_by_default(case):
    assert adapted(lora(case)) == WHERE[case.name]


@every_case
@torch.no_grad()
def test_merging_keeps_the_output_and_leaves_the_plain_model(case):
    frozen = case.build()
    model = shaken(lora(case, alpha=3))
    expected = case.run(model)
    size = expected.abs().max().item()
    assert (expected - case.run(frozen)).abs().max() > 1e-3 * size
    assert rs.baselines.merge(model) is model
    torch.testing.assert_close(case.run(model), expected, rtol=0, atol=1e-5 * size)
    assert [(n, type(m)) for n, m in model.named_modules()] == [(n, type(m)) for n, m in frozen.named_modules()]
    assert list(model.state_dict()) == list(frozen.state_dict())
    assert not any(p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    rs.steer(model, rank=2)  # as it does any other model
    assert torch.equal(case.run(model), case.run(copy.deepcopy(rs.unsteer(model))))


def test_only_lora_merges():
    model = BY_NAME["gpt2"].build()
    with pytest.raises(rs.SteerError, match="carries none"):
        rs.baselines.merge(model)
    with pytest.raises(rs.SteerError, match="carries 'bitfit'"):
        rs.baselines.merge(rs.baselines.apply(model, "bitfit"))


def test_what_has_diverged_does_not_merge():
    model = lora(BY_NAME["gpt2"])
    layer = model.transformer.h[1].attn.c_attn
    with torch.no_grad():
        layer.lora_A["default"].weight[0, 0] = float("nan")
    weight = model.transformer.h[0].attn.c_attn.weight.clone()
    with pytest.raises(rs.SteerError, match="has diverged"):
        rs.baselines.merge(model)
    assert model.transformer.h[1].attn.c_attn is layer
    assert torch.equal(model.transformer.h[0].attn.c_attn.weight, weight)


def test_the_update_is_alpha_over_rank_times_b_times_a():
    case = BY_NAME["gpt2"]
    model = shaken(lora(case, rank=4, alpha=6))
    layer = model.transformer.h[0].attn.c_attn
    weight = case.build().transformer.h[0].attn.c_attn.weight
    expected = weight + 6 / 4 * (layer.lora_B["default"].weight @ layer.lora_A["default"].weight).T
    torch.testing.assert_close(rs.baselines.merge(model).transformer.h[0].attn.c_attn.weight, expected)
    plain = lora(case, rank=4).transformer.h[0].attn.c_attn
    assert plain.scaling == {"default": 1.0}


def test_layers_and_targets_choose():
    case = BY_NAME["timm-vit"]
    model = lora(case, layers=[-1], targets=["attn.*", "fc1"])
    layers = [name for name, m in model.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
    assert layers == ["blocks.1.attn.qkv", "blocks.1.attn.proj", "blocks.1.mlp.fc1"]
    assert adapted(lora(case, targets="proj")) == {"attn.proj"}
    assert adapted(lora(BY_NAME["gpt2"], targets=["mlp.c_proj"])) == {"mlp.c_proj"}


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        (
            "timm-vit",
            {"targets": ["head"]},
            r"'head' matches no linear layer inside a block; there are: attn.proj, attn",
        ),
        ("timm-vit", {"targets": ["norm1"]}, "'norm1' matches no linear layer"),
        ("timm-vit", {"targets": ["qkv", "nothing"]}, "'nothing' matches no linear layer"),
        ("timm-vit", {"targets": []}, "`targets` is a list of names"),
        ("timm-vit", {"targets": [3]}, "`targets` is a list of names"),
        ("timm-vit", {"rank": 0}, "`rank` is an integer of at least 1; received 0"),
        ("timm-vit", {"alpha": -1}, "`alpha` is a number above 0; received -1"),
        ("timm-vit", {"dropout": 1.0}, "`dropout` is a number of at least 0 and below 1; received 1"),
        ("timm-vit", {"layers": [2]}, "a layer is an integer from -2 to 1"),
        ("timm-eva", {"targets": ["qkv"]}, r"qkv would do nothing: .* set its attention's `qkv_bias_separate = True`"),
        ("mamba", {"targets": ["dt_proj"]}, r"dt_proj would do nothing: the model reads the weight .* other `targets`"),
        ("mamba_ssm-1", {"targets": ["in_proj", "x_proj"]}, r"on mixer.in_proj would do nothing"),
        pytest.param(
            "mamba",
            {"targets": ["out_proj"]},
            "PEFT refused",
            marks=pytest.mark.skipif(OLD_PEFT, reason="an older PEFT"),
        ),
    ],
)
def test_what_cannot_be_is_refused_and_changes_nothing(name, options, words):
    model = BY_NAME[name].build().requires_grad_(True)
    keys = list(model.state_dict())
    with pytest.raises(rs.SteerError, match=words):
        lora(model, **options)
    assert list(model.state_dict()) == keys
    assert all(p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert "peft_config" not in vars(model)


def test_evas_joint_projection_is_adapted_once_it_is_called():
    case = BY_NAME["timm-eva"]
    model = case.build()
    for block in model.blocks:
        block.attn.qkv_bias_separate = True
    assert adapted(lora(model)) == {"attn.qkv"}
    case.loss(model.train()).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_a_joint_projection_with_biases_of_its_own_is_read_and_not_called(stack):
    for block in stack.blocks:
        block.qkv, block.q_bias = nn.Linear(WIDTH, WIDTH), nn.Parameter(torch.zeros(WIDTH))  # as in timm's Swin V2
    with pytest.raises(rs.SteerError, match=r"qkv would do nothing: .* other `targets`"):
        lora(stack, targets=["qkv"])


def test_fused_paths_are_kept_away_from(monkeypatch):
    model = BY_NAME["mamba_ssm-1"].build()
    mixers = [block.mixer for block in model.backbone.layers]
    monkeypatch.setattr(sys.modules[type(mixers[0]).__module__], "causal_conv1d_fn", print)
    with pytest.raises(UnsuitableError, match=r"reads the weights itself; to change that, set .*use_fast_path = False"):
        lora(model)
    for mixer in mixers:
        mixer.use_fast_path = False
    assert adapted(lora(model)) == WHERE["mamba_ssm-1"]

    second = BY_NAME["mamba_ssm-2"].build()
    for block in second.backbone.layers:
        block.mixer.use_mem_eff_path = True
    with pytest.raises(rs.SteerError, match="use_mem_eff_path = False"):
        lora(second, targets=["mixer.out_proj"])
    assert adapted(lora(second)) == {"mixer.in_proj"}

    real = PathFinder.find_spec
    there = ModuleSpec("selective_scan_cuda", None)
    monkeypatch.setattr(PathFinder, "find_spec", lambda name, *a: there if name == there.name else real(name, *a))
    assert adapted(lora(BY_NAME["mamba"])) == {"mixer.in_proj"}


class Reader(nn.Module):
    """A block that reads the weight of one layer without calling it, unless told otherwise."""

    def __init__(self):
        super().__init__()
        self.mix, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.call = False

    def forward(self, z):
        h = self.mix(z) if self.call else nn.functional.linear(z, self.mix.weight, self.mix.bias)
        return z + self.out(torch.tanh(h))


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Reader(), Reader()])
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, z):
        for block in self.blocks:
            z = block(z)
        return self.head(z)


@pytest.fixture
def stack():
    rs.register_backbone("stack", matches=[f"{__name__}.Stack"])(lambda m: rs.Backbone(m.blocks, WIDTH, mlp="out"))
    torch.manual_seed(0)
    return Stack()


def batch():
    return torch.randn(2, 5, WIDTH)


@pytest.mark.parametrize("method", ["lora", "ssf"])
def test_what_is_never_called_is_found_out_in_the_first_training_step(stack, method):
    model = rs.baselines.apply(stack, method)
    model.eval()(batch())
    for _ in range(2):
        with pytest.raises(rs.SteerError, match=r"2 of the 4 modules .* blocks\.0\.mix, blocks\.1\.mix"):
            model.train()(batch())
    twin = copy.deepcopy(model)
    for block in model.blocks:
        block.call = True
    model.train()(batch())
    for block in model.blocks:  # it looks no more
        block.call = False
    model(batch())
    with pytest.raises(rs.SteerError, match=r"2 of the 4 modules"):
        twin.train()(batch())


def test_what_is_called_in_evaluation_says_nothing_about_training(stack):
    model = rs.baselines.apply(stack, "ssf")
    for block in model.blocks:
        block.call = True
    model.eval()(batch())
    for block in model.blocks:
        block.call = False
    with pytest.raises(rs.SteerError, match=r"2 of the 4 modules"):
        model.train()(batch())


def test_a_guard_leaves_nothing_and_stays_out_of_compiled_graphs(stack):
    for block in stack.blocks:
        block.call = True
    model = rs.baselines.apply(stack, "ssf")
    before = sum(len(m._forward_pre_hooks) for m in model.modules())
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="eager").train()
    z = batch()
    torch.testing.assert_close(compiled(z), model.train()(z))
    assert before == 5
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_a_call_that_failed_says_nothing_about_the_next(stack):
    for block in stack.blocks:
        block.call = True
    model = rs.baselines.apply(stack, "lora").train()
    with pytest.raises(RuntimeError):
        model(torch.randn(2, 5, WIDTH + 1))
    model(batch())


def test_a_family_that_nobody_knows_gets_it_on_all_its_layers(stack):
    for block in stack.blocks:
        block.call = True
    model = rs.baselines.apply(stack, "lora", train="head")
    assert adapted(model) >= {"out"}
    assert len([m for m in model.modules() if isinstance(m, peft.tuners.lora.LoraLayer)]) == 4
    assert model.head.weight.requires_grad


def test_beside_half_precision_it_trains_in_fp32():
    case = BY_NAME["mamba"]
    model = rs.baselines.apply(case.build(dtype=torch.bfloat16), "lora")
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert torch.equal(case.run(model), case.run(case.build(dtype=torch.bfloat16)))
    case.loss(model.train()).backward()


def test_without_peft_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(rs.SteerError, match=r"pip install 'residual-steer\[peft\]'"):
        lora(BY_NAME["gpt2"])
