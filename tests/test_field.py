"""One field against its closed form."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from cases import closed_form
from residual_steer import HRes, SteerError, field
from residual_steer.field import ACTIVATIONS

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SHARE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


def field_of(width=6, rank=3, **more):
    field = HRes(width, rank, **more)
    for parameter in field.parameters():
        nn.init.normal_(parameter)
    return field


def close(actual, expected, dtype):
    bound = SHARE[dtype] * expected.abs().max().item()
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=bound)


@pytest.mark.parametrize(("rank", "expected"), [(8, 1226), (32, 4322)])
def test_parameter_counts_are_those_of_the_papers_table_2(rank, expected):
    model = nn.Sequential(HRes(64, rank), nn.Linear(64, 2))
    assert sum(parameter.numel() for parameter in model.parameters()) == expected


def test_without_biases_only_the_two_projections_are_left():
    assert sum(parameter.numel() for parameter in HRes(64, 8, bias=False).parameters()) == 2 * 64 * 8


@given(st.integers(1, 9), st.data(), st.booleans(), st.sampled_from(sorted(ACTIVATIONS)))
@settings(max_examples=40, deadline=None)
def test_a_new_field_is_zero(width, data, bias, activation):
    rank = data.draw(st.integers(1, width))
    field = HRes(width, rank, bias=bias, activation=activation)
    y, z = torch.randn(2, 3, width), torch.randn(2, 3, width)
    assert field(z).count_nonzero() == 0
    assert torch.equal(field.add_to(y, z), y)


@given(st.floats(-4, 4), st.integers(0, 2**16))
@settings(max_examples=40, deadline=None)
def test_the_move_is_linear_in_the_scale(scale, seed):
    torch.manual_seed(seed)
    field = field_of(scale=scale).double()
    y, z = torch.randn(2, 2, 5, 6, dtype=torch.float64)
    torch.testing.assert_close(field.add_to(y, z) - y, scale * field(z), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_gradients_are_those_of_the_formula(activation, bias):
    field = field_of(4, 2, activation=activation, bias=bias, scale=0.7).double()
    weights = dict(field.named_parameters())
    names = list(weights)
    y, z = torch.randn(2, 2, 3, 4, dtype=torch.float64, requires_grad=True)

    def move(y, z, *values):
        return torch.func.functional_call(field, dict(zip(names, values, strict=True)), (y, z))

    field.forward = field.add_to
    assert torch.autograd.gradcheck(move, (y, z, *weights.values()))


def test_gradient_of_w_down_in_closed_form():
    field = field_of(5, 2, activation="tanh").double()
    z, outer = torch.randn(2, 7, 5, dtype=torch.float64)
    field(z).backward(outer)
    hidden = torch.tanh(field.down(z)).detach()
    expected = ((outer @ field.up.weight) * (1 - hidden**2)).T @ z
    torch.testing.assert_close(field.down.weight.grad, expected)


@pytest.mark.parametrize("weights", DTYPES)
@pytest.mark.parametrize("compute", DTYPES)
@pytest.mark.parametrize("stream", DTYPES)
def test_add_to_across_dtypes(stream, compute, weights):
    field = field_of(scale=0.7).to(weights)
    y, z = torch.randn(2, 2, 5, 6).to(stream)
    moved = field.add_to(y, z, compute)
    assert moved.dtype == stream
    worst = max((stream, compute, weights), key=SHARE.get)
    close(moved, y.double() + 0.7 * closed_form(field, z), worst)


def test_add_to_computes_in_the_weights_dtype_if_none_is_given():
    field = field_of(scale=-0.7)
    y, z = torch.randn(2, 2, 5, 6)
    close(field.add_to(y, z), y.double() - 0.7 * closed_form(field, z), torch.float32)


@pytest.mark.parametrize("stream", [torch.float32, torch.bfloat16])
def test_add_to_under_autocast_keeps_the_streams_dtype(stream):
    field = field_of()
    y, z = torch.randn(2, 2, 5, 6).to(stream)
    with torch.autocast("cpu", torch.bfloat16):
        moved = field.add_to(y, z)
    assert moved.dtype == stream
    close(moved, y.double() + closed_form(field, z), torch.bfloat16)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("stream", [torch.float32, torch.float64])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_channels_first(layout, stream, bias):
    field = field_of(channels=1, scale=0.7, bias=bias)
    last = field_of(scale=0.7, bias=bias)
    last.load_state_dict(field.state_dict())
    y, z = (tensor.to(stream, memory_format=layout) for tensor in torch.randn(2, 2, 6, 3, 5))
    moved = field.add_to(y, z)
    assert moved.shape == y.shape
    assert moved.stride() == y.stride(), "a convolution picks its kernel by the layout"
    expected = last.add_to(y.movedim(1, -1), z.movedim(1, -1)).movedim(-1, 1)
    torch.testing.assert_close(moved, expected)
    torch.testing.assert_close(field(z), last(z.movedim(1, -1)).movedim(-1, 1))


def test_streams_that_are_not_contiguous_stay_untouched():
    field = field_of()
    y, z = torch.randn(6, 5, 4).permute(2, 1, 0), torch.randn(4, 10, 6)[:, ::2]
    before = y.clone(), z.clone()
    close(field.add_to(y, z), y.double() + closed_form(field, z), torch.float32)
    assert torch.equal(y, before[0])
    assert torch.equal(z, before[1])


@pytest.mark.parametrize("shape", [(6,), (1, 6), (0, 6), (2, 3, 4, 6)])
def test_any_number_of_leading_dimensions(shape):
    field = field_of()
    y, z = torch.randn(2, *shape)
    moved = field.add_to(y, z)
    assert moved.shape == y.shape
    torch.testing.assert_close(moved.double(), y.double() + closed_form(field, z), rtol=1e-5, atol=1e-5)


def test_dropout_acts_in_training_mode_alone():
    field = field_of(64, 64, dropout=0.5)
    y, z = torch.randn(2, 3, 64)
    assert not torch.equal(field.add_to(y, z), field.add_to(y, z))
    field.eval()
    assert torch.equal(field.add_to(y, z), field.add_to(y, z))
    close(field.add_to(y, z), y.double() + closed_form(field, z), torch.float32)


def test_reset_returns_to_zero():
    field = field_of()
    field.reset()
    assert field(torch.randn(3, 6)).count_nonzero() == 0
    assert field.down.weight.count_nonzero() > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"width": 0}, "`width` is an integer of at least 1; received 0"),
        ({"width": 8.0}, "`width` is an integer of at least 1; received 8.0"),
        ({"rank": 0}, "`rank` is an integer from 1 to 8, the width; received 0"),
        ({"rank": 9}, "from 1 to 8, the width; received 9"),
        ({"rank": True}, "received True"),
        ({"scale": float("nan")}, "`scale` is a finite number; received nan"),
        ({"scale": "1"}, "`scale` is a finite number; received '1'"),
        ({"activation": "swish"}, "`activation` is one of gelu, gelu_tanh, relu.*received 'swish'"),
        ({"dropout": 1.0}, "`dropout` is a number of at least 0 and below 1, a probability; received 1.0"),
        ({"channels": 2}, "`channels` is one of -1, 1; received 2"),
    ],
)
def test_errors_have_the_rule_and_the_value(arguments, message):
    with pytest.raises(SteerError, match=message):
        HRes(**{"width": 8, "rank": 2, **arguments})


def test_representation_names_what_the_projections_do_not():
    assert "scale=0.5, activation=relu, dropout=0.1" in repr(HRes(4, 2, scale=0.5, activation="relu", dropout=0.1))


@pytest.mark.parametrize("bias", [True, False])
def test_the_memory_layout_of_the_stream_is_kept(bias):
    field = HRes(8, 3, bias=bias)
    nn.init.normal_(field.up.weight)
    stream = torch.randn(5, 2, 8).transpose(0, 1)  # (batch, length, width), the length first in memory
    steered = field.add_to(stream, stream)
    assert steered.stride() == stream.stride()
    torch.testing.assert_close(steered, field.add_to(stream.contiguous(), stream.contiguous()))


@pytest.mark.parametrize("few", [0, 2**20])
def test_gelu_of_few_numbers_is_gelu(few, monkeypatch):
    """Few numbers take another way on a CPU, without gradients."""
    monkeypatch.setattr(field, "_FEW", few)
    x = torch.linspace(-8, 8, 1001)
    exact = x.double() * torch.special.ndtr(x.double())
    with torch.no_grad():
        found = ACTIVATIONS["gelu"](x)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=1e-6)
    x.requires_grad_()
    assert torch.equal(ACTIVATIONS["gelu"](x), torch.nn.functional.gelu(x))
    half = x.detach().bfloat16()
    assert torch.equal(ACTIVATIONS["gelu"](half), torch.nn.functional.gelu(half))
