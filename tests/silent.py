"""The models that the tests of silent faults share."""

import pytest
import torch
import transformers
from torch import nn

import residual_steer as rs
from cases import TABLE, randomise

THREE = [TABLE[name] for name in ("gpt2", "timm-vit", "mamba")]
three = pytest.mark.parametrize("case", THREE, ids=lambda case: case.name)
RESNET = TABLE["timm-resnet"]


def tiny(**more):
    """Return the same small GPT-2 each time."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 60, "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 2}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**sizes, **more})).eval()


def ids(rows=2, length=6):
    return torch.randint(3, 30, (rows, length), generator=torch.Generator().manual_seed(0))


def two(case, model=None, **more):
    model = case.build() if model is None else model
    for name in ("a", "b"):
        rs.steer(model, rank=2, name=name, **more)
    return randomise(model)


def fresh(case):
    return rs.steer(case.build(), rank=2)


class Residual(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.mixer = nn.Linear(width, width)

    def forward(self, x):
        return x + torch.tanh(self.mixer(x))
