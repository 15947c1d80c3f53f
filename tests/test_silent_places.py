"""Faults that were silent: where a field runs, on what device, in what type, or why it cannot."""

import pytest
import torch
from accelerate import cpu_offload
from torch import nn

import residual_steer as rs
from cases import randomise
from silent import TABLE, Residual, ids, three, tiny


@pytest.mark.parametrize("order", ["steer first", "offload first"])
@pytest.mark.parametrize("mix", ["default", {"default": 0.5, "b": 2.0}, ["default", "b"]])
def test_offloaded_models_are_steered_saved_and_loaded(order, mix, tmp_path):
    plain = rs.steer(rs.steer(tiny(), rank=4), rank=2, name="b")
    randomise(plain)
    rs.use(plain, mix)
    with torch.no_grad():
        want = plain(ids()).logits
    for name in ("default", "b"):
        rs.save(plain, tmp_path / name, name)
    model = tiny()
    if order == "offload first":
        cpu_offload(model, execution_device="cpu")
    for name in ("default", "b"):
        rs.load(model, tmp_path / name)
    if order == "steer first":
        cpu_offload(model, execution_device="cpu")
    rs.use(model, mix)
    with torch.no_grad():
        torch.testing.assert_close(model(ids()).logits, want)
    rs.save(model, tmp_path / "again", "b")
    assert (tmp_path / "again/steering.safetensors").read_bytes() == (tmp_path / "b/steering.safetensors").read_bytes()


@pytest.mark.parametrize("order", ["steer first", "offload first"])
def test_a_field_that_was_offloaded_does_not_pretend_to_train(order):
    model, words = tiny(), ids()
    if order == "offload first":
        cpu_offload(model, execution_device="cpu")
    rs.steer(model, rank=2)
    if order == "steer first":
        cpu_offload(model, execution_device="cpu")
        for _ in range(2):
            with pytest.raises(rs.SteerError, match=r"'default' was offloaded after .* would not train"):
                model.train()(words)
        return
    model.train()(words, labels=words).loss.backward()
    assert all(p.grad is not None for p in rs.parameters(model))


@pytest.mark.parametrize("how", ["replaced", "taken out"])
def test_a_block_that_is_no_more_there_is_named_in_training(how):
    model = rs.steer(tiny(), rank=2)
    blocks = model.transformer.h
    if how == "replaced":
        blocks[1] = tiny().requires_grad_(False).transformer.h[1]
    else:
        model.transformer.h = blocks[:1]
    with pytest.warns(UserWarning, match="block 1 was taken out of the model, or replaced, since it was steered"):
        model.train()(ids())
    assert len(rs.fields(model)) == 1


def test_fields_stand_where_blocks_execute_and_meta_on_purpose_stays_meta():
    model = TABLE["gpt2"].build()
    cpu_offload(model, execution_device="cpu")
    rs.steer(model, rank=2)
    assert all(p.device.type == "cpu" for p in rs.parameters(model))
    with pytest.raises(rs.SteerError, match="which is to train along, is offloaded"):
        rs.steer(model, rank=2, name="b", train="lm_head")
    meta = rs.steer(TABLE["gpt2"].build().to("meta"), rank=2)
    assert all(p.is_meta for p in rs.parameters(meta))
    with pytest.raises(rs.SteerError, match="no value: it is on the meta device"):
        rs.save(meta, "nowhere")


class Eighth(nn.Module):
    """A block whose weights are stored in float8 and computed with in bf16."""

    def __init__(self, norm=True):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16, 16).to(torch.float8_e4m3fn), requires_grad=False)
        self.norm = nn.LayerNorm(16, dtype=torch.bfloat16) if norm else nn.Identity()

    def forward(self, x):
        return x + self.norm(x) @ self.weight.to(x.dtype)


@pytest.mark.parametrize("norm", [True, False])
def test_a_field_computes_in_what_the_block_computes_in_not_in_what_it_is_stored_in(norm):
    model = nn.Sequential(Eighth(norm), Eighth(norm))
    x = torch.randn(2, 3, 16, dtype=torch.bfloat16 if norm else torch.float32)
    off = model(x)
    rs.steer(model, rs.Backbone(blocks=list(model), width=16), rank=2)
    assert all(p.dtype == torch.float32 for p in rs.parameters(model))
    assert torch.equal(model(x), off)
    model(x).float().sum().backward()
    assert all(p.grad is not None for p in rs.parameters(model))


def test_what_a_quantised_layer_says_it_computes_in_is_what_counts():
    from residual_steer.backbone import compute_dtype

    block = nn.Linear(4, 4)
    block.compute_dtype = torch.bfloat16  # as bitsandbytes' Linear4bit and HQQ's layer have it
    assert compute_dtype(nn.Sequential(nn.LayerNorm(4), block)) == torch.bfloat16


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_nested_stream_is_refused_in_words():
    model = nn.Sequential(nn.Identity(), nn.Identity())
    own = {"read": lambda args, _: args[0], "write": lambda output, f: f(output)}  # ours reads nested ones padded
    rs.steer(model, rs.Backbone(blocks=list(model), width=4, **own), rank=2)
    nested = torch.nested.nested_tensor([torch.ones(2, 4), torch.ones(3, 4)])
    with pytest.raises(rs.SteerError, match=r"dense stream.*nested"):
        model(nested)


@three
def test_tracers_that_cannot_follow_hooks_say_what_can(case):
    model = randomise(rs.steer(case.build(), rank=2))
    for chosen in ("default", None):
        rs.use(model, chosen)
        with pytest.raises(rs.SteerError, match=r"torch\.jit\.script .*torch\.export"):
            torch.jit.script(model)


def test_fx_over_an_acting_field_says_what_works():
    model = nn.Sequential(Residual(8), Residual(8))
    rs.steer(model, rs.Backbone(blocks=list(model), width=8), rank=2)

    class Leaves(torch.fx.Tracer):
        def is_leaf_module(self, module, name):
            return False

    with pytest.raises(rs.SteerError, match=r"torch\.fx .*torch\.export"):
        Leaves().trace(model)
    rs.use(model, None)
    Leaves().trace(model)
