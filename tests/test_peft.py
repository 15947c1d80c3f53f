"""H-Res as a method of PEFT does what PEFT's own methods do, and what a native field does, on every backbone."""

import copy

import pytest
import torch

import residual_steer as rs
from peft_models import MODELS, run, shake
from residual_steer.injector import Injector

peft = pytest.importorskip("peft")
HResConfig, HResLayer = rs.peft.HResConfig, rs.peft.HResLayer

pytestmark = [
    pytest.mark.filterwarnings("ignore:Could not find a config file"),  # of a base without a name
]
every = pytest.mark.parametrize("case", MODELS, ids=lambda case: case.name)
generating = pytest.mark.parametrize("case", [c for c in MODELS if c.generates], ids=lambda case: case.name)


# where PEFT or transformers differ by what a model is for, and not by its blocks
kinds = pytest.mark.parametrize(
    "case", [c for c in MODELS if c.name in ("gpt2", "hf-vit", "t5", "bert")], ids=lambda c: c.name
)


def steered(case, name="default", seed=3, **options):
    return shake(peft.get_peft_model(case.build(), HResConfig(rank=4, **options), adapter_name=name), name, seed)


@every
def test_a_field_computes_what_a_native_one_does_and_off_is_the_base_bit_for_bit(case):
    base, native, model = case.build(), case.build(), case.build()
    off = run(case, base)
    whole = peft.get_peft_model(model, HResConfig(rank=4, scale=0.5, activation="silu"))
    assert torch.equal(run(case, whole), off), "a fresh field changes nothing"
    assert {k: v for k, v in model.state_dict().items() if ".hres_" not in k}.keys() == base.state_dict().keys()
    on = run(case, shake(whole))
    assert torch.equal(on, run(case, shake(rs.steer(native, rank=4, scale=0.5, activation="silu"))))
    assert not torch.equal(on, off)
    with whole.disable_adapter():
        assert torch.equal(run(case, whole), off)
    assert torch.equal(run(case, whole), on)
    assert {n.split(".")[-2:][0] for n, p in whole.named_parameters() if p.requires_grad} == {"default"}
    assert run(case, copy.deepcopy(whole)).equal(on)
    assert whole.unload() is model
    assert torch.equal(run(case, model), off)
    assert not any(isinstance(m, (Injector, HResLayer)) or m._forward_hooks for m in model.modules())


@pytest.mark.parametrize(
    ("case", "how"),
    [(case, "name") for case in MODELS] + [(MODELS[0], how) for how in ("low memory", "trainable", "beside")],
    ids=lambda value: getattr(value, "name", value),
)
def test_saving_and_loading_under_another_name(case, how, tmp_path):
    whole = steered(case, layers=[-1], field_bias=False)
    on = run(case, whole)
    whole.save_pretrained(tmp_path)
    if how == "beside":
        again = steered(case, "first", seed=8)
        before = run(case, again)
        again.load_adapter(tmp_path, "second")
        assert torch.equal(run(case, again), before), "a second adapter waits"
        again.set_adapter("second")
    else:
        options = {"low memory": {"low_cpu_mem_usage": True}, "trainable": {"is_trainable": True}}.get(how, {})
        again = peft.PeftModel.from_pretrained(case.build(), tmp_path, adapter_name="other", **options)
        assert all(p.requires_grad is (how == "trainable") for p in rs.parameters(again))
        assert rs.fields(again)[0].trains is (how == "trainable")
    assert torch.equal(run(case, again), on)
    assert torch.equal(run(case, peft.PeftModel.from_pretrained(case.build(), tmp_path)), on)


@every
def test_two_adapters_are_selected_combined_and_deleted(case):
    whole = steered(case, "a")
    whole.add_adapter("b", HResConfig(rank=2, layers=[1]))
    shake(whole, "b", seed=4)
    a = run(case, whole)
    whole.set_adapter("b")
    assert [f.name for f in rs.fields(whole) if f.trains] == whole.active_adapters == ["b"]
    b = run(case, whole)
    assert not torch.equal(a, b)
    whole.base_model.set_adapter(["a", "b"])
    both = run(case, whole)
    with rs.use(whole, {"a": 1.0, "b": 1.0}):
        assert torch.equal(run(case, whole), both)
    assert [f.name for f in rs.fields(whole) if f.trains] == ["a", "b"]
    with whole.disable_adapter():
        assert torch.equal(run(case, whole), run(case, case.build()))
    assert torch.equal(run(case, whole), both)
    whole.delete_adapter("a")
    assert torch.equal(run(case, whole), b)
    assert list(whole.peft_config) == ["b"]
    assert not any(".a." in key for key in whole.state_dict())
    model = whole.base_model.model
    whole.delete_adapter("b")  # PEFT's own wrapper is not to be called without an adapter
    assert torch.equal(run(case, model), run(case, case.build()))
    whole.add_adapter("c", HResConfig(rank=2))
    whole.set_adapter("c")
    assert not torch.equal(run(case, shake(whole, "c")), b)


@every
def test_rows_of_one_batch_have_their_own_adapter(case):
    whole = steered(case, "a")
    whole.add_adapter("b", HResConfig(rank=2))
    shake(whole, "b", seed=4)
    with torch.no_grad():
        mixed = case.run(whole.eval(), adapter_names=["b", "__base__"])
    with rs.use(whole, ["b", None]):
        assert torch.equal(run(case, whole), mixed)
    whole.set_adapter("b")
    torch.testing.assert_close(mixed[:1], run(case, whole)[:1])
    with whole.disable_adapter():
        torch.testing.assert_close(mixed[1:], run(case, whole)[1:])
    with pytest.raises(rs.SteerError, match="no field of this model: typo"):
        case.run(whole, adapter_names=["typo", "b"])
    with pytest.raises(rs.SteerError, match="for inference"):
        case.run(whole.train(), adapter_names=["a", "b"])


@generating
def test_generating_with_beams_and_an_adapter_for_each_row(case):
    whole = steered(case, "a", task_type="SEQ_2_SEQ_LM" if case.name == "t5" else "CAUSAL_LM")
    whole.add_adapter("b", HResConfig(rank=2))
    shake(whole.eval(), "b", seed=4)
    ids = {"input_ids": case.inputs(whole)["input_ids"], "max_new_tokens": 5, "do_sample": False}
    beams = {} if case.beams_fail else {"num_beams": 3, "use_cache": False}
    mixed = whole.generate(**ids, **beams, adapter_names=["b", "__base__"])
    whole.set_adapter("b")
    alone = whole.generate(**ids, **beams)
    with whole.disable_adapter():
        off = whole.generate(**ids, **beams)
    width = min(mixed.shape[1], alone.shape[1], off.shape[1])
    assert torch.equal(mixed[:1, :width], alone[:1, :width])
    assert torch.equal(mixed[1:, :width], off[1:, :width])


@kinds
def test_checkpointing_gives_the_same_gradients(case):
    case.needs("checkpoint")
    found = []
    for on in (False, True):
        model = case.build().train()
        if on:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        whole = shake(peft.get_peft_model(model, HResConfig(rank=4)))
        case.loss(whole).backward()
        found.append([p.grad for p in rs.parameters(whole)])
    for plain, again in zip(*found, strict=True):
        assert plain.abs().sum() > 0
        torch.testing.assert_close(plain, again)


@every
def test_beside_a_bf16_base_a_field_trains_in_fp32(case, tmp_path):
    model = case.build(dtype=torch.bfloat16)
    off = run(case, model)
    whole = peft.get_peft_model(model, HResConfig(rank=4))
    assert torch.equal(run(case, whole), off)
    on = run(case, shake(whole))
    assert {p.dtype for p in rs.parameters(whole)} == {torch.float32}
    case.loss(whole.train()).backward()
    assert all(p.grad is not None for p in rs.parameters(whole))
    whole.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(case.build(dtype=torch.bfloat16), tmp_path)
    assert torch.equal(run(case, again), on)


@every
def test_a_module_trains_along_in_peft_s_wrapper(case, tmp_path):
    base = case.build()
    off, name = run(case, base), case.head.rpartition(".")[2]
    whole = shake(peft.get_peft_model(base, HResConfig(rank=4, modules_to_save=[name])))
    optimizer = torch.optim.SGD([p for p in whole.parameters() if p.requires_grad], lr=1.0)
    case.loss(whole.train()).backward()
    optimizer.step()
    on = run(case, whole)
    with whole.disable_adapter():
        assert torch.equal(run(case, whole), off)
    whole.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(case.build(), tmp_path, adapter_name="other")
    again.add_adapter("plain", HResConfig(rank=2))
    assert torch.equal(run(case, again), on)
    if name in {"classifier", "lm_head"}:  # PEFT's wrapper of a norm takes one adapter at a time
        mixed = run(case, again, adapter_names=["__base__", "other"])
        torch.testing.assert_close(mixed[1:], on[1:])
        torch.testing.assert_close(mixed[:1], off[:1])
    with pytest.warns(UserWarning, match="'plain' acts in its place"):
        again.delete_adapter("other")
    assert torch.equal(run(case, again), off)


@kinds
def test_auto_peft_model_finds_the_base(case, tmp_path):
    case.build().save_pretrained(tmp_path / "base")
    base = type(case.build()).from_pretrained(tmp_path / "base")
    task = {"bert": "SEQ_CLS", "hf-vit": None, "t5": "SEQ_2_SEQ_LM"}.get(case.name, "CAUSAL_LM")
    kind = {
        "SEQ_CLS": peft.AutoPeftModelForSequenceClassification,
        "SEQ_2_SEQ_LM": peft.AutoPeftModelForSeq2SeqLM,
        "CAUSAL_LM": peft.AutoPeftModelForCausalLM,
        None: peft.AutoPeftModel,
    }[task]
    whole = shake(peft.get_peft_model(base, HResConfig(rank=4, task_type=task)))
    whole.save_pretrained(tmp_path / "adapter")
    options = {"num_labels": 3} if task == "SEQ_CLS" else {}
    again = kind.from_pretrained(tmp_path / "adapter", **options)
    assert torch.equal(run(case, again), run(case, whole))
