"""A package of models, as anybody would publish it. It needs no residual_steer; `steering.py` beside it does."""

import torch
from torch import nn


class Layer(nn.Module):
    """Mix along the sequence, then along the width; the stream goes from call to call in a dict."""

    def __init__(self, width):
        super().__init__()
        self.mix = nn.GRU(width, width, batch_first=True)
        self.mlp = nn.Linear(width, width)

    def forward(self, carried):
        z = carried["stream"]
        z = z + self.mix(z)[0]
        return {**carried, "stream": z + torch.relu(self.mlp(z))}


class Stack(nn.Module):
    """Layers over a sequence, `(batch, length, width)`."""

    def __init__(self, width=8, depth=2):
        super().__init__()
        self.width = width
        self.layers = nn.ModuleList(Layer(width) for _ in range(depth))

    def forward(self, z):
        carried = {"stream": z}
        for layer in self.layers:
            carried = layer(carried)
        return carried["stream"]
