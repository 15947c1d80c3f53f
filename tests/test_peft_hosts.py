"""Fields among what else PEFT and transformers do with adapters: other methods, their own calls, sums, errors."""

import copy
import enum
import json
import pickle
import sys

import pytest
import torch

import residual_steer as rs
from apart import printed
from peft_models import BY_NAME, MODELS, run, shake

peft = pytest.importorskip("peft")
transformers_peft = pytest.importorskip("transformers.integrations.peft")
HResConfig = rs.peft.HResConfig

pytestmark = [
    pytest.mark.filterwarnings("ignore:Could not find a config file"),  # of a base without a name
    pytest.mark.filterwarnings("ignore:Already found a `peft_config`"),  # PEFT, of every second adapter
    pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time"),
]
GPT2 = BY_NAME["gpt2"]


@pytest.fixture(autouse=True)
def _releases(monkeypatch):
    """Some releases of transformers ask for a PEFT that is not out yet, for what this one can do."""
    monkeypatch.setattr(transformers_peft, "MIN_PEFT_VERSION", "0.18.0")


def saved(case, folder, seed=3, **options):
    """Save an adapter; return its folder and what the model computes with it."""
    whole = shake(peft.get_peft_model(case.build(), HResConfig(rank=4, **options)), seed=seed)
    whole.save_pretrained(folder)
    return folder, run(case, whole)


def lora(**options):
    return peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False, **options)


def step(case, model):
    """Train every parameter that says it trains; return to what kinds of adapters they belong."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    case.loss(model.train()).backward()
    with torch.no_grad():
        for parameter in parameters.values():
            parameter -= 3 * parameter.grad
            parameter.grad = None
    return {name.split(".")[-3] for name in parameters}


@pytest.mark.parametrize("case", MODELS, ids=lambda case: case.name)
def test_transformers_loads_selects_disables_and_deletes_by_itself(case, tmp_path):
    off = run(case, case.build())
    (first, one), (second, two) = saved(case, tmp_path / "1"), saved(case, tmp_path / "2", seed=4, layers=[1])
    model = case.build()
    found = model.load_adapter(first, adapter_name="first")
    assert not (found.missing_keys)
    assert not (found.unexpected_keys)
    assert not (found.mismatched_keys)
    assert torch.equal(run(case, model), one)
    assert not any(p.requires_grad for p in model.parameters())
    model.load_adapter(second, adapter_name="second")
    assert torch.equal(run(case, model), two)
    model.set_adapter("first")
    assert torch.equal(run(case, model), one)
    assert all(p.requires_grad for p in rs.parameters(model, "first"))
    model.disable_adapters()
    assert torch.equal(run(case, model), off)
    model.set_adapter("second")
    assert torch.equal(run(case, model), off), "PEFT's layers stay disabled, too"
    model.enable_adapters()
    assert torch.equal(run(case, model), two)
    model.set_adapter(["first", "second"])
    with rs.use(model, {"first": 1.0, "second": 1.0}):
        both = run(case, model)
    assert torch.equal(run(case, model), both)
    model.set_adapter("first")
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(run(case, peft.PeftModel.from_pretrained(case.build(), tmp_path / "again")), one)
    with pytest.warns(UserWarning, match="'second' acts in its place"):
        model.delete_adapter("first")
    assert torch.equal(run(case, model), two)
    model.delete_adapter("second")
    assert torch.equal(run(case, model), off)
    assert model.state_dict().keys() == case.build().state_dict().keys()
    model.add_adapter(HResConfig(rank=3), "fresh")
    assert torch.equal(run(case, model), off)
    assert {name.split(".")[-2] for name, p in model.named_parameters() if p.requires_grad} == {"fresh"}


@pytest.mark.parametrize("first", ["low", "field"])
def test_lora_and_a_field_on_one_model(first, tmp_path):
    off, configs = run(GPT2, GPT2.build()), {"low": lora(), "field": HResConfig(rank=4)}
    order = [first, "field" if first == "low" else "low"]
    inner = peft.get_peft_model(GPT2.build(), configs[order[0]], order[0])
    both = {"lora_A", "lora_B", "hres_down", "hres_up"}
    outer = peft.get_peft_model(inner, configs[order[1]], order[1])
    for _ in range(2):
        assert step(GPT2, outer) == both
        with outer.disable_adapter():
            assert torch.equal(run(GPT2, outer), off)
    on = run(GPT2, outer)
    outer.save_pretrained(tmp_path)
    again = GPT2.build()
    for name in order:
        again = peft.PeftModel.from_pretrained(again, tmp_path / name, name)
    assert torch.equal(run(GPT2, again), on)
    with pytest.raises(rs.SteerError, match="another name"):
        peft.get_peft_model(inner, HResConfig() if first == "low" else lora(), first)
    assert torch.equal(run(GPT2, outer), on)
    assert step(GPT2, outer) == both


@pytest.mark.parametrize("first", ["low", "field"])
def test_lora_and_a_field_side_by_side_in_transformers(first, tmp_path):
    off, configs = run(GPT2, GPT2.build()), {"low": lora(), "field": HResConfig(rank=4)}
    model = GPT2.build()
    for name in (first, *({"low", "field"} - {first})):
        model.add_adapter(configs[name], name)
    model.set_adapter(["low", "field"])
    assert step(GPT2, model) == {"lora_A", "lora_B", "hres_down", "hres_up"}
    on = run(GPT2, model)
    model.disable_adapters()
    assert torch.equal(run(GPT2, model), off)
    model.enable_adapters()
    assert torch.equal(run(GPT2, model), on)
    again = GPT2.build()
    for name in ("low", "field"):
        model.set_adapter(name)
        model.save_pretrained(tmp_path / name)
        again.load_adapter(tmp_path / name, adapter_name=name)
    again.set_adapter(["low", "field"])
    assert torch.equal(run(GPT2, again), on)


def test_a_native_field_and_an_adapter_on_one_model(tmp_path):
    model = shake(rs.steer(GPT2.build(), rank=2, name="native"))
    native = run(GPT2, model)
    whole = shake(peft.get_peft_model(model, HResConfig(rank=4)), seed=5)
    on = run(GPT2, whole)
    with rs.use(whole, "native"):
        assert torch.equal(run(GPT2, whole), native)
    assert torch.equal(run(GPT2, whole), on)
    whole.save_pretrained(tmp_path / "adapter")
    rs.save(whole, tmp_path / "native", "native")
    assert torch.equal(run(GPT2, peft.PeftModel.from_pretrained(GPT2.build(), tmp_path / "adapter")), on)
    assert torch.equal(run(GPT2, rs.load(GPT2.build(), tmp_path / "native")), native)
    with rs.use(whole, {"native": 0.5, "default": 1.0}):
        mixed = run(GPT2, whole)
        with whole.disable_adapter():
            assert torch.equal(run(GPT2, whole), run(GPT2, GPT2.build()))
        assert torch.equal(run(GPT2, whole), mixed), "what acted before acts again, with its weights"
    with pytest.raises(rs.SteerError, match="in use"):
        peft.get_peft_model(model, HResConfig(), "native")


@pytest.mark.parametrize("site", ["block", "mixer", "mlp", "input"])
def test_a_weighted_sum_is_stored_as_one_field(site, tmp_path):
    whole = shake(peft.get_peft_model(GPT2.build(), HResConfig(rank=4, scale=0.5, site=site), "one"), "one")
    whole.add_adapter("two", HResConfig(rank=3, layers=[1], scale=2.0, site=site, field_bias=False))
    shake(whole, "two", seed=4)
    whole.add_weighted_adapter(["one", "two"], [0.7, -0.3], "sum")
    assert whole.active_adapters == ["one"]
    whole.set_adapter("sum", inference_mode=True)
    stored = run(GPT2, whole)
    assert not any(p.requires_grad for p in whole.parameters())
    with rs.use(whole, {"one": 0.7, "two": -0.3}):
        torch.testing.assert_close(run(GPT2, whole), stored)
    whole.save_pretrained(tmp_path, selected_adapters=["sum"])
    assert torch.equal(run(GPT2, peft.PeftModel.from_pretrained(GPT2.build(), tmp_path / "sum")), stored)


def test_sums_that_are_no_one_field_are_refused():
    whole = peft.get_peft_model(GPT2.build(), HResConfig(rank=10), "one")
    for name, options in {
        "wide": {"rank": 10},
        "relu": {"activation": "relu"},
        "mlp": {"site": "mlp"},
        "drop": {"dropout": 0.5},
        "head": {"modules_to_save": ["ln_f"]},
    }.items():
        whole.add_adapter(name, HResConfig(**{"rank": 2, **options}))
    before = {key: tensor.clone() for key, tensor in whole.state_dict().items()}
    for names, weights, options, why in (
        (["one", "wide"], [1, 1], {}, "rank.*20"),
        (["one", "relu"], [1, 1], {}, "differ in activation.*gelu.*relu"),
        (["one", "mlp"], [1, 1], {}, "differ in site"),
        (["one", "drop"], [1, 1], {}, "differ in dropout"),
        (["one", "head"], [1, 1], {}, "modules_to_save"),
        (["one", "typo"], [1, 1], {}, "no field 'typo'"),
        (["one", "one"], [1, 1], {}, "one weight"),
        (["one", "wide"], [1], {}, "one weight"),
        (["one"], [float("nan")], {}, "finite"),
        (["one"], [1], {"adapter_name": "wide"}, "'wide' already"),
        (["one"], [1], {"combination_type": "svd"}, "svd"),
    ):
        with pytest.raises(rs.SteerError, match=why):
            whole.add_weighted_adapter(names, weights, **{"adapter_name": "sum", **options})
    assert whole.state_dict().keys() == before.keys()
    assert "sum" not in whole.peft_config


def test_merging_is_refused_and_unloading_works():
    model = GPT2.build()
    whole = shake(peft.get_peft_model(model, HResConfig(rank=4)))
    on = run(GPT2, whole)
    for merge in (whole.merge_adapter, whole.merge_and_unload):
        with pytest.raises(rs.SteerError, match="no linear map"):
            merge()
    assert torch.equal(run(GPT2, whole), on)
    low = peft.get_peft_model(whole, lora(), "low")
    on = run(GPT2, low)
    low.merge_adapter(["low"])
    torch.testing.assert_close(run(GPT2, low), on)
    low.unmerge_adapter()
    with rs.use(whole, None):
        alone = run(GPT2, low)
    assert whole.unload() is model, "and LoRA stays in it"
    assert torch.equal(run(GPT2, model), alone)
    names = [name for name, _ in model.named_modules()]
    assert not [name for name in names if "steering" in name]
    assert [name for name in names if name.endswith("lora_A")]


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"rank": 0}, "rank"),
        ({"layers": [7]}, "layer is an integer"),
        ({"site": "nowhere"}, "site"),
        ({"arch": "mambo"}, "mambo"),
        ({"modules_to_save": ["typo"]}, "typo.*no module's name ends so"),
        ({"modules_to_save": ["h.1"]}, "in which the field runs"),
        ({"site": "mixer", "modules_to_save": ["attn"]}, "in which the field runs"),
    ],
)
def test_what_is_refused_leaves_the_model_as_it_was(options, why):
    model = GPT2.build()
    before = [(name, type(module), len(module._forward_hooks)) for name, module in model.named_modules()]
    with pytest.raises(rs.SteerError, match=why):
        peft.get_peft_model(model, HResConfig(**{"rank": 4, **options}))
    assert [(name, type(module), len(module._forward_hooks)) for name, module in model.named_modules()] == before
    whole = peft.get_peft_model(model, HResConfig(rank=4))
    with pytest.raises(rs.SteerError, match=why):
        whole.add_adapter("more", HResConfig(**{"rank": 4, **options}))
    assert list(whole.peft_config) == ["default"]


def test_configs_hold_what_a_file_can_hold(tmp_path):
    with pytest.raises(rs.SteerError, match="arch"):
        HResConfig(arch=rs.find_backbone(GPT2.build()))
    with pytest.raises(rs.SteerError, match="list of names"):
        HResConfig(modules_to_save="ln_f")
    config = HResConfig(rank={0: 4, -1: 2}, site="mlp")
    whole = shake(peft.get_peft_model(GPT2.build(), config))
    whole.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(GPT2.build(), tmp_path)
    assert torch.equal(run(GPT2, again), run(GPT2, whole))
    assert rs.fields(again)[0].ranks == {0: 4, 1: 2}
    assert peft.get_peft_model(BY_NAME["llama"].build(), config), "a config can be used again"


def test_an_adapter_is_for_the_backbone_that_it_was_trained_on(tmp_path):
    folder, _ = saved(GPT2, tmp_path, layers=[0])
    with pytest.raises(rs.SteerError, match=r"trained on .*'gpt2'.*this model is .*'llama'"):
        peft.PeftModel.from_pretrained(BY_NAME["llama"].build(), folder)
    path = folder / "adapter_config.json"
    described = json.loads(path.read_text())
    path.write_text(json.dumps({**described, "layers": None}))
    with pytest.raises(rs.SteerError, match=r"missing are transformer\.h\.1"):
        peft.PeftModel.from_pretrained(GPT2.build(), folder)
    path.write_text(json.dumps({**described, "layers": [1]}))
    with pytest.raises(rs.SteerError, match=r"missing are transformer\.h\.1"):
        peft.PeftModel.from_pretrained(GPT2.build(), folder)


def test_a_process_that_did_not_import_the_module_is_helped(tmp_path):
    whole = peft.get_peft_model(GPT2.build(), HResConfig(rank=2))
    whole.add_adapter("more", HResConfig(rank=2))
    whole.save_pretrained(tmp_path)
    for folder in (tmp_path, tmp_path / "more"):
        assert "import residual_steer.peft" in json.loads((folder / "adapter_config.json").read_text())["requires"]
        assert (folder / "README.md").read_text().count("```python\nimport residual_steer.peft") == 1
        assert "residual-steer" in (folder / "README.md").read_text().split("---")[1]
    whole.save_pretrained(tmp_path)  # once is enough
    assert (tmp_path / "README.md").read_text().count("```python\nimport residual_steer.peft") == 1
    code = (
        "import peft\nload = lambda: peft.PeftConfig.from_pretrained('.')\n"
        "try: load()\nexcept KeyError as error: print(error)\n"
        "import residual_steer.peft\nprint(type(load()).__name__)"
    )
    assert printed(code, tmp_path)[0].split() == ["'HRES'", "HResConfig"]


def test_copies_and_pickles_are_models_of_their_own(tmp_path):
    whole = shake(peft.get_peft_model(GPT2.build(), HResConfig(rank=4, dropout=0.5)))
    on, off = run(GPT2, whole), run(GPT2, GPT2.build())
    for twin in (copy.deepcopy(whole), pickle.loads(pickle.dumps(whole))):
        assert torch.equal(run(GPT2, twin), on)
        twin.base_model.disable_adapter_layers()
        assert torch.equal(run(GPT2, twin), off)
        assert torch.equal(run(GPT2, whole), on)
    torch.manual_seed(0)
    with torch.no_grad():
        assert not torch.equal(GPT2.run(whole.train()), on), "dropout follows the mode"


@pytest.mark.parametrize("how", ["native", "adapter"])
@torch.no_grad()
def test_whoever_switches_dropout_off_in_a_model_switches_off_that_of_its_fields(how):
    from residual_steer._undisturbed import undisturbed

    model = GPT2.build()
    whole = peft.get_peft_model(model, HResConfig(rank=4, dropout=0.5), "a") if how == "adapter" else model
    if how == "native":
        rs.steer(model, rank=4, dropout=0.5, name="a")
    rs.steer(model, rank=4, dropout=0.3, activation="silu", name="b")
    shake(shake(whole, "a"), "b")
    for mix in ("a", {"a": 1.0, "b": 0.5}, ["a", "b"]):
        rs.use(whole, mix)
        expected, compared = run(GPT2, whole), rs.reference(whole)
        assert not torch.equal(GPT2.run(whole.train()), expected)
        assert torch.equal(compared(**GPT2.inputs(whole)).logits, expected)
        with undisturbed(whole):
            assert torch.equal(GPT2.run(whole), expected)
        twin = copy.deepcopy(whole)
        for module in twin.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        assert torch.equal(GPT2.run(twin), expected)
        for name in [field.name for field in rs.fields(whole) if field.name.endswith("-reference")]:
            rs.unsteer(whole, name)


def test_compiled_and_exported_models_agree():
    whole = shake(peft.get_peft_model(GPT2.build(), HResConfig(rank=4)))
    on = run(GPT2, whole)
    torch._dynamo.reset()
    compiled = torch.compile(whole, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(GPT2.run(compiled), on)


@pytest.mark.parametrize("kind", ["word", "word again"])
def test_an_enum_of_strings_takes_a_member_more(kind):
    from residual_steer.peft._registry import extend

    class Kind(str, enum.Enum):
        OLD = "OLD"

    new = extend(Kind, "NEW")
    if kind == "word again":
        assert extend(Kind, "NEW") is new
    assert list(Kind) == [Kind.OLD, new]
    assert len(Kind) == 2
    assert Kind.NEW is Kind["NEW"] is Kind("NEW") is new
    assert new == new.value == new.name == "NEW"
    assert new in Kind
    assert "NEW" in list(Kind)
    assert isinstance(new, Kind)
    assert {new: 1}["NEW"] == 1
    assert json.dumps(new) == '"NEW"'
    assert copy.deepcopy(new) is new
    assert repr(new) == repr(Kind.OLD).replace("OLD", "NEW")
    assert "NEW" in dir(Kind)
    if sys.version_info >= (3, 12):
        assert "NEW" in Kind
    with pytest.raises(ValueError, match="NONE"):
        Kind("NONE")


def test_peft_lists_the_method_once_however_often_it_is_registered():
    import importlib

    before = list(peft.PeftType)
    importlib.reload(rs.peft)
    assert list(peft.PeftType) == before
    assert before.count("HRES") == 1
    assert pickle.loads(pickle.dumps(peft.PeftType.HRES)) is peft.PeftType("HRES")
    assert peft.PEFT_TYPE_TO_CONFIG_MAPPING["HRES"] is HResConfig
    assert isinstance(peft.get_peft_config({"peft_type": "HRES", "rank": 3}), HResConfig)
