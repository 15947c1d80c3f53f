"""A small model of its own family, for programs that save and load it."""

import torch
from torch import nn

import residual_steer as rs

BATCH = torch.linspace(-1, 1, 2 * 3 * 8).reshape(2, 3, 8)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.mlp = nn.Linear(8, 8)

    def forward(self, z):
        return z + torch.tanh(self.mlp(z))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(8, 3)

    def forward(self, z):
        for block in self.blocks:
            z = block(z)
        return self.head(z)


@rs.register_backbone("net", matches=[f"{__name__}.Net"])
def net(model):
    return rs.Backbone(blocks=model.blocks, width=8, mlp="mlp")


def fresh():
    torch.manual_seed(0)
    return Net()


def steer(model, seed, **options):
    """Add a field with random weights."""
    rs.steer(model, rank=3, **options)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in rs.parameters(model):
            parameter.normal_()
    return model
