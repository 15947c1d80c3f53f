"""A small classifier and its data, for the tests of the training loop."""

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import residual_steer as rs


class Stop(Exception):
    """A run was cut off."""


def classifier(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.1), nn.Linear(8, 3))


def pairs(rows=24, batch=8, shuffle=True, **more):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, 4, generator=generator)
    y = (x[:, 0] > 0).long() + (x[:, 1] > 0)
    return DataLoader(TensorDataset(x, y), batch, shuffle=shuffle, **more)


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def fit(model, train, *args, **options):
    return rs.fit(model, train, *args, **{"steps": 6, "progress": False, **options})


def stopping_at(module, call):
    """Cut a run off when a module is called for the so manieth time."""
    calls = []

    def stop(*_):
        calls.append(1)
        if len(calls) == call:
            raise Stop

    return module.register_forward_hook(stop)
