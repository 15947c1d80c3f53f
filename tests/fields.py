"""A small ViT with a field of every option, and what the tests of storage ask of it."""

import contextlib
import json

import pytest
import safetensors.torch
import torch
from timm.models.vision_transformer import VisionTransformer

import residual_steer as rs
from residual_steer._field_file import DESCRIPTION, TENSORS, digest


def vit(seed=0, depth=3, width=32, classes=5):
    torch.manual_seed(seed)
    model = VisionTransformer(
        img_size=8, patch_size=4, in_chans=1, embed_dim=width, depth=depth, num_heads=4, num_classes=classes
    )
    return model.eval()


def shake(model, name=None):
    with torch.no_grad():
        for parameter in rs.parameters(model, name):
            parameter.normal_(std=0.3)
    return model


IMAGES = torch.linspace(-1, 1, 128).reshape(2, 1, 8, 8)


def snapshot(model):
    """All that a failed call must leave alone."""
    modules = [(n, list(m._forward_hooks), list(m._forward_pre_hooks), m.training) for n, m in model.named_modules()]
    gradients = [(name, p.requires_grad) for name, p in model.named_parameters(remove_duplicate=False)]
    values = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    return (modules, gradients, list(values), sorted(vars(model))), values


def assert_as(model, before):
    things, values = snapshot(model)
    assert things == before[0]
    assert all(torch.equal(values[key], before[1][key]) for key in values)


@contextlib.contextmanager
def refused(model, message):
    """Expect an error that leaves the model as it was."""
    before = snapshot(model)
    with pytest.raises(rs.SteerError, match=message):
        yield
    assert_as(model, before)


def save_one(folder):
    """Save a field with a head; return the folder and what the model computes."""
    model = shake(rs.steer(vit(), rank={0: 4, 2: 2}, scale=0.5, activation="silu", dropout=0.1, train="head"))
    rs.save(model, folder)
    return folder, model(IMAGES)


def rewrite(folder, change_tensors=None, change_description=None):
    """Save a field again with other contents, and a digest that agrees with them."""
    tensors = safetensors.torch.load_file(folder / TENSORS)
    description = json.loads((folder / DESCRIPTION).read_text())
    if change_tensors:
        change_tensors(tensors)
    if change_description:
        change_description(description)
    description["sha256"] = digest(description, tensors)
    (folder / DESCRIPTION).write_text(json.dumps(description))
    safetensors.torch.save_file(tensors, folder / TENSORS, {"residual_steer": json.dumps(description)})
