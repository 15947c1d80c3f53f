"""A digest is the same for the same tensors, and for no others."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from residual_steer.study import digest


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.low = nn.Parameter(torch.randn(4).bfloat16())
        self.register_buffer("steps", torch.tensor(5))
        self.register_buffer("mask", torch.tensor([True, False]))
        self.register_buffer("none", torch.empty(0, 3))
        self.register_buffer("scratch", torch.randn(2), persistent=False)


def built():
    torch.manual_seed(3)
    return Net()


def test_copies_are_the_same_however_they_are_kept_in_memory():
    model = built()
    expected = digest(model)
    assert len(expected) == 16
    assert int(expected, 16) >= 0
    assert digest(copy.deepcopy(model).requires_grad_(False).train()) == expected
    model.layer.weight.data = model.layer.weight.data.T.contiguous().T  # the same numbers, column by column
    assert digest(model) == expected
    model.scratch.zero_()  # which is not stored
    assert digest(model) == expected


@settings(deadline=None)
@given(st.data())
def test_any_bit_that_changes_is_seen(data):
    model = built()
    before = digest(model)
    name = data.draw(st.sampled_from([name for name, tensor in model.state_dict().items() if tensor.numel()]))
    raw = model.state_dict()[name].view(-1).view(torch.uint8)
    place = data.draw(st.integers(0, raw.numel() - 1))
    bit = 1 if name == "mask" else 1 << data.draw(st.integers(0, 7))
    raw[place] ^= bit
    assert digest(model) != before
    raw[place] ^= bit
    assert digest(model) == before


@pytest.mark.parametrize("change", ["type", "shape", "empty", "name", "order", "more"])
def test_type_shape_and_name_count_too(change):
    model = built()
    before = digest(model)
    if change == "type":
        model.steps = model.steps.to(torch.int64).view(torch.float64)  # the same bits
    elif change == "shape":
        model.layer.weight = nn.Parameter(model.layer.weight.detach().view(3, 2))
    elif change == "empty":
        model.none = model.none.view(3, 0)
    elif change == "name":
        model.stratum = model.layer
        del model.layer
    elif change == "order":
        model.low.data = model.low.data.flip(0)
    else:
        model.register_buffer("more", torch.empty(0))
    assert digest(model) != before


def test_extra_state_that_is_no_tensor_is_left_out():
    class Extra(Net):
        def get_extra_state(self):
            return {"any": object()}

    model = built()
    before = digest(model)
    model.__class__ = Extra
    assert digest(model) == before
