"""A small classifier and its data, for the tests of the training loop."""

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import residual_steer as rs


def classifier(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.1), nn.Linear(8, 3))


def pairs(rows=24, batch=8, shuffle=True):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, 4, generator=generator)
    return DataLoader(TensorDataset(x, (x[:, 0] > 0).long() + (x[:, 1] > 0)), batch, shuffle=shuffle)


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def fit(model, train, *args, **options):
    return rs.fit(model, train, *args, **{"steps": 6, "progress": False, **options})
