"""A model whose blocks are any functions of the stream, and states of a known shape."""

import torch
from torch import nn

from residual_steer import Backbone, register_backbone

WIDTH = 4
SCALES = torch.tensor([3.0, 2.0, 1.0, 0.5])
CENTRE = torch.tensor([1.0, 5.0, -2.0, 0.0])


class Apply(nn.Module):
    """A block that maps states by a function."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, z):
        return self.function(z)


class Toy(nn.Module):
    def __init__(self, *functions):
        super().__init__()
        self.blocks = nn.ModuleList(map(Apply, functions))
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


def register():
    """Describe `Toy`, until the test is over."""
    register_backbone("toy", matches=[f"{Toy.__module__}.Toy"])(lambda model: Backbone(model.blocks, WIDTH))


def same(z):
    return z


def toy(function):
    return Toy(lambda z: z + function(z))


def data(rows=60, tokens=5, batch=20):
    x = torch.randn(rows, tokens, WIDTH, dtype=torch.float64) * SCALES + CENTRE
    return list(zip(x.split(batch), (torch.arange(rows) % 3).split(batch), strict=True))


def states(loader):
    return torch.cat([x for x, _ in loader]).reshape(-1, WIDTH)
