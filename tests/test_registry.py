"""Finding a backbone by class name, and registering more of them."""

from pathlib import Path

import pytest
import torch
from torch import nn

import residual_steer as rs
from apart import printed
from cases import TABLE

PLUGINS = Path(__file__).parent / "plugins"


class Stack(nn.Module):
    def __init__(self, block=nn.Linear, depth=2):
        super().__init__()
        self.blocks = nn.ModuleList(block(4, 4) for _ in range(depth))

    def forward(self, z):
        for block in self.blocks:
            z = block(z)
        return z


class Deeper(Stack):
    pass


class Residual(nn.Module):
    def __init__(self, width, _):
        super().__init__()
        self.inner = nn.Linear(width, width)

    def forward(self, z):
        return z + self.inner(z)


class Proper(Stack):
    """A residual stream, which is found without a family."""

    def __init__(self):
        super().__init__(Residual, 3)


def register(name="stack", matches=("test_registry.Stack",), blocks=lambda model: model.blocks):
    @rs.register_backbone(name, matches=matches)
    def describe(model):
        return rs.Backbone(blocks=blocks(model), width=4)

    return describe


def proper(blocks=lambda model: model.blocks):
    return register("proper", ["test_registry.Proper"], blocks)


def test_a_registered_family_is_listed_found_and_steered():
    describe = register()
    assert "stack" in rs.list_backbones()
    backbone = rs.find_backbone(Stack())
    assert (backbone.name, backbone.path, backbone.width) == ("stack", "", 4)
    assert describe(Stack()).name == ""
    assert rs.summary(rs.steer(Stack(), "stack", rank=2)).backbone == "stack"


def test_matches_reach_subclasses_and_through_wrappers():
    register()
    assert rs.find_backbone(Deeper()).path == ""
    assert rs.find_backbone(nn.Sequential(nn.ReLU(), nn.Sequential(Deeper()))).path == "1.0"


def test_the_nearest_class_of_the_mro_decides():
    register()
    register("deeper", ["test_registry.Deeper"])
    assert rs.find_backbone(Deeper()).name == "deeper"
    assert rs.find_backbone(Stack()).name == "stack"
    assert rs.find_backbone(Deeper(), "stack").name == "stack"


def test_a_class_is_named_with_its_module_or_its_package():
    register("long", ["torch.nn.modules.container.Sequential"])
    register("short", ["torch.ModuleDict"])
    for name, model in (("long", nn.Sequential()), ("short", nn.ModuleDict())):
        model.blocks = nn.ModuleList([nn.Linear(4, 4)])
        assert rs.find_backbone(model).name == name


@pytest.mark.parametrize(
    ("name", "matches", "message"),
    [
        ("stack", ["test_registry.Deeper"], "registered once; 'stack' is taken"),
        ("gpt2", ["test_registry.Deeper"], "'gpt2' is taken"),
        ("auto", ["test_registry.Deeper"], "'auto' is taken"),
        ("custom", ["test_registry.Deeper"], "'custom' is taken"),
        ("mine", ["transformers.GPT2Model"], "transformers.GPT2Model is described by 'gpt2' already"),
        ("mine", "transformers.X", "`matches` is a list .*; received the string 'transformers.X'"),
        ("mine", [], "`matches` needs qualified class names"),
        ("mine", ["GPT2Model"], r"such as 'transformers.GPT2Model'; received \('GPT2Model',\)"),
        ("mine", [3], "received"),
    ],
)
def test_names_and_classes_are_registered_once_and_whole(name, matches, message):
    register()
    before = rs.list_backbones()
    with pytest.raises(rs.SteerError, match=message):
        register(name, matches)
    assert rs.list_backbones() == before


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(rs.SteerError, match=r"unknown backbone 'rwkv'; registered are: .*gpt2, .*mamba.*vit"):
        rs.find_backbone(Stack(), "rwkv")


def test_nothing_found_says_what_was_looked_for_and_how_to_register():
    with pytest.raises(rs.SteerError) as caught:
        rs.find_backbone(Stack())
    message = str(caught.value)
    for part in ("test_registry.Stack", "those of bert, ", "hybrid, llama, ", "vit, ", "register_backbone('mine'"):
        assert part in message
    assert "transformers.GPT2Model" not in message, "hundreds of classes are no help"
    assert "residual_steer.list_backbones('" in message
    assert len(message) < 1500


def test_the_classes_of_a_family_are_listed():
    register()
    assert rs.list_backbones("stack") == ("test_registry.Stack",)
    assert {"transformers.LlamaModel", "transformers.OPTModel"} <= set(rs.list_backbones("llama"))
    for name in ("nobody", 3):
        with pytest.raises(rs.SteerError, match=rf"unknown backbone {name!r}; registered are: bert, "):
            rs.list_backbones(name)


def test_another_family_than_the_one_asked_for_is_not_taken():
    with pytest.raises(rs.SteerError, match=r"looked along .* for those of gpt2 \(residual.*\('gpt2'\) .*\. Describe"):
        rs.find_backbone(TABLE["timm-vit"].build(), "gpt2")


def test_several_backbones_are_named():
    pair = nn.ModuleDict({"image": TABLE["timm-vit"].build(), "text": TABLE["gpt2"].build()})
    with pytest.raises(rs.SteerError, match=r"several .*: model.image \(vit\), model.text.transformer \(gpt2\)\..*"):
        rs.find_backbone(pair)
    assert rs.find_backbone(pair, "gpt2").path == "text.transformer"
    twins = nn.ModuleList([TABLE["gpt2"].build(), TABLE["gpt2"].build()])
    with pytest.raises(rs.SteerError, match=r"steer\(model.0.transformer, ...\)"):
        rs.find_backbone(twins, "gpt2")


def test_a_shared_backbone_counts_once():
    model = TABLE["gpt2"].build()
    assert rs.find_backbone(nn.ModuleDict({"one": model, "other": nn.Sequential(model)})).path == "one.transformer"


@pytest.mark.parametrize("call", [rs.find_backbone, rs.steer])
def test_a_model_is_a_module(call):
    with pytest.raises(rs.SteerError, match=r"a model is a torch.nn.Module; received str"):
        call("gpt2")


def run(code, *plugins):
    return printed(code, paths=[PLUGINS / name for name in plugins])


def test_installed_packages_register_by_entry_points_and_one_that_fails_is_skipped_with_a_warning():
    code = "import residual_steer as rs, sys; print(rs.list_backbones()); print('toy_plugin' in sys.modules)"
    found, errors = run(code, "good")
    assert "'toy'" in found
    assert found.endswith("True\n")
    assert "skipped" not in errors
    found, errors = run(code, "broken", "good", "greedy")
    assert "'toy'" in found
    assert "'gpt2'" in found, "whose name the greedy one may not take"
    assert "'half'" not in found
    assert "the backbone plugin 'half' of broken-plugin was skipped: ImportError: no such kernel" in errors
    assert "plugin 'gpt2' of greedy-plugin was skipped: SteerError" in errors
    assert errors.count("was skipped") == 2


def test_the_package_of_families_is_a_package_and_nothing_else():
    found, _ = run(
        "import residual_steer.backbones as b, residual_steer as rs; print(type(b), rs.backbones is b, callable(b))"
    )
    assert found.strip() == "<class 'module'> True False"
    assert rs.backbones.vision.vit.__name__ == "vit"


def test_registered_families_come_before_the_probe():
    assert rs.find_backbone(Proper()).name == "auto"
    proper(lambda model: model.blocks[1:])
    assert rs.find_backbone(Proper()).name == "proper"
    assert len(rs.find_backbone(Proper(), "auto").blocks) == 3
    assert rs.summary(rs.steer(Proper(), "auto", rank=2)).blocks == 3


def test_a_model_is_steered_by_a_description_made_by_hand(tmp_path):
    def make():
        torch.manual_seed(0)
        return Proper()

    model, z = make(), torch.randn(2, 3, 4)
    frozen = make().requires_grad_(False)(z)
    by_hand = rs.Backbone(blocks=[model.blocks[0], model.blocks[2]], width=4)
    rs.steer(model, by_hand, rank=2)
    assert torch.equal(model(z), frozen)
    assert rs.summary(model).backbone == "custom"
    rs.steer(model, by_hand, name="second", rank=1)
    rs.steer(model, "custom", name="third", rank=1)
    with pytest.raises(rs.SteerError, match=r"steered as 'custom'; received a Backbone of 3 blocks"):
        rs.steer(model, rs.Backbone(blocks=model.blocks, width=4), name="fourth")
    with torch.no_grad():
        for parameter in rs.parameters(model):
            parameter.normal_()
    rs.save(model, tmp_path / "field")
    fresh = make()
    with pytest.raises(rs.SteerError, match=r"was trained on custom.*2 blocks.*this model has auto"):
        rs.load(fresh, tmp_path / "field")
    rs.load(fresh, tmp_path / "field", arch=rs.Backbone(blocks=fresh.blocks[::2], width=4))
    assert torch.equal(fresh(z), model(z))


def test_a_description_is_of_this_very_model():
    other = rs.Backbone(blocks=Proper().blocks, width=4)
    with pytest.raises(rs.SteerError, match=r"block 0, a Residual, is none of this Proper"):
        rs.steer(Proper(), other)
    model = Proper()
    with pytest.raises(rs.SteerError, match=r"`path` leads to a module of the model; received 'body'"):
        rs.steer(model, rs.Backbone(blocks=model.blocks, width=4, path="body"))
    assert not any(module._forward_hooks for module in model.modules())


def test_a_steered_model_has_the_backbone_that_it_is_steered_by():
    model = Proper()
    rs.steer(model, rs.Backbone(blocks=model.blocks[:1], width=4), rank=1)
    wrapped = nn.Sequential(nn.Identity(), model)
    assert len(rs.find_backbone(model).blocks) == len(rs.find_backbone(wrapped, "custom").blocks) == 1
    assert rs.find_backbone(wrapped).path == "1"
    assert len(rs.find_backbone(model, "auto").blocks) == 3
    rs.unsteer(model)
    assert len(rs.find_backbone(model).blocks) == 3


def test_a_field_of_auto_loads_where_a_family_was_registered_since(tmp_path):
    torch.manual_seed(0)
    rs.save(rs.steer(Proper(), rank=2), tmp_path / "field")
    proper()
    fresh = Proper()
    rs.load(fresh, tmp_path / "field")
    assert rs.summary(fresh).backbone == "auto"
    rs.load(fresh, tmp_path / "field", "again")
    assert len(rs.fields(fresh)) == 2


def test_the_frozen_prefix_of_a_model_that_auto_found_is_kept():
    model = rs.steer(Proper(), rank=2, layers=[2])
    data = [(torch.randn(2, 3, 4), torch.randn(2, 3, 4)) for _ in range(2)]

    def loss(model, batch):
        return (model(batch[0]) - batch[1]).square().mean()

    history = rs.fit(model, data, steps=4, loss=loss, cache_prefix=True)
    assert history.cache["blocks"] == 2
    assert history.cache["hits"] == 2


def odd(name):
    """Build a model of a class that a family describes, by options that leave its blocks out."""
    import timm
    import transformers

    ids = {"vocab_size": 50, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "hidden_size": 16}
    ids |= {"num_hidden_layers": 0, "num_attention_heads": 2}
    shape = {"img_size": 16, "patch_size": 4, "embed_dim": 8, "num_classes": 3}
    if name in {"GPT2LMHeadModel", "MambaForCausalLM", "JambaForCausalLM", "LlamaModel", "RwkvModel"}:
        model = getattr(transformers, name)
        return model(model.config_class(**ids))
    if name == "VisionTransformer":
        return timm.models.VisionTransformer(**shape, depth=0, num_heads=2)
    if name == "SwinTransformer":
        return timm.models.SwinTransformer(**shape, depths=(0, 0), num_heads=(2, 2), window_size=2)
    if name == "ConvNeXt":
        return timm.models.ConvNeXt(depths=(0, 0, 0, 0), dims=(4, 4, 4, 4))
    if name == "VGG":
        return timm.models.vgg.VGG([4, "M", 4], num_classes=3)
    return timm.create_model(name, num_classes=3)


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("VisionTransformer", "vit"),
        ("SwinTransformer", "swin"),
        ("ConvNeXt", "resnet"),
        ("mobilenetv1_100", "resnet"),
        ("GPT2LMHeadModel", "gpt2"),
        ("LlamaModel", "llama"),
        ("MambaForCausalLM", "mamba"),
        ("JambaForCausalLM", "hybrid"),
        ("RwkvModel", "recurrent"),
        ("VGG", None),
    ],
)
def test_a_model_without_residual_blocks_is_told_what_was_looked_at(name, family):
    model = odd(name)
    with pytest.raises(rs.SteerError, match=r"no residual stream was found in \w+: of \d+ modules") as caught:
        rs.steer(model)
    assert "register_backbone('mine'" in str(caught.value)
    if family is not None:
        assert f"'{family}' describes " in str(caught.value)
        with pytest.raises(rs.SteerError, match=rf"'{family}' describes .* is laid out otherwise"):
            rs.steer(model, family)


@pytest.mark.parametrize(
    "fails", [lambda model: model.layers, lambda model: model.blocks[7], lambda model: next(iter(()))]
)
def test_what_a_family_cannot_describe_goes_to_discovery(fails):
    proper(fails)
    assert (rs.find_backbone(Proper()).name, len(rs.find_backbone(Proper()).blocks)) == ("auto", 3)
    with pytest.raises(rs.SteerError, match=r"'proper' describes test_registry.Proper, .* otherwise \(\w+: ?.*\)"):
        rs.find_backbone(Proper(), "proper")


def test_a_family_that_refuses_a_model_has_the_last_word():
    def refuse(model):
        raise rs.SteerError("not this one")

    proper(refuse)
    with pytest.raises(rs.SteerError, match=r"^not this one$"):
        rs.find_backbone(Proper())
