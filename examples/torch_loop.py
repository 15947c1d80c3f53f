"""A training loop of your own, with torch and nothing else: steer, optimise the fields' parameters, save.

    python examples/torch_loop.py

The model is written out here, so no library has to know it: `steer` finds the residual stream by itself.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import residual_steer as rs

WIDTH, LENGTH, TOKENS = 32, 8, 16


class Block(nn.Module):
    """A pre-norm Transformer block, `(batch, length, width)` to the same."""

    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, 4, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, z):
        """Add attention, then the feed-forward part, to the stream."""
        y = self.norm1(z)
        z = z + self.attention(y, y, y, need_weights=False)[0]
        return z + self.mlp(self.norm2(z))


class Counter(nn.Module):
    """Counts tokens of a kind, 0 to 3 of them: logits `(batch, 4)`."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(TOKENS, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, tokens):
        """Read tokens, `(batch, length)`."""
        z = self.embed(tokens)
        for block in self.blocks:
            z = block(z)
        return self.head(z.mean(1))


def batch():
    """Return rows of tokens, and how many in each are divisible by 4, 3 standing for more."""
    x = torch.randint(TOKENS, (64, LENGTH))
    return x, (x % 4 == 0).sum(1).clamp(max=3)


def main(arguments=None):
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300, help="of the optimizer")
    parser.add_argument("--out", type=Path, default=Path("runs/torch_loop"), help="folder of the saved field")
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    model = Counter()
    backbone = rs.find_backbone(
        model, example=batch()[0]
    )  # by which the stream of a model of your own is found and proven
    rs.steer(model, backbone, rank=8, train="head")
    print(rs.summary(model))
    optimizer = torch.optim.AdamW(rs.parameters(model), lr=1e-2)
    for step in range(options.steps):
        x, y = batch()
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 0 or step == options.steps - 1:
            print(f"step {step}: loss {loss:.3f}", flush=True)
    rs.save(model, options.out)


if __name__ == "__main__":
    main()
