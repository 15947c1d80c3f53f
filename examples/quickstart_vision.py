"""Steer an image classifier: a ViT learns new classes by a field and a new head, and forgets nothing when switched off.

    python examples/quickstart_vision.py
    python examples/quickstart_vision.py --model vit_base_patch16_224 --steps 300

The images are scikit-learn's digits. Without `--model` a small ViT first learns the digits 0–4 here; with it, timm's
pre-trained one is downloaded, and sees the digits enlarged.
"""

import argparse
import copy
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch.utils.data import DataLoader, TensorDataset

import residual_steer as rs
from residual_steer.data import digits
from residual_steer.training import evaluate


def loaders(classes, side):
    """Return loaders of training images and of held-out ones, `(batch, channels, side, side)`."""
    found = []
    for split in ("train", "test"):
        x, y = digits(classes, split).tensors
        x = x if side == 8 else F.interpolate(x, (side, side)).expand(-1, 3, -1, -1)
        found.append(DataLoader(TensorDataset(x, y), batch_size=64, shuffle=split == "train"))
    return found


def main(arguments=None):
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="of timm, pre-trained")
    parser.add_argument("--rank", type=int, default=8, help="of the steering fields")
    parser.add_argument("--steps", type=int, default=150, help="of the optimizer")
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart_vision"), help="folder of the saved field")
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    if options.model:
        base, side = timm.create_model(options.model, pretrained=True), 224
    else:
        shape = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 64, "depth": 4, "num_heads": 4}
        base, side = VisionTransformer(num_classes=5, **shape), 8
        rs.fit(base, loaders(range(5), side)[0], steps=options.steps, lr=2e-3)  # `fit` trains whatever wants a gradient
    train, test = loaders(range(5, 10), side)

    model = copy.deepcopy(base)
    model.reset_classifier(5)  # a new head for the digits 5–9
    untrained = copy.deepcopy(model)
    rs.steer(model, rank=options.rank, train="head")  # a field beside every block, and the head; all else is frozen
    print(rs.summary(model))
    rs.fit(model, train, steps=options.steps, lr=2e-2)
    print(f"digits 5–9: {evaluate(model, test)['accuracy']:.1%}")

    rs.save(model, options.out)  # the head is saved with its field
    again = rs.load(untrained, options.out)
    print(f"on a fresh backbone: {evaluate(again, test)['accuracy']:.1%}")
    with rs.use(again, None):
        print(f"switched off: {evaluate(again, test)['accuracy']:.1%}")


if __name__ == "__main__":
    main()
