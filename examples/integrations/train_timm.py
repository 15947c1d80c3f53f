"""A timm model with a field and a new head, in a loop of one's own.

Run it: python examples/integrations/train_timm.py
"""

import sys

import timm
import torch
import torch.nn.functional as F

import residual_steer as rs


def main(folder="runs/timm"):
    """Train, save, and load on a fresh backbone; return both models."""
    torch.manual_seed(0)
    images, labels = torch.randn(4, 3, 160, 160), torch.arange(4)
    model = timm.create_model("test_vit", num_classes=4)
    fresh = timm.create_model("test_vit", num_classes=4)
    fresh.load_state_dict(model.state_dict())
    rs.steer(model, rank=4, train="head")
    optimizer = torch.optim.AdamW(rs.parameters(model), lr=0.01)
    for _ in range(3):
        loss = F.cross_entropy(model.train()(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    rs.save(model, folder)
    return model, rs.load(fresh, folder)


if __name__ == "__main__":
    print(rs.summary(main(*sys.argv[1:])[1]))
