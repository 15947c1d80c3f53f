"""Bases whose weights are packed: steered, trained and loaded again, natively and as an adapter of PEFT.

In 4 bits by bitsandbytes with Trainer: test_peft_trainer.py; stored in float8 by hand: test_silent_places.py.
"""

import pytest
import torch
import transformers

import residual_steer as rs

peft = pytest.importorskip("peft")

pytestmark = [
    pytest.mark.filterwarnings("ignore:Could not find a config file"),  # of a base without a name
    pytest.mark.filterwarnings("ignore:MatMul8bitLt"),
]
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}


def torchao(name):
    quantization = pytest.importorskip("torchao.quantization")
    return transformers.TorchAoConfig(getattr(quantization, name)())


KINDS = {
    "bitsandbytes nf4": lambda: transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    ),
    "bitsandbytes int8": lambda: transformers.BitsAndBytesConfig(load_in_8bit=True),
    "torchao int8": lambda: torchao("Int8WeightOnlyConfig"),
    "torchao int8 dynamic": lambda: torchao("Int8DynamicActivationInt8WeightConfig"),
    "torchao float8": lambda: torchao("Float8WeightOnlyConfig"),
    "hqq": lambda: None,
    "quanto": lambda: transformers.QuantoConfig(weights="int8"),
}


def with_hqq(model):
    """Quantise by HQQ itself, which transformers lets do it on a GPU alone."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    for layer in model.model.layers:
        for name in ("q_proj", "o_proj"):
            plain, four = getattr(layer.self_attn, name), BaseQuantizeConfig(nbits=4, group_size=64)
            made = HQQLinear(plain, four, compute_dtype=torch.float32, device="cpu", initialize=True)
            setattr(layer.self_attn, name, made)
    return model


PACKAGES = {"bitsandbytes": "bitsandbytes", "torchao": "torchao", "hqq": "hqq", "quanto": "optimum.quanto"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=64, **SIZES)).save_pretrained(place)
    return place


@pytest.fixture(params=KINDS)
def base(request, folder):
    package = PACKAGES[request.param.partition(" ")[0]]
    pytest.importorskip(package, reason=f"{package} is not installed")

    def load():
        if request.param == "hqq":
            return with_hqq(transformers.LlamaForCausalLM.from_pretrained(folder))
        options = {"quantization_config": KINDS[request.param](), "device_map": {"": "cpu"}, "dtype": torch.float32}
        return transformers.AutoModelForCausalLM.from_pretrained(folder, **options)

    return load


IDS = torch.arange(24).reshape(3, 8) % 64


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def trained(model):
    return rs.fit(model, [{"input_ids": IDS, "labels": IDS}], steps=3, lr=0.02, log_every=1, progress=False).train


@pytest.mark.filterwarnings("ignore::UserWarning")  # of each tool's own
def test_a_packed_base_is_steered_natively_and_by_peft(base, tmp_path):
    off = logits(base())
    native = rs.steer(base(), rank=4)
    assert all(p.dtype == torch.float32 for p in rs.parameters(native))
    losses = [record["loss"] for record in trained(native)]
    assert losses[-1] < losses[0]
    on = logits(native)
    rs.save(native, tmp_path / "native")
    assert torch.equal(logits(rs.load(base(), tmp_path / "native")), on)
    with rs.use(native, None):
        assert torch.equal(logits(native), off)
    assert not torch.equal(on, off)

    whole = peft.prepare_model_for_kbit_training(base(), use_gradient_checkpointing=False)
    whole = peft.get_peft_model(whole, rs.peft.HResConfig(rank=4, task_type="CAUSAL_LM"))
    trained(whole)
    on = logits(whole)
    with whole.disable_adapter():  # before PEFT reads the base's state, after which bitsandbytes packs it anew on a CPU
        assert torch.equal(logits(whole), off)
    whole.save_pretrained(tmp_path / "peft")
    assert torch.equal(logits(peft.PeftModel.from_pretrained(base(), tmp_path / "peft")), on)


class Packed(torch.nn.Module):
    """A linear map as GPTQ and AWQ lay it out: eight numbers of 4 bits in an int32, with scales; no float weight."""

    def __init__(self, width):
        super().__init__()
        self.register_buffer("qweight", torch.randint(-(2**31), 2**31 - 1, (width // 8, width), dtype=torch.int32))
        self.register_buffer("scales", torch.full((1, width), 0.02, dtype=torch.float16))

    def forward(self, x):
        numbers = (self.qweight[:, None] >> (4 * torch.arange(8)[:, None])) & 15
        return x @ ((numbers.reshape(-1, self.qweight.shape[1]) - 8).to(x.dtype) * self.scales.to(x.dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layout_of_gptq_and_awq(dtype, folder, tmp_path):
    """Their packages build kernels, so that the layout stands in for them."""

    def base():
        torch.manual_seed(1)
        model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=dtype)
        for layer in model.model.layers:
            layer.self_attn.q_proj = Packed(64)
        return model

    off = logits(base())
    model = rs.steer(base(), rank=4)
    assert torch.equal(logits(model), off)
    losses = [record["loss"] for record in trained(model)]
    assert losses[-1] < losses[0]
    rs.save(model, tmp_path)
    assert torch.equal(logits(rs.load(base(), tmp_path)), logits(model))


def test_preparing_a_base_after_it_was_steered_closes_the_field_and_that_is_told(folder):
    whole = peft.get_peft_model(transformers.LlamaForCausalLM.from_pretrained(folder), rs.peft.HResConfig(rank=4))
    peft.prepare_model_for_kbit_training(whole, use_gradient_checkpointing=False)
    with pytest.raises(rs.SteerError, match="nothing to train"):
        trained(whole)
    with pytest.warns(
        UserWarning, match="somebody closed its parameters since, as .*`prepare_model_for_kbit_training`"
    ):
        whole.train()(input_ids=IDS)
    rs.use(whole, "default")
    losses = [record["loss"] for record in trained(whole)]
    assert losses[-1] < losses[0]
