"""LoRA in place: where it goes, that it is called, and that merging leaves nothing of it."""

import copy
import sys
from importlib.machinery import ModuleSpec, PathFinder

import peft
import pytest
import torch
from torch import nn

import residual_steer as rs
from baseline_models import MODELS, applied, shaken, snapshot, trained
from cases import CASES, WIDTH
from cases.case import before
from residual_steer.errors import UnsuitableError

OLD_PEFT = before("peft", "0.16", refuses="it adapts what is never called")
REFUSED_BY_PEFT = [] if OLD_PEFT else [("mamba", {"targets": ["out_proj"]}, "PEFT refused")]

WHERE = {
    "timm-vit": {"attn.qkv"},
    "timm-eva": {"attn.proj"},  # it reads the weight of qkv itself
    "timm-deit": {"attn.qkv"},
    "hf-vit": {"attention.q_proj", "attention.v_proj"},
    "hf-deit": {"attention.q_proj", "attention.v_proj"},
    "hf-dinov2": {"attention.q_proj", "attention.v_proj"},
    "hf-clip": {"self_attn.q_proj", "self_attn.v_proj"},
    "gpt2": {"attn.c_attn"},
    "gpt2-classifier": {"attn.c_attn"},
    "mamba": {"mixer.in_proj", "mixer.x_proj"},
    "mamba2": {"mixer.in_proj"},
    "falcon-mamba": {"mixer.in_proj", "mixer.x_proj"},
    "mamba_ssm-1": {"mixer.x_proj", "mixer.out_proj"},  # it multiplies the weight of in_proj itself
    "mamba_ssm-2": {"mixer.in_proj"},
}
if before("transformers", "5.18", names="the attention's parts are named otherwise"):
    WHERE["hf-dinov2"] = {"attention.attention.query", "attention.attention.value"}


def lora(model, **options):
    return applied(model, "lora", **options)


def layers_of(model):
    return [name for name, module in model.named_modules() if isinstance(module, peft.tuners.lora.LoraLayer)]


def adapted(model):
    """Return the paths inside blocks of what LoRA adapts."""
    return {name.split(".0.", 1)[-1].split(".1.", 1)[-1] for name in layers_of(model)}


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_it_goes_where_it_acts_and_merging_leaves_the_plain_model_with_the_same_output(name):
    case, frozen = MODELS[name], MODELS[name].build()
    model = shaken(lora(name, alpha=3))
    assert adapted(model) == WHERE[name]
    expected = case.run(model)
    size = expected.abs().max().item()
    assert (expected - case.run(frozen)).abs().max() > 1e-3 * size
    assert rs.baselines.merge(model) is model
    torch.testing.assert_close(case.run(model), expected, rtol=0, atol=1e-5 * size)
    assert [(n, type(m)) for n, m in model.named_modules()] == [(n, type(m)) for n, m in frozen.named_modules()]
    assert snapshot(model) == snapshot(frozen)
    assert not any("forward" in vars(m) for m in model.modules())
    rs.steer(model, rank=2)  # as it does any other model
    assert torch.equal(case.run(model), case.run(copy.deepcopy(rs.unsteer(model))))


@torch.no_grad()
def test_blocks_without_linear_layers_get_it_on_their_pointwise_convolutions():
    model = shaken(lora(next(case for case in CASES if case.name == "timm-resnet").build(), rank=2, alpha=6))
    images = torch.randn(2, 3, 32, 32)
    assert {name.rpartition(".")[2] for name in layers_of(model)} == {"conv1", "conv3"}
    layer, expected = model.layer1[1].conv1, model(images)
    update = 3 * (layer.lora_B["default"].weight[:, :, 0, 0] @ layer.lora_A["default"].weight[:, :, 0, 0])
    weight = layer.get_base_layer().weight[:, :, 0, 0] + update
    rs.baselines.merge(model)
    torch.testing.assert_close(model.layer1[1].conv1.weight[:, :, 0, 0], weight)
    torch.testing.assert_close(model(images), expected)


@pytest.mark.parametrize(("method", "words"), [(None, "carries none"), ("bitfit", "carries 'bitfit'")])
def test_only_lora_merges(method, words):
    model = MODELS["gpt2"].build()
    with pytest.raises(rs.SteerError, match=words):
        rs.baselines.merge(applied(model, method) if method else model)


def test_what_has_diverged_does_not_merge():
    model = lora("gpt2")
    first, last = (block.attn.c_attn for block in model.transformer.h)
    with torch.no_grad():
        last.lora_A["default"].weight[0, 0] = float("nan")
    weight = first.weight.clone()
    with pytest.raises(rs.SteerError, match="has diverged"):
        rs.baselines.merge(model)
    assert model.transformer.h[1].attn.c_attn is last
    assert torch.equal(model.transformer.h[0].attn.c_attn.weight, weight)


def test_the_update_is_alpha_over_rank_times_b_times_a():
    model = shaken(lora("gpt2", rank=4, alpha=6))
    layer = model.transformer.h[0].attn.c_attn
    weight = MODELS["gpt2"].build().transformer.h[0].attn.c_attn.weight
    expected = weight + 6 / 4 * (layer.lora_B["default"].weight @ layer.lora_A["default"].weight).T
    torch.testing.assert_close(rs.baselines.merge(model).transformer.h[0].attn.c_attn.weight, expected)
    assert lora("gpt2", rank=4).transformer.h[0].attn.c_attn.scaling == {"default": 1.0}


def test_layers_and_targets_choose():
    model = lora("timm-vit", layers=[-1], targets=["attn.*", "fc1"])
    assert layers_of(model) == ["blocks.1.attn.qkv", "blocks.1.attn.proj", "blocks.1.mlp.fc1"]
    assert adapted(lora("timm-vit", targets="proj")) == {"attn.proj"}
    assert adapted(lora("gpt2", targets=["mlp.c_proj"])) == {"mlp.c_proj"}


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("timm-vit", {"targets": ["head"]}, "'head' matches no linear map inside a block; .*: attn.proj, attn"),
        ("timm-vit", {"targets": ["norm1"]}, "'norm1' matches no linear map"),
        ("timm-vit", {"targets": ["qkv", "nothing"]}, "'nothing' matches no linear map"),
        ("timm-vit", {"targets": []}, r"`targets` is a list of names.* received \[\]"),
        ("timm-vit", {"targets": [3]}, r"`targets` is a list of names.* received \[3\]"),
        ("timm-vit", {"rank": 0}, "`rank`.* received 0"),
        ("timm-vit", {"alpha": -1}, "`alpha`.* received -1"),
        ("timm-vit", {"dropout": 1.0}, "`dropout`.* received 1.0"),
        ("timm-vit", {"layers": [2]}, "layer.* -2 to 1"),
        ("timm-eva", {"targets": ["qkv"]}, "qkv would do nothing: .* set its attention's `qkv_bias_separate = True`"),
        ("mamba", {"targets": ["dt_proj"]}, "dt_proj would do nothing: the model reads the weight .* other `targets`"),
        ("mamba_ssm-1", {"targets": ["in_proj", "x_proj"]}, "on mixer.in_proj would do nothing"),
        *REFUSED_BY_PEFT,
    ],
)
def test_what_cannot_be_is_refused_and_changes_nothing(name, options, words):
    model = MODELS[name].build().requires_grad_(True)
    untouched = snapshot(model)
    with pytest.raises(rs.SteerError, match=words):
        lora(model, **options)
    assert snapshot(model) == untouched


def test_evas_joint_projection_is_adapted_once_it_is_called():
    model = MODELS["timm-eva"].build()
    for block in model.blocks:
        block.attn.qkv_bias_separate = True
    assert adapted(lora(model)) == {"attn.qkv"}
    MODELS["timm-eva"].loss(model.train()).backward()
    assert all(p.grad is not None for p in trained(model).values())


def test_fused_paths_are_kept_away_from(monkeypatch):
    model = MODELS["mamba_ssm-1"].build()
    mixers = [block.mixer for block in model.backbone.layers]
    monkeypatch.setattr(sys.modules[type(mixers[0]).__module__], "causal_conv1d_fn", print)
    with pytest.raises(UnsuitableError, match=r"reads the weights itself; to change that, set .*use_fast_path = False"):
        lora(model)
    for mixer in mixers:
        mixer.use_fast_path = False
    assert adapted(lora(model)) == WHERE["mamba_ssm-1"]

    second = MODELS["mamba_ssm-2"].build()
    for block in second.backbone.layers:
        block.mixer.use_mem_eff_path = True
    with pytest.raises(rs.SteerError, match="use_mem_eff_path = False"):
        lora(second, targets=["mixer.out_proj"])
    assert adapted(lora(second)) == {"mixer.in_proj"}

    real = PathFinder.find_spec
    there = ModuleSpec("selective_scan_cuda", None)
    monkeypatch.setattr(PathFinder, "find_spec", lambda name, *a: there if name == there.name else real(name, *a))
    assert adapted(lora("mamba")) == {"mixer.in_proj"}


def test_beside_half_precision_it_trains_in_fp32():
    case, frozen = MODELS["mamba"], MODELS["mamba"].build(dtype=torch.bfloat16)
    model = lora(copy.deepcopy(frozen))
    assert {p.dtype for p in trained(model).values()} == {torch.float32}
    assert torch.equal(case.run(model), case.run(frozen))
    case.loss(model.train()).backward()


def test_without_peft_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(rs.SteerError, match=r"pip install 'residual-steer\[peft\]'"):
        lora("gpt2")


class Reader(nn.Module):
    """A block that reads the weight of one layer without calling it, unless `call`."""

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
        self.blocks, self.head = nn.ModuleList([Reader(), Reader()]), nn.Linear(WIDTH, 3)

    def forward(self, z):
        for block in self.blocks:
            z = block(z)
        return self.head(z)

    def calls(self, call):
        for block in self.blocks:
            block.call = call
        return self


@pytest.fixture
def stack():
    rs.register_backbone("stack", matches=[f"{__name__}.Stack"])(lambda m: rs.Backbone(m.blocks, WIDTH, mlp="out"))
    return Stack()


def batch():
    return torch.randn(2, 5, WIDTH)


def test_a_joint_projection_with_biases_of_its_own_is_read_and_not_called(stack):
    for block in stack.blocks:
        block.qkv, block.q_bias = nn.Linear(WIDTH, WIDTH), nn.Parameter(torch.zeros(WIDTH))  # as in timm's Swin V2
    with pytest.raises(rs.SteerError, match=r"qkv would do nothing: .* other `targets`"):
        lora(stack, targets=["qkv"])


@pytest.mark.parametrize("method", ["lora", "ssf"])
def test_what_is_never_called_is_found_out_in_the_first_training_step(stack, method):
    model = applied(stack, method)
    missed = pytest.raises(rs.SteerError, match=r"2 of the 4 modules .* blocks\.0\.mix, blocks\.1\.mix")
    model.eval()(batch())
    for _ in range(2):
        with missed:
            model.train()(batch())
    model.calls(True).eval()(batch())  # which says nothing about training
    with missed:
        model.calls(False).train()(batch())
    twin = copy.deepcopy(model)
    model.calls(True)(batch())
    model.calls(False)(batch())  # it looks no more
    with missed:
        twin(batch())


def test_a_call_that_failed_says_nothing_about_the_next(stack):
    model = applied(stack.calls(True), "lora", train="head").train()
    assert len(layers_of(model)) == 4  # a family that nobody knows gets it on all its layers
    assert model.head.weight.requires_grad
    with pytest.raises(RuntimeError):
        model(torch.randn(2, 5, WIDTH + 1))
    model(batch())


def test_a_guard_leaves_nothing_and_stays_out_of_compiled_graphs(stack):
    model = applied(stack.calls(True), "ssf")
    assert sum(len(m._forward_pre_hooks) for m in model.modules()) == 5
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="eager").train()
    z = batch()
    torch.testing.assert_close(compiled(z), model.train()(z))
    assert not any(m._forward_pre_hooks for m in model.modules())
