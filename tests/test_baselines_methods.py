"""What apply refuses, and the methods without tokens: held against closed forms."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional

import residual_steer as rs
from cases import WIDTH, closed_form
from held import HELD
from residual_steer import HRes
from residual_steer.baselines.ssf import ScaleShift
from residual_steer.errors import UnsuitableError

BY_NAME = {case.name: case for case in HELD}
TOKENS = {"prompt": {"length": 3}, "prefix": {"length": 3}, "vpt-shallow": {"length": 3}, "vpt-deep": {"length": 3}}


def made(name, method, **options):
    return rs.baselines.apply(BY_NAME[name].build(), method, **options)


def opened(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def shaken(model):
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(3)) * 0.3)
    return model


def snapshot(model):
    hooks = [(n, len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()]
    return hooks, list(model.state_dict()), [p.requires_grad for p in model.parameters()], sorted(vars(model))


@pytest.mark.parametrize(
    ("method", "options", "words"),
    [
        ("loar", {}, r"`method` is one of hres, adaptformer, parallel-adapter, lora.* received 'loar'"),
        (None, {}, "`method` .* received None"),
        ("lora", {"rnak": 3}, r"`lora` has no option 'rnak'; it has rank, alpha, dropout, layers, targets"),
        ("full", {"rank": 3}, "`full` has no option 'rank'; it has none"),
        ("hres", {"ranks": 3}, r"`hres` has no option 'ranks'; it has rank, scale, layers, site"),
        ("hres", {"rank": 99}, "`rank` is an integer from 1 to the width"),
        ("lora", {"train": "haed"}, r"the `train` pattern 'haed' matches no parameter"),
        ("hres", {"train": "haed"}, r"the `train` pattern 'haed' matches no parameter"),
        ("ssf", {"layers": [7]}, "a layer is an integer"),
        ("vpt-deep", {"arch": "gpt2"}, "no known backbone"),
        ("vpt-deep", {"arch": "gpt3"}, "unknown backbone 'gpt3'"),
    ],
)
def test_what_is_asked_wrongly_is_refused_and_changes_nothing(method, options, words):
    model = BY_NAME["timm-vit"].build().requires_grad_(True)
    before = snapshot(model)
    with pytest.raises(rs.SteerError, match=words) as raised:
        rs.baselines.apply(model, method, **options)
    assert not isinstance(raised.value, UnsuitableError)  # a study goes on past those, and would hide a mistake
    assert snapshot(model) == before


@pytest.mark.parametrize("method", ["hres", "adaptformer", "lora", "vpt-deep", "ssf", "bitfit", "linear", "full"])
def test_a_model_carries_one_method(method):
    model = made("timm-vit", method, **({"rank": 2} if method in ("hres", "adaptformer") else {}))
    before = snapshot(model)
    with pytest.raises(rs.SteerError, match="one method at a time: it"):
        rs.baselines.apply(model, "bitfit")
    assert snapshot(model) == before


def test_nor_do_its_parts_carry_another():
    part = nn.Sequential(made("timm-vit", "ssf"))
    with pytest.raises(rs.SteerError, match="its part '0' carries 'ssf'"):
        rs.baselines.apply(part, "lora")
    peft = pytest.importorskip("peft")
    foreign = BY_NAME["timm-vit"].build()
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["qkv"]), foreign)
    with pytest.raises(rs.SteerError, match=r"its part 'blocks\.0\.attn\.qkv' is PEFT's"):
        rs.baselines.apply(foreign, "bitfit")


def test_a_compiled_or_wrapped_model_is_refused():
    compiled = torch.compile(BY_NAME["timm-vit"].build())
    with pytest.raises(rs.SteerError, match="compiled model"):
        rs.baselines.apply(compiled, "lora")
    with pytest.raises(rs.SteerError, match=r"a model is a torch\.nn\.Module"):
        rs.baselines.apply("gpt2", "lora")


@pytest.mark.parametrize("method", ["lora", "ssf", "vpt-deep", "bitfit", "hres", "linear"])
def test_what_is_named_trains_along(method):
    options = {"rank": 2} if method in ("lora", "hres") else {}
    model = made("timm-vit", method, train=["head", "norm.*"], **options)
    own = {name for name in opened(model) if name.startswith(("head.", "norm."))}
    assert own == {"head.weight", "head.bias", "norm.weight", "norm.bias"}
    assert (opened(model) - own == set()) is (method == "linear")


@pytest.mark.parametrize(
    ("method", "path", "name"),
    [
        ("vpt-deep", "blocks.1", "prompt"),
        ("vpt-shallow", "blocks.1", "prompt"),
        ("ssf", "blocks.1.norm2", "scale_shift"),
    ],
)
def test_a_name_that_is_taken_is_found_before_anything_is_put(method, path, name):
    model = BY_NAME["timm-vit"].build()
    setattr(model.get_submodule(path), name, 1)
    before = snapshot(model)
    with pytest.raises(rs.SteerError, match=f"has a {name!r} of its own"):
        rs.baselines.apply(model, method)
    assert snapshot(model) == before


def test_presets_are_fields_beside_the_mlp():
    model = shaken(made("timm-vit", "adaptformer", rank=4))
    block, x = model.blocks[0], torch.randn(2, 5, WIDTH)
    (field,) = [m for m in block.modules() if isinstance(m, HRes)]
    frozen = BY_NAME["timm-vit"].build().blocks[0]
    down, up = (getattr(field, name) for name in ("down", "up"))
    bottleneck = functional.linear(functional.relu(functional.linear(x, down.weight, down.bias)), up.weight, up.bias)
    torch.testing.assert_close(block.mlp(x), frozen.mlp(x) + 0.1 * bottleneck)
    assert (field.activation, field.scale) == ("relu", 0.1)

    shaken(parallel := made("mamba", "parallel-adapter", rank=4))
    (field,) = [m for m in parallel.backbone.layers[0].mixer.modules() if isinstance(m, HRes)]
    assert (field.activation, field.scale) == ("relu", 4.0)
    assert opened(made("mamba_ssm-2", "parallel-adapter", rank=4)) == {
        f"backbone.layers.{i}.mlp.steering_mlp.fields.default.{part}.{kind}"
        for i in range(2)
        for part in ("down", "up")
        for kind in ("weight", "bias")
    }
    assert closed_form(field, x).shape == x.shape


@torch.no_grad()
def test_ssf_scales_and_shifts_what_leaves_norms_and_linear_layers():
    model, frozen = shaken(made("gpt2", "ssf")), BY_NAME["gpt2"].build()
    x = torch.randn(2, 5, WIDTH)
    for path in ("ln_1", "ln_2", "attn.c_attn", "attn.c_proj", "mlp.c_fc"):
        layer, plain = (m.transformer.h[1].get_submodule(path) for m in (model, frozen))
        child = layer.scale_shift
        torch.testing.assert_close(layer(x), plain(x) * child.scale + child.shift)
    assert not hasattr(model.transformer.ln_f, "scale_shift")
    assert set(frozen.state_dict()) <= set(model.state_dict())


def test_ssf_stands_where_it_is_called():
    def places(name):
        found = [n for n, m in made(name, "ssf", layers=[0]).named_modules() if isinstance(m, ScaleShift)]
        return {n.removesuffix(".scale_shift").partition(".0.")[2] for n in found}

    assert places("mamba") == {"norm", "mixer.in_proj", "mixer.x_proj", "mixer.out_proj"}
    assert places("mamba2") == {"norm", "mixer.in_proj", "mixer.norm", "mixer.out_proj"}
    assert places("mamba_ssm-1") == {"norm", "mixer.x_proj", "mixer.out_proj"}
    assert "attn.qkv" not in places("timm-eva")
    assert {"attn.proj", "norm1"} <= places("timm-eva")
    keys = made("hf-vit", "ssf").vit.layers[0].attention
    assert keys.k_proj.scale_shift.shift is None
    assert keys.q_proj.scale_shift.shift is not None


@torch.no_grad()
def test_ssf_on_a_norm_of_feature_maps_acts_on_channels():
    host = nn.BatchNorm2d(3).eval()
    child = shaken(ScaleShift(host, True, torch.device("cpu"), torch.float32))
    x = torch.randn(2, 3, 4, 5)
    plain = copy.deepcopy(host)
    plain._forward_hooks.clear()
    torch.testing.assert_close(host(x), plain(x) * child.scale.view(-1, 1, 1) + child.shift.view(-1, 1, 1))


def test_bitfit_trains_every_bias_but_those_of_keys():
    model = made("hf-vit", "bitfit")
    biases = {n for n, _ in model.vit.named_parameters(prefix="vit") if n.endswith(".bias")}
    assert opened(model) == {n for n in biases if "k_proj" not in n}
    assert any("k_proj" in n for n in biases)
    assert {n.rpartition(".")[2] for n in opened(made("timm-eva", "bitfit"))} == {"bias", "q_bias", "v_bias"}
    assert "backbone.layers.0.mixer.dt_bias" in opened(made("mamba2", "bitfit"))


def test_bitfit_keeps_key_biases_where_positions_rotate():
    model = BY_NAME["hf-vit"].build()
    model.vit.rotary_emb = nn.Identity()
    rs.baselines.apply(model, "bitfit")
    assert "vit.layers.0.attention.k_proj.bias" in opened(model)


class Bare(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Conv2d(3, 3, 1, bias=False)])

    def forward(self, z):
        return z + self.blocks[0](z)


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("bitfit", "has none. Choose another method"),
        ("linear", "has none where timm or transformers keep theirs"),
        ("ssf", "calls none there"),
        ("lora", "here are none"),
        ("adaptformer", "the sites of 'bare' are block"),
        ("parallel-adapter", "the sites of 'bare' are block.* 'hres'"),
        ("vpt-deep", "is a map of features or changes its width"),
        ("prompt", "'bare' has no such embeddings"),
        ("prefix", "cache of a language model"),
    ],
)
def test_a_model_without_what_a_method_needs(method, words):
    rs.register_backbone("bare", matches=[f"{__name__}.Bare"])(lambda m: rs.Backbone(m.blocks, 3, channels=1))
    with pytest.raises(UnsuitableError, match=words):
        rs.baselines.apply(Bare(), method)


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
    assert opened(made(name, "linear")) == HEADS[name]


def test_a_probe_on_tied_embeddings_leaves_them_and_survives_a_save(tmp_path):
    model = made("gpt2", "linear")
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


def test_transformers_mamba_trains_through_the_linear_scan(monkeypatch):
    from residual_steer import scan

    calls, selective_scan = [], scan.selective_scan
    monkeypatch.setattr(scan, "selective_scan", lambda *args: calls.append(1) or selective_scan(*args))
    for method in ("lora", "full", "linear", "vpt-deep"):
        model = made("mamba", method).train()
        before = len(calls)
        BY_NAME["mamba"].run(model)
        assert len(calls) == before + 2
        BY_NAME["mamba"].run(model.eval())
        assert len(calls) == before + 2
    plain = rs.baselines.merge(made("mamba", "lora"))
    assert not any(m._forward_hooks or "forward" in m.__dict__ for m in plain.modules())


HALF = [
    ("timm-vit", "vpt-deep"),
    ("timm-eva", "vpt-shallow"),
    ("gpt2", "prompt"),
    ("gpt2", "prefix"),
    ("mamba", "prompt"),
]
HALF += [("mamba_ssm-1", "vpt-deep"), ("mamba2", "ssf"), ("gpt2", "ssf"), ("hf-vit", "lora")]


@pytest.mark.parametrize(("name", "method"), HALF)
def test_beside_half_precision_methods_train_in_fp32(name, method):
    case = BY_NAME[name]
    frozen = case.build(dtype=torch.bfloat16)
    model = rs.baselines.apply(copy.deepcopy(frozen), method, **TOKENS.get(method, {}))
    own = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in own} == {torch.float32}
    expected = case.run(frozen)
    actual = case.run(model)
    assert actual.dtype == expected.dtype
    assert torch.equal(actual, expected) is (method in ("ssf", "lora"))
    case.loss(model.train()).backward()
    assert any(p.grad.abs().max() > 0 for p in own)


COMPILED = [("timm-eva", "vpt-shallow"), ("gpt2", "prompt"), ("mamba2", "vpt-deep"), ("timm-vit", "ssf")]


@pytest.mark.parametrize(("name", "method"), COMPILED)
@torch.no_grad()
def test_it_compiles_to_one_graph(name, method):
    case = BY_NAME[name]
    model = shaken(made(name, method, **TOKENS.get(method, {})))
    expected = case.run(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(case.run(compiled), expected)


@pytest.mark.parametrize("method", ["vpt-deep", "vpt-shallow", "ssf"])
@pytest.mark.parametrize("name", ["timm-vit", "hf-vit", "mamba"])
def test_checkpointed_activations_give_the_same_gradients(name, method):
    case = BY_NAME[name]
    plain, saving = (shaken(made(name, method, **TOKENS.get(method, {}))).train() for _ in range(2))
    if name == "timm-vit":
        saving.set_grad_checkpointing(True)
    else:
        saving.gradient_checkpointing_enable()
    for model in (plain, saving):
        case.loss(model).backward()
    for one, other in zip(plain.parameters(), saving.parameters(), strict=True):
        if one.requires_grad:
            torch.testing.assert_close(other.grad, one.grad)


@pytest.mark.parametrize(
    ("name", "method"), [("timm-vit", "vpt-deep"), ("gpt2", "prompt"), ("gpt2", "prefix"), ("mamba", "ssf")]
)
@torch.no_grad()
def test_a_pickle_stands_on_its_own(name, method):
    case = BY_NAME[name]
    model = shaken(made(name, method, **TOKENS.get(method, {})))
    expected = case.run(model)
    twin = pickle.loads(pickle.dumps(model))
    assert torch.equal(case.run(twin), expected)


def test_parameters_made_in_inference_mode_train():
    model = BY_NAME["timm-vit"].build()
    with torch.inference_mode():
        rs.baselines.apply(model, "vpt-deep", length=2)
    BY_NAME["timm-vit"].loss(model).backward()
