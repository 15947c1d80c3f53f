"""Register a backbone of your own: a small S4D classifier, written out, and the four lines that let it be steered.

S4D is the diagonal state-space model of Gu et al. 2022 (arXiv 2206.11893). A small one learns the digits 0-4 here, read
pixel by pixel, 64 steps a digit. Then it is frozen and adapted to the digits 5-9 for as many steps by a new head alone,
by the head and steering fields, and in full. No download, no GPU, under two minutes.
"""

import argparse
import copy
import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

import residual_steer as rs
from residual_steer.data import digits
from residual_steer.training import evaluate

TASKS = (range(5), range(5, 10))
RATES = {"new head alone": 1e-1, "steered": 2e-2, "in full": 5e-2}  # each picked on validation data


class S4D(nn.Module):
    """For each of `width` channels x'(t) = A·x(t) + B·u(t), y(t) = Re(C·x(t)) + D·u(t), with a diagonal complex A."""

    def __init__(self, width, states=16):
        super().__init__()
        # S4D-Lin: A_n = -1/2 + iπn. The real part is kept as a logarithm, so that the system stays stable; B is 1.
        self.log_decay = nn.Parameter(torch.full((width, states), math.log(0.5)))
        self.frequency = nn.Parameter(math.pi * torch.arange(states).repeat(width, 1).float())
        self.log_step = nn.Parameter(torch.empty(width, 1).uniform_(math.log(1e-3), math.log(1e-1)))
        self.C = nn.Parameter(torch.randn(width, states, 2) * 0.5**0.5)  # real and imaginary parts
        self.D = nn.Parameter(torch.randn(width))

    def kernel(self, length):
        """Return K_l = 2·Re(Σ_n C_n·B̄_n·Ā_n^l) of a zero-order hold of the input, `(width, length)`."""
        a = torch.complex(-self.log_decay.exp(), self.frequency)
        transition = torch.exp(a * self.log_step.exp())
        read = torch.view_as_complex(self.C) * (transition - 1) / a
        powers = transition.unsqueeze(-1) ** torch.arange(length, device=read.device)  # (width, states, length)
        return 2 * torch.einsum("dn,dnl->dl", read, powers).real

    def forward(self, u):
        """Convolve u, `(batch, length, width)`, with the kernel: y_k = Σ_{l ≤ k} K_l·u_{k-l} + D·u_k, by FFT."""
        length = u.shape[1]
        padded = 2 * length  # or the end would wrap around to the beginning
        spectrum = torch.fft.rfft(u, padded, dim=1) * torch.fft.rfft(self.kernel(length), padded).t()
        return torch.fft.irfft(spectrum, padded, dim=1)[:, :length] + self.D * u


class Block(nn.Module):
    """One residual block: z + W·GELU(S4D(norm(z)))."""

    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.s4d = S4D(width)
        self.out = nn.Linear(width, width)

    def forward(self, z):
        """Map the stream to the stream, `(batch, length, width)`."""
        return z + self.out(F.gelu(self.s4d(self.norm(z))))


class S4DClassifier(nn.Module):
    """Read a sequence of numbers, and say which class it is of."""

    def __init__(self, width=32, depth=3, classes=5):
        super().__init__()
        self.width = width
        self.embed = nn.Linear(1, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, images):
        """Return logits `(batch, classes)` of images `(batch, 1, 8, 8)`, which are read row by row as 64 steps."""
        z = self.embed(images.flatten(1).unsqueeze(-1))
        for block in self.blocks:
            z = block(z)
        return self.head(self.norm(z.mean(1)))


# All that steering has to know: where the blocks are, how wide their stream is, and which part of a block mixes time.
# `matches` names the class by its package, or its module; `rs.steer` finds it in whatever is wrapped around it.
@rs.register_backbone("s4d", matches=[f"{S4DClassifier.__module__}.S4DClassifier"])
def s4d(model):
    """Describe an S4DClassifier."""
    return rs.Backbone(blocks=model.blocks, width=model.width, mixer="s4d")


def main(arguments=None):
    """Pre-train on the digits 0–4, adapt to 5–9 by every method, and print the accuracies."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps, of pre-training and of each method")
    steps = parser.parse_args(arguments).steps
    old, new = ([DataLoader(digits(c, s), 32, shuffle=s == "train") for s in ("train", "test")] for c in TASKS)
    torch.manual_seed(0)
    pretrained = S4DClassifier()
    rs.fit(pretrained, old[0], steps=steps, lr=5e-3)
    print(f"\n{rs.find_backbone(pretrained)}\n")
    print(f"the digits 0-4, which it was trained on: {evaluate(pretrained, old[1])['accuracy']:.1%}\nthe digits 5-9")
    for method, rate in RATES.items():
        torch.manual_seed(0)
        model = copy.deepcopy(pretrained)
        model.head.reset_parameters()
        if method == "steered":
            rs.steer(model, rank=8, train="head")
        elif method == "new head alone":
            model.requires_grad_(False).head.requires_grad_(True)
        rs.fit(model, new[0], steps=steps, lr=rate)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        accuracy = evaluate(model, new[1])["accuracy"]
        print(f"  {method:15} {trained:6,} parameters trained: {accuracy:.1%}", flush=True)


if __name__ == "__main__":
    main()
