"""The module on a point: what it hooks, what it shows to others, how it follows casts and copies."""

import copy

import pytest
import torch
from torch import nn

import residual_steer as rs
from cases import TABLE, WIDTH, closed_form, randomise
from residual_steer.injector import Injector


@pytest.fixture(params=["gpt2", "mamba", "hf-vit"])
def case(request):
    return TABLE[request.param]


@torch.no_grad()
def test_hidden_states_captured_before_steering_are_steered_after(case):
    model = case.build()
    captured = model(**case.inputs(model), output_hidden_states=True).hidden_states
    randomise(rs.steer(model, rank=4))
    outputs = []
    case.modules(model, "block")[0].register_forward_hook(lambda _, args, out: outputs.append(out))
    steered = model(**case.inputs(model), output_hidden_states=True).hidden_states
    first = outputs[0] if isinstance(outputs[0], torch.Tensor) else outputs[0][0]
    assert any(torch.equal(state, first) for state in steered)
    assert not any(torch.equal(state, first) for state in captured)


@pytest.mark.parametrize("name", ["mamba_ssm-1", "mamba_ssm-2"])
@torch.no_grad()
def test_the_pair_of_mamba_ssm_moves_by_the_field_of_its_sum(name):
    case = TABLE[name]
    model, frozen = randomise(rs.steer(case.build(), rank=4)), case.build()
    hidden, residual = torch.randn(2, 2, 5, WIDTH)
    for block, twin in zip(case.modules(model, "block"), case.modules(frozen, "block"), strict=True):
        field = block.steering_block.fields["default"]
        for pair in ((hidden, None), (hidden, residual)):
            stream = hidden if pair[1] is None else hidden + residual
            expected = sum(twin(*pair)).double() + closed_form(field, stream)
            torch.testing.assert_close(sum(block(*pair)).double(), expected, atol=1e-5, rtol=1e-5)
            by_name = block(hidden_states=pair[0], residual=pair[1])
            assert torch.equal(sum(by_name), sum(block(*pair)))


@pytest.mark.parametrize("name", ["timm-vit", "gpt2", "mamba", "mamba_ssm-1"])
@torch.no_grad()
def test_a_cast_after_steering_equals_steering_after_a_cast(name):
    case = TABLE[name]
    late = randomise(rs.steer(case.build(), rank=4)).to(torch.bfloat16)
    early = randomise(rs.steer(case.build(dtype=torch.bfloat16), rank=4)).to(torch.bfloat16)
    kept = randomise(rs.steer(case.build(dtype=torch.bfloat16), rank=4))
    fields = [module for module in kept.modules() if isinstance(module, rs.HRes)]
    assert {p.dtype for field in fields for p in field.parameters()} == {torch.float32}
    assert torch.equal(case.run(late), case.run(early))
    torch.testing.assert_close(case.run(late), case.run(kept), rtol=0.05, atol=0.05)
    back = late.float()
    assert case.run(back).dtype == torch.float32
    assert {module.compute_dtype for module in back.modules() if isinstance(module, Injector)} == {torch.float32}


def test_two_fields_at_one_point_share_its_injector():
    case = TABLE["gpt2"]
    model = rs.steer(rs.steer(case.build(), rank=4, name="a"), rank=2, name="b")
    assert sum(isinstance(module, Injector) for module in model.modules()) == 2
    block = case.modules(model, "block")[0]
    assert list(block.steering_block.fields) == ["a", "b"]
    assert len(block._forward_hooks) == 1
    assert "site=block, acting=b" in repr(block.steering_block)


def test_fields_follow_train_and_eval():
    case = TABLE["timm-vit"]
    model = randomise(rs.steer(case.build(), rank=4, dropout=0.9))
    assert not any(module.training for module in model.modules())
    call = case.inputs(model)
    assert torch.equal(model(**call), model(**call))
    model.train()
    assert not torch.equal(model(**call), model(**call))


def test_a_block_without_the_site_has_no_injector():
    backbone = rs.Backbone(blocks=[nn.Linear(4, 4)], width=4)
    with pytest.raises(rs.SteerError, match=r"block 0 has no 'mixer'"):
        Injector(backbone, 0, "mixer")


class Overwriting(nn.Module):
    """A block that works in place on the stream it is given."""

    def __init__(self, width=8):
        super().__init__()
        self.mlp = nn.Linear(width, width)

    def forward(self, x):
        x += torch.tanh(self.mlp(x))
        return x


class Named(Overwriting):
    def forward(self, *, stream):
        return super().forward(stream)


class Stack(nn.Module):
    def __init__(self, *blocks):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x):
        x = x.clone()
        for block in self.blocks:
            x = block(stream=x) if isinstance(block, Named) else block(x)
        return x


def stack(make, **more):
    """Return a steered model of two blocks."""
    model = Stack(make(), make()).requires_grad_(False)
    return rs.steer(model, rs.Backbone(blocks=model.blocks, width=8, **more), rank=4, scale=0.5)


@pytest.mark.parametrize(
    ("make", "more"),
    [(Overwriting, {}), (Named, {"read": lambda args, kwargs: kwargs["stream"]})],
    ids=["positional", "named"],
)
def test_a_block_that_overwrites_its_input_is_refused_with_what_to_do(make, more):
    model = stack(make, **more)
    with pytest.raises(rs.SteerError, match=rf"this {make.__name__} overwrites it.*inplace=True"):
        model(torch.randn(2, 3, 8))
    with rs.use(model, None):
        model(torch.randn(2, 3, 8))


def test_a_block_declared_to_overwrite_its_input_is_steered_by_what_entered():
    model = randomise(stack(Overwriting, inplace=True))
    stream = torch.randn(2, 3, 8)
    actual = model(stream)
    z = stream
    for block in model.blocks:
        field = block.steering_block.fields["default"]
        z = z + torch.tanh(block.mlp(z)) + closed_form(field, z).to(z.dtype) * 0.5
    torch.testing.assert_close(actual, z)
    actual.sum().backward()
    assert all(p.grad is not None for p in rs.parameters(model))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(stream), actual)


def test_a_block_that_is_a_sequence_is_steered():
    net, stream = stack(lambda: nn.Sequential(nn.Linear(8, 8), nn.Tanh())), torch.randn(2, 3, 8)
    with rs.use(net, None):
        expected = net(stream)
    z = stream
    for block in randomise(net).blocks:
        z = block[1](block[0](z)) + closed_form(block.steering_block.fields["default"], z).float() * 0.5
    torch.testing.assert_close(net(stream), z)
    rs.unsteer(net)
    assert torch.equal(net(stream), expected)
    assert [len(block) for block in net.blocks] == [2, 2]


def test_the_watch_over_a_block_ends_with_its_first_call():
    model = rs.steer(TABLE["gpt2"].build(), rank=4)
    block = TABLE["gpt2"].modules(model, "block")[0]
    TABLE["gpt2"].run(model)
    assert block.steering_block._trusted
    rs.unsteer(model)
    assert not block._forward_pre_hooks


def test_a_call_that_failed_leaves_nothing_that_cannot_be_copied():
    case = TABLE["gpt2"]
    model = rs.steer(case.build(), rank=4)

    def fail(*_):
        raise MemoryError

    handle = case.modules(model, "mlp")[1].register_forward_hook(fail)
    with pytest.raises(MemoryError):
        case.run(model)
    handle.remove()
    torch.testing.assert_close(case.run(copy.deepcopy(model)), case.run(model))
