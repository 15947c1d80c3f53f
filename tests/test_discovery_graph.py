"""What the autograd graph says of one function: whether it hands its input on, and whether it adds to it."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from residual_steer.discovery.graph import Paths, depends, edge_of, paths

torch.manual_seed(0)
LINEAR, CONV, WEIGHT = nn.Linear(8, 8), nn.Conv2d(8, 8, 3, padding=1), nn.Parameter(torch.ones(8))
NORM, BATCH = nn.LayerNorm(8), nn.BatchNorm2d(8).eval()
RESIDUAL, PLAIN, NONE = Paths(residual=True), Paths(plain=True), Paths()


class Opaque(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 1

    @staticmethod
    def backward(ctx, gradient):
        return gradient


def rms(z):
    return WEIGHT * (z * torch.rsqrt(z.pow(2).mean(-1, keepdim=True) + 1e-6))


def added_in_place(z):
    z += LINEAR(z)
    return z


def added_to_a_view(z):
    y = torch.cat([LINEAR(z), z], -1)[..., :8]
    y += z
    return y


def windows(z):
    moved = torch.roll(z.view(2, 2, 3, 8), 1, 2).permute(0, 2, 1, 3).reshape(2, 6, 8)
    back = (moved + LINEAR(moved)).view(2, 3, 2, 8).permute(0, 2, 1, 3)
    return torch.roll(back, -1, 2).reshape(2, 6, 8)


TOKENS = {
    "added": (lambda z: z + LINEAR(z), RESIDUAL),
    "added the other way": (lambda z: LINEAR(z) + z, RESIDUAL),
    "twice": (lambda z: (z + LINEAR(z)) + LINEAR(z), RESIDUAL),
    "weighed": (lambda z: 0.5 * z * WEIGHT + LINEAR(z), RESIDUAL),
    "subtracted from": (lambda z: z - LINEAR(z), RESIDUAL),
    "in one product": (lambda z: torch.addmm(z[0], z[0], LINEAR.weight).view(1, 6, 8), RESIDUAL),
    "in place": (added_in_place, RESIDUAL),
    "in place to a view": (added_to_a_view, RESIDUAL),
    "post-norm": (lambda z: NORM(z + LINEAR(z)), RESIDUAL),
    "post-norm by hand": (lambda z: rms(z + LINEAR(z)), RESIDUAL),
    "windows": (windows, RESIDUAL),
    "masked": (lambda z: torch.where(z.detach() > 0, z, 0.0 * z) + LINEAR(z), RESIDUAL),
    "lanes": (lambda z: torch.softmax(LINEAR(z)[:, :2, :2], -1) @ z[:, :2] + LINEAR(z)[:, :2], RESIDUAL),
    "half precision": (lambda z: (z.bfloat16() + LINEAR(z).bfloat16()).float(), RESIDUAL),
    "handed on": (lambda z: z.view(2, 3, 2, 8).flatten(1, 2), PLAIN),
    "normalised": (NORM, PLAIN),
    "a constant added": (lambda z: z + WEIGHT, PLAIN),
    "transformed": (LINEAR, NONE),
    "the other sign": (lambda z: LINEAR(z) - z, NONE),
    "gated": (lambda z: torch.sigmoid(LINEAR(z)) * z + LINEAR(z), NONE),
    "divided by itself": (lambda z: z / LINEAR(z) + LINEAR(z), NONE),
    "attended": (lambda z: torch.softmax(z @ z.transpose(1, 2), -1) @ z + LINEAR(z), NONE),
    "another's": (lambda z: LINEAR(z) + WEIGHT, NONE),
    "detached": (lambda z: z.detach() + WEIGHT, NONE),
}
MAPS = {
    "convolved": (lambda z: F.relu(CONV(z)), NONE),
    "residual": (lambda z: F.relu(z + BATCH(CONV(z))), RESIDUAL),
    "pre-activated": (lambda z: z + CONV(F.relu(BATCH(z))), RESIDUAL),
    "pooled": (lambda z: F.avg_pool2d(z, 3, 1, 1) + CONV(z), NONE),
    "projected": (lambda z: F.conv2d(z, torch.eye(8)[..., None, None]) + CONV(z), NONE),
    "excited": (lambda z: z * torch.sigmoid(CONV(z).mean((2, 3), keepdim=True)), PLAIN),
    "joined": (lambda z: torch.cat([CONV(z)[:, :4], CONV(z)[:, 4:]], 1), NONE),
    "shuffled": (lambda z: torch.cat([z[:, :4], CONV(z)[:, 4:]], 1), PLAIN),
}


@pytest.mark.parametrize(
    ("function", "expected", "shape"),
    [pytest.param(*value, (2, 6, 8), id=name) for name, value in TOKENS.items()]
    + [pytest.param(*value, (2, 8, 5, 5), id=f"maps-{name}") for name, value in MAPS.items()],
)
def test_paths(function, expected, shape):
    rows = 1 if function is TOKENS["in one product"][0] else 2
    z = torch.randn(rows, *shape[1:], requires_grad=True).clone()
    entered = edge_of(z)
    assert paths(edge_of(function(z)), entered) == expected


def test_an_operation_of_ones_own_is_told():
    z = torch.randn(2, 8, requires_grad=True).clone()
    found = paths(edge_of(Opaque.apply(z) + LINEAR(z)), edge_of(z))
    assert not found.residual
    assert found.opaque == "Opaque"


def test_dependence_stops_at_what_is_older():
    x = torch.randn(2, 8, requires_grad=True).clone()
    z = LINEAR(x)
    y = x * 2
    out = LINEAR(z) + y
    assert depends(edge_of(out), edge_of(z))
    assert depends(edge_of(out), edge_of(x))
    assert not depends(edge_of(y), edge_of(z))
    assert depends(edge_of(z), edge_of(z))


def test_a_part_of_what_was_split_is_that_part_alone():
    z = torch.randn(2, 16, requires_grad=True).clone()
    first, second = z.split(8, -1)
    assert paths(edge_of(first + LINEAR(first)), edge_of(first)).residual
    assert paths(edge_of(first + LINEAR(first)), edge_of(second)) == NONE
