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
quick = settings(max_examples=40, deadline=None)


def field_of(width=6, rank=3, **more):
    field = HRes(width, rank, **more)
    for parameter in field.parameters():
        nn.init.normal_(parameter)
    return field


def close(actual, expected, dtype=torch.float32):
    bound = SHARE[dtype] * expected.abs().amax().item() if expected.numel() else 0
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=bound)


@pytest.mark.parametrize(("rank", "bias", "expected"), [(8, True, 1226), (32, True, 4322), (8, False, 1024 + 130)])
def test_parameter_counts_are_those_of_the_papers_table_2(rank, bias, expected):
    model = nn.Sequential(HRes(64, rank, bias=bias), nn.Linear(64, 2))
    assert sum(parameter.numel() for parameter in model.parameters()) == expected


@given(st.integers(1, 9), st.data(), st.booleans(), st.sampled_from(sorted(ACTIVATIONS)))
@quick
def test_a_new_field_is_zero_and_so_is_one_that_was_reset(width, data, bias, activation):
    field = HRes(width, data.draw(st.integers(1, width)), bias=bias, activation=activation)
    y, z = torch.randn(2, 3, width), torch.randn(2, 3, width)
    for _ in range(2):
        assert field(z).count_nonzero() == 0
        assert torch.equal(field.add_to(y, z), y)
        assert field.down.weight.count_nonzero() > 0
        for parameter in field.parameters():
            nn.init.normal_(parameter)
        field.reset()


@given(st.floats(-4, 4), st.integers(0, 2**16))
@quick
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
    y, z = torch.randn(2, 2, 3, 4, dtype=torch.float64, requires_grad=True)

    def move(y, z, *values):
        return torch.func.functional_call(field, dict(zip(weights, values, strict=True)), (y, z))

    field.forward = field.add_to
    assert torch.autograd.gradcheck(move, (y, z, *weights.values()))


@pytest.mark.parametrize("weights", DTYPES)
@pytest.mark.parametrize("compute", [*DTYPES, None])
@pytest.mark.parametrize("stream", DTYPES)
def test_add_to_across_dtypes(stream, compute, weights):
    field = field_of(scale=-0.7).to(weights)
    y, z = torch.randn(2, 2, 5, 6).to(stream)
    moved = field.add_to(y, z, compute)
    assert moved.dtype == stream
    close(moved, y.double() - 0.7 * closed_form(field, z), max((stream, compute or weights, weights), key=SHARE.get))


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
    assert moved.stride() == y.stride(), "a convolution picks its kernel by the layout"
    torch.testing.assert_close(moved, last.add_to(y.movedim(1, -1), z.movedim(1, -1)).movedim(-1, 1))
    torch.testing.assert_close(field(z), last(z.movedim(1, -1)).movedim(-1, 1))


@pytest.mark.parametrize("shape", [(6,), (1, 6), (0, 6), (2, 3, 4, 6), "permuted", "length first"])
def test_streams_of_any_shape_keep_it_and_their_layout_and_what_they_were(shape):
    field = field_of()
    if shape == "permuted":
        y, z = torch.randn(6, 5, 4).permute(2, 1, 0), torch.randn(4, 10, 6)[:, ::2]
    elif shape == "length first":
        y, z = torch.randn(2, 5, 2, 6).transpose(1, 2)
    else:
        y, z = torch.randn(2, *shape)
    before = y.clone(), z.clone()
    moved = field.add_to(y, z)
    assert moved.shape == y.shape
    assert moved.stride() == y.stride() or shape == "permuted"
    close(moved, y.double() + closed_form(field, z))
    assert torch.equal(y, before[0])
    assert torch.equal(z, before[1])


def test_dropout_acts_in_training_mode_alone():
    field = field_of(64, 64, dropout=0.5)
    y, z = torch.randn(2, 3, 64)
    assert not torch.equal(field.add_to(y, z), field.add_to(y, z))
    field.eval()
    assert torch.equal(field.add_to(y, z), field.add_to(y, z))
    close(field.add_to(y, z), y.double() + closed_form(field, z))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"width": 0}, "`width` is an integer of at least 1; received 0"),
        ({"width": 8.0}, "`width` is an integer.*; received 8.0"),
        ({"rank": 0}, "`rank` is an integer from 1 to 8, the width; received 0"),
        ({"rank": 9}, "received 9"),
        ({"rank": True}, "received True"),
        ({"scale": float("nan")}, "`scale` is a finite number; received nan"),
        ({"scale": "1"}, "`scale` is a finite number; received '1'"),
        ({"activation": "swish"}, "`activation` is one of gelu, gelu_tanh, relu.*received 'swish'"),
        ({"dropout": 1.0}, "`dropout` is a number of at least 0 and below 1.*; received 1.0"),
        ({"channels": 2}, "`channels` is one of -1, 1; received 2"),
        ({"bias": 1}, "`bias` is True or False; received 1"),
    ],
)
def test_errors_have_the_rule_and_the_value(arguments, message):
    with pytest.raises(SteerError, match=message):
        HRes(**{"width": 8, "rank": 2, **arguments})


def test_representation_names_what_the_projections_do_not():
    assert "scale=0.5, activation=relu, dropout=0.1" in repr(HRes(4, 2, scale=0.5, activation="relu", dropout=0.1))


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
