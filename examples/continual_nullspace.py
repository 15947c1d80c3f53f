"""Learn one task after another: what a field forgets, and what protection by null spaces (eq. 6) costs.

    python examples/continual_nullspace.py

A small ViT that knows the digits 0–4 is frozen. One field, with the head, learns to tell 0 from 1, then 8 from 9:
without protection, with its updates projected onto the null space of what entered it in the first task, and with a
second field in the place of the first.
"""

import argparse
import copy

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch.utils.data import DataLoader

import residual_steer as rs
from residual_steer.data import digits

FIRST, SECOND = (0, 1), (8, 9)


def loader(classes):
    """Return batches of images of some digits, with the digits as labels."""
    x, y = digits(classes).tensors
    return DataLoader(torch.utils.data.TensorDataset(x, torch.tensor(classes)[y]), batch_size=32, shuffle=True)


def accuracy(model, classes):
    """Return how many test images of two digits are told apart, by these two outputs of the head."""
    device = next(model.parameters()).device  # where `fit` trained
    x, y = (part.to(device) for part in digits(classes, "test").tensors)
    with torch.no_grad():
        return f"{float((model.eval()(x)[:, list(classes)].argmax(1) == y).float().mean()):.1%}"


def loss_of(classes):
    """Return a loss by the outputs for two digits alone."""

    def loss(model, batch):
        x, y = batch
        return F.cross_entropy(model(x)[:, list(classes)], (y == classes[1]).long())

    return loss


def main(arguments=None):
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100, help="of the optimizer, for each task")
    parser.add_argument("--energy", type=float, default=0.999, help="share of the features' energy that is protected")
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    shape = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 64, "depth": 4, "num_heads": 4}
    base = VisionTransformer(num_classes=10, **shape)
    rs.fit(base, loader(range(5)), steps=2 * options.steps, lr=2e-3)

    learned = rs.steer(base, rank=8, train="head", name="first")
    rs.fit(learned, loader(FIRST), steps=options.steps, lr=1e-2, loss=loss_of(FIRST), weight_decay=0.0)
    print(f"first task, right after it was learned: {accuracy(learned, FIRST)}")
    for way in ("no protection", "null space", "a field of its own"):
        model, space = copy.deepcopy(learned), None
        if way == "null space":
            space = rs.continual.NullSpace(model, energy=options.energy)
            space.observe(loader(FIRST))  # one pass over the first task; its data are not kept
        if way == "a field of its own":
            rs.steer(model, rank=8, train="head", name="second")
        options_of_fit = {"loss": loss_of(SECOND), "weight_decay": 0.0, "protect": space}
        rs.fit(model, loader(SECOND), steps=options.steps, lr=1e-2, **options_of_fit)
        second = accuracy(model, SECOND)
        with rs.use(model, "first"):
            print(f"{way}: second task {second}, first task now {accuracy(model, FIRST)}")
        if space is not None:
            print(space)


if __name__ == "__main__":
    main()
