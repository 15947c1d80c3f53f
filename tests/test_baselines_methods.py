"""What apply refuses, and the methods without tokens against closed forms; and every kind in its users' hands."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional

import residual_steer as rs
from baseline_models import MODELS, applied, shaken, snapshot, trained
from cases import WIDTH
from residual_steer import HRes
from residual_steer.baselines.ssf import ScaleShift
from residual_steer.errors import UnsuitableError


@pytest.mark.parametrize(
    ("method", "options", "words"),
    [
        ("loar", {}, "`method` is one of hres, adaptformer, parallel-adapter, lora.* received 'loar'"),
        (None, {}, "`method` .* received None"),
        ("lora", {"rnak": 3}, "`lora` has no option 'rnak'; it has rank, alpha, dropout, layers, targets"),
        ("adaptformer", {"bias": False}, "`adaptformer` has no option 'bias'; it has rank, scale, dropout, layers"),
        ("full", {"rank": 3}, "`full` has no option 'rank'; it has none"),
        ("hres", {"ranks": 3}, "`hres` has no option 'ranks'; it has rank, scale, layers, site"),
        ("hres", {"rank": 99}, "rank.* received 99"),
        ("lora", {"train": "haed"}, "'haed' matches no parameter"),
        ("hres", {"train": "haed"}, "'haed' matches no parameter"),
        ("ssf", {"layers": [7]}, "layer.* -2 to 1"),
        ("vpt-deep", {"arch": "gpt2"}, "no known backbone"),
        ("vpt-deep", {"arch": "gpt3"}, "unknown backbone 'gpt3'"),
        ("vpt-deep", {"length": 0}, "`length`.* received 0"),
        ("vpt-shallow", {"length": True}, "`length`.* received True"),
    ],
)
def test_what_is_asked_wrongly_is_refused_and_changes_nothing(method, options, words):
    model = MODELS["timm-vit"].build().requires_grad_(True)
    before = snapshot(model)
    with pytest.raises(rs.SteerError, match=words) as raised:
        applied(model, method, **options)
    assert not isinstance(raised.value, UnsuitableError)  # a study goes on past those, and would hide a mistake
    assert snapshot(model) == before


@pytest.mark.parametrize("method", ["hres", "adaptformer", "lora", "vpt-deep", "ssf", "bitfit", "linear", "full"])
def test_a_model_carries_one_method_and_so_do_its_parts(method):
    model = applied("timm-vit", method)
    before = snapshot(model)
    for whole, where in ((model, "it"), (nn.Sequential(model), "its part '0'")):
        with pytest.raises(rs.SteerError, match=f"one method at a time: {where}|a part of this model, '0', is steered"):
            applied(whole, "bitfit")
    assert snapshot(model) == before


def test_models_of_others_are_refused():
    peft = pytest.importorskip("peft")
    foreign = MODELS["timm-vit"].build()
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["qkv"]), foreign)
    with pytest.raises(rs.SteerError, match=r"its part 'blocks\.0\.attn\.qkv' is PEFT's"):
        applied(foreign, "bitfit")
    compiled = torch.compile(MODELS["timm-vit"].build())
    with pytest.raises(rs.SteerError, match="compiled"):
        applied(compiled, "lora")
    with pytest.raises(rs.SteerError, match=r"a model is a torch\.nn\.Module; received str"):
        rs.baselines.apply("gpt2", "lora")


@pytest.mark.parametrize("method", ["lora", "ssf", "vpt-deep", "bitfit", "hres", "linear"])
def test_what_is_named_trains_along(method):
    opened = set(trained(applied("timm-vit", method, train=["head", "norm.*"])))
    own = {name for name in opened if name.startswith(("head.", "norm."))}
    assert own == {"head.weight", "head.bias", "norm.weight", "norm.bias"}
    assert (opened == own) is (method == "linear")


@pytest.mark.parametrize(
    ("method", "path", "name"),
    [
        ("vpt-deep", "blocks.1", "prompt"),
        ("vpt-shallow", "blocks.1", "prompt"),
        ("ssf", "blocks.1.norm2", "scale_shift"),
    ],
)
def test_a_name_that_is_taken_is_found_before_anything_is_put(method, path, name):
    model = MODELS["timm-vit"].build()
    setattr(model.get_submodule(path), name, 1)
    before = snapshot(model)
    with pytest.raises(rs.SteerError, match=f"has a {name!r} of its own"):
        applied(model, method)
    assert snapshot(model) == before


def field_in(module):
    (field,) = [m for m in module.modules() if isinstance(m, HRes)]
    return field


def test_adapters_are_fields_beside_the_mlp():
    model, x = shaken(applied("timm-vit", "adaptformer", rank=4)), torch.randn(2, 5, WIDTH)
    block, frozen = model.blocks[0], MODELS["timm-vit"].build().blocks[0]
    field = field_in(block)
    hidden = functional.relu(functional.linear(x, field.down.weight, field.down.bias))
    bottleneck = functional.linear(hidden, field.up.weight, field.up.bias)
    torch.testing.assert_close(block.mlp(x), frozen.mlp(x) + 0.1 * bottleneck)
    field = field_in(applied("mamba", "parallel-adapter", rank=4).backbone.layers[0].mixer)
    assert (field.activation, field.scale) == ("relu", 4.0)
    places = {name.rpartition(".steering_")[0] for name in trained(applied("mamba_ssm-2", "parallel-adapter"))}
    assert places == {"backbone.layers.0.mlp", "backbone.layers.1.mlp"}


@torch.no_grad()
def test_ssf_scales_and_shifts_what_leaves_norms_and_linear_layers():
    model, frozen = shaken(applied("gpt2", "ssf")), MODELS["gpt2"].build()
    x = torch.randn(2, 5, WIDTH)
    for path in ("ln_1", "ln_2", "attn.c_attn", "attn.c_proj", "mlp.c_fc"):
        layer, plain = (m.transformer.h[1].get_submodule(path) for m in (model, frozen))
        torch.testing.assert_close(layer(x), plain(x) * layer.scale_shift.scale + layer.scale_shift.shift)
    assert not hasattr(model.transformer.ln_f, "scale_shift")
    assert set(frozen.state_dict()) <= set(model.state_dict())
    host = nn.BatchNorm2d(3).eval()  # acts on channels
    plain = copy.deepcopy(host)
    child = shaken(ScaleShift(host, True, torch.device("cpu"), torch.float32))
    x = torch.randn(2, 3, 4, 5)
    torch.testing.assert_close(host(x), plain(x) * child.scale.view(-1, 1, 1) + child.shift.view(-1, 1, 1))


def test_ssf_stands_where_it_is_called():
    def places(name):
        found = [n for n, m in applied(name, "ssf", layers=[0]).named_modules() if isinstance(m, ScaleShift)]
        return {n.removesuffix(".scale_shift").partition(".0.")[2] for n in found}

    assert places("mamba") == {"norm", "mixer.in_proj", "mixer.x_proj", "mixer.out_proj"}
    assert places("mamba2") == {"norm", "mixer.in_proj", "mixer.norm", "mixer.out_proj"}
    assert places("mamba_ssm-1") == {"norm", "mixer.x_proj", "mixer.out_proj"}
    assert "attn.qkv" not in places("timm-eva")
    assert {"attn.proj", "norm1"} <= places("timm-eva")
    keys = applied("hf-vit", "ssf").vit.layers[0].attention
    assert keys.k_proj.scale_shift.shift is None
    assert keys.q_proj.scale_shift.shift is not None


def test_bitfit_trains_every_bias_but_those_of_keys_unless_positions_rotate():
    model = applied("hf-vit", "bitfit")
    biases = {n for n, _ in model.vit.named_parameters(prefix="vit") if n.endswith(".bias")}
    assert set(trained(model)) == {n for n in biases if "k_proj" not in n} < biases
    assert {n.rpartition(".")[2] for n in trained(applied("timm-eva", "bitfit"))} == {"bias", "q_bias", "v_bias"}
    assert "backbone.layers.0.mixer.dt_bias" in trained(applied("mamba2", "bitfit"))
    rotary = MODELS["hf-vit"].build()
    rotary.vit.rotary_emb = nn.Identity()
    assert set(trained(applied(rotary, "bitfit"))) == biases


class Bare(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Conv2d(3, 3, 3, padding=1, bias=False)])

    def forward(self, z):
        return z + self.blocks[0](z)


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("bitfit", "has none. Choose another method"),
        ("linear", "has none where timm or transformers keep theirs"),
        ("ssf", "calls none there"),
        ("lora", "here are none"),
        ("adaptformer", "sites of 'bare' are block.* 'parallel-adapter'"),
        ("parallel-adapter", "sites of 'bare' are block.* 'hres'"),
        ("vpt-deep", "is a map of features or changes its width"),
        ("prompt", "'bare' has no such embeddings"),
        ("prefix", "cache of a language model"),
    ],
)
def test_a_model_without_what_a_method_needs(method, words):
    rs.register_backbone("bare", matches=[f"{__name__}.Bare"])(lambda m: rs.Backbone(m.blocks, 3, channels=1))
    with pytest.raises(UnsuitableError, match=words):
        applied(Bare(), method)


HEADS = {
    "timm-vit": {"head.weight", "head.bias"},
    "timm-deit": {"head.weight", "head.bias", "head_dist.weight", "head_dist.bias"},
    "hf-vit": {"classifier.weight", "classifier.bias"},
    "gpt2": {"lm_head.weight"},
    "gpt2-classifier": {"score.weight"},
    "mamba_ssm-1": {"lm_head.weight"},
}


@pytest.mark.parametrize("name", HEADS)
def test_a_linear_probe_is_the_head(name):
    assert set(trained(applied(name, "linear"))) == HEADS[name]


def test_a_probe_on_tied_embeddings_leaves_them_and_survives_a_save(tmp_path):
    model = applied("gpt2", "linear")
    embeddings = model.transformer.wte.weight
    assert model.lm_head.weight is not embeddings
    assert torch.equal(model.lm_head.weight, embeddings)
    own = shaken(model).lm_head.weight.clone()
    model.tie_weights()
    assert torch.equal(model.lm_head.weight, own)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    ids = torch.randint(3, 50, (2, 6))
    torch.testing.assert_close(again(ids).logits, model(ids).logits)
    torch.testing.assert_close(again.transformer.wte.weight, embeddings)


@pytest.mark.parametrize("method", ["lora", "full", "linear", "vpt-deep"])
def test_transformers_mamba_trains_through_the_linear_scan(monkeypatch, method):
    from residual_steer import scan

    calls, selective_scan = [], scan.selective_scan
    monkeypatch.setattr(scan, "selective_scan", lambda *args: calls.append(1) or selective_scan(*args))
    model = applied("mamba", method)
    for training in (True, False):
        MODELS["mamba"].run(model.train(training))
        assert len(calls) == 2


HALF = {
    "vpt-deep": ("timm-vit", "mamba_ssm-1"),
    "vpt-shallow": ("timm-eva",),
    "prompt": ("gpt2", "mamba"),
    "prefix": ("gpt2",),
    "ssf": ("mamba2", "gpt2"),
    "lora": ("hf-vit",),
}


@pytest.mark.parametrize(("method", "name"), [(method, name) for method in HALF for name in HALF[method]])
def test_beside_half_precision_methods_train_in_fp32(method, name):
    case = MODELS[name]
    frozen = case.build(dtype=torch.bfloat16)
    model = applied(copy.deepcopy(frozen), method)
    own = trained(model).values()
    assert {p.dtype for p in own} == {torch.float32}
    expected, actual = case.run(frozen), case.run(model)
    assert actual.dtype == expected.dtype
    assert torch.equal(actual, expected) is (method in ("ssf", "lora"))
    case.loss(model.train()).backward()
    assert any(p.grad.abs().max() > 0 for p in own)


COMPILED = [("timm-eva", "vpt-shallow"), ("gpt2", "prompt"), ("mamba2", "vpt-deep"), ("timm-vit", "ssf")]


@pytest.mark.parametrize(("name", "method"), COMPILED)
@torch.no_grad()
def test_it_compiles_to_one_graph(name, method):
    model = shaken(applied(name, method))
    expected = MODELS[name].run(model)
    torch._dynamo.reset()
    torch.testing.assert_close(MODELS[name].run(torch.compile(model, fullgraph=True, backend="eager")), expected)


@pytest.mark.parametrize("method", ["vpt-deep", "vpt-shallow", "ssf"])
@pytest.mark.parametrize("name", ["timm-vit", "hf-vit", "mamba"])
def test_checkpointed_activations_give_the_same_gradients(name, method):
    plain, saving = (shaken(applied(name, method)).train() for _ in range(2))
    saving.set_grad_checkpointing(True) if name == "timm-vit" else saving.gradient_checkpointing_enable()
    for model in (plain, saving):
        MODELS[name].loss(model).backward()
    for one, other in zip(trained(plain).values(), trained(saving).values(), strict=True):
        torch.testing.assert_close(other.grad, one.grad)


PICKLED = [("timm-vit", "vpt-deep"), ("gpt2", "prompt"), ("gpt2", "prefix"), ("mamba", "ssf")]


@pytest.mark.parametrize(("name", "method"), PICKLED)
@torch.no_grad()
def test_a_pickle_stands_on_its_own(name, method):
    model = shaken(applied(name, method))
    expected = MODELS[name].run(model)
    assert torch.equal(MODELS[name].run(pickle.loads(pickle.dumps(model))), expected)


def test_parameters_made_in_inference_mode_train():
    model = MODELS["timm-vit"].build()
    with torch.inference_mode():
        applied(model, "vpt-deep")
    MODELS["timm-vit"].loss(model).backward()


@pytest.mark.parametrize("method", ["prefix", "lora", "ssf", "prompt"])
def test_every_module_keeps_its_mode(method):
    model = MODELS["gpt2"].build().train()
    model.transformer.h[1].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    after = {name: module.training for name, module in applied(model, method).named_modules()}
    assert {name: after[name] for name in modes} == modes
    assert not any(mode for name, mode in after.items() if name.startswith("transformer.h.1."))
