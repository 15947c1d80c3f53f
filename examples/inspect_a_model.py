"""Look inside a steered model: what its fields do, where attention went, and how far the stream moved.

    python examples/inspect_a_model.py

A small ViT learns the digits 0–4 here, is steered to the digits 5–9, and is compared with itself switched off. Every
diagnostic has a table, whose rows pandas takes, and a plot, which is a matplotlib Figure.
"""

import argparse
from pathlib import Path

import torch
from timm.models.vision_transformer import VisionTransformer
from torch.utils.data import DataLoader

import residual_steer as rs
from residual_steer.data import digits


def main(arguments=None):
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=150, help="of the optimizer")
    parser.add_argument("--out", type=Path, default=Path("runs/inspect_a_model"), help="folder of the pictures")
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    shape = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 64, "depth": 4, "num_heads": 4}
    model = VisionTransformer(num_classes=5, **shape)
    old, new = (DataLoader(digits(classes), batch_size=64, shuffle=True) for classes in (range(5), range(5, 10)))
    rs.fit(model, old, steps=options.steps, lr=2e-3)
    model.reset_classifier(5)
    rs.steer(model, rank=8, train="head")
    rs.fit(model, new, steps=options.steps, lr=1e-2)

    test = DataLoader(digits(range(5, 10), "test"), batch_size=64)
    others = DataLoader(digits(range(5), "test"), batch_size=64)
    found = {
        "effort": rs.diagnostics.control_effort(model, test),  # ‖λH(z)‖ / ‖z‖, block by block
        "entropy": rs.diagnostics.attention_entropy(model, test),  # of the attention, against the frozen model's
        "drift": rs.diagnostics.drift(model, test, others),  # how far the stream moves, here and on other data
        "collapse": rs.diagnostics.neural_collapse(model, test),  # NC1 to NC4 of the features
    }
    options.out.mkdir(parents=True, exist_ok=True)
    for name, result in found.items():
        print(f"\n{result.table()}")
        result.plot().savefig(options.out / f"{name}.png")
    print(f"\nthe pictures are in {options.out}")


if __name__ == "__main__":
    main()
