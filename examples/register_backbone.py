"""Register a backbone of your own: a small S4D classifier, written out, and the ten lines that let it be steered.

    python examples/register_s4d.py

S4D is the diagonal state-space model of Gu et al. 2022 (arXiv 2206.11893). A small one learns the digits 0-4 here, read
pixel by pixel, 64 steps a digit. Then it is frozen and adapted to the digits 5-9, three times with the same number of
steps: by a new head alone, by the head and steering fields, and in full. No download, no GPU, under two minutes.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

import residual_steer as rs
from residual_steer.data import digits
from residual_steer.training import evaluate


class S4D(nn.Module):
    """A state-space model per channel, x'(t) = A·x(t) + B·u(t), y(t) = Re(C·x(t)) + D·u(t), with a diagonal A.

    Args:
        width: channels, each with a system of its own.
        states: complex states per channel; each stands for itself and its conjugate.
    """

    def __init__(self, width: int, states: int = 16) -> None:
        super().__init__()
        # S4D-Lin: A_n = -1/2 + iπn. The real part is kept as a logarithm, so that the system stays stable; B is 1.
        self.log_decay = nn.Parameter(torch.full((width, states), math.log(0.5)))
        self.frequency = nn.Parameter(math.pi * torch.arange(states).repeat(width, 1).float())
        self.log_step = nn.Parameter(torch.empty(width, 1).uniform_(math.log(1e-3), math.log(1e-1)))
        self.C = nn.Parameter(torch.randn(width, states, 2) * 0.5**0.5)  # real and imaginary parts
        self.D = nn.Parameter(torch.randn(width))

    def system(self) -> tuple[Tensor, Tensor]:
        """Return Ā and C·B̄, `(width, states)`, of the recurrence that a zero-order hold of the input gives."""
        a = torch.complex(-self.log_decay.exp(), self.frequency)
        transition = torch.exp(a * self.log_step.exp())
        return transition, torch.view_as_complex(self.C) * (transition - 1) / a

    def kernel(self, length: int) -> Tensor:
        """Return K_l = 2·Re(Σ_n C_n·B̄_n·Ā_n^l), the answer to an impulse, `(width, length)`."""
        transition, read = self.system()
        powers = transition.unsqueeze(-1) ** torch.arange(length, device=read.device)  # (width, states, length)
        return 2 * torch.einsum("dn,dnl->dl", read, powers).real

    def forward(self, u: Tensor) -> Tensor:
        """Convolve u, `(batch, length, width)`, with the kernel: y_k = Σ_{l ≤ k} K_l·u_{k-l} + D·u_k, by FFT."""
        length = u.shape[1]
        padded = 2 * length  # or the end would wrap around to the beginning
        spectrum = torch.fft.rfft(u, padded, dim=1) * torch.fft.rfft(self.kernel(length), padded).t()
        return torch.fft.irfft(spectrum, padded, dim=1)[:, :length] + self.D * u


class Block(nn.Module):
    """One residual block: z + W·GELU(S4D(norm(z)))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.s4d = S4D(width)
        self.out = nn.Linear(width, width)

    def forward(self, z: Tensor) -> Tensor:
        """Map the stream to the stream, `(batch, length, width)`."""
        return z + self.out(F.gelu(self.s4d(self.norm(z))))


class S4DClassifier(nn.Module):
    """Read a sequence of numbers, and say which class it is of."""

    def __init__(self, width: int = 32, depth: int = 3, classes: int = 5) -> None:
        super().__init__()
        self.width = width
        self.embed = nn.Linear(1, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits `(batch, classes)` of images `(batch, 1, 8, 8)`, which are read row by row as 64 steps."""
        z = self.embed(images.flatten(1).unsqueeze(-1))
        for block in self.blocks:
            z = block(z)
        return self.head(self.norm(z.mean(1)))


# All that steering has to know: where the blocks are, how wide their stream is, and which part of a block mixes time.
# `matches` names the class by its package, or its module; `rs.steer` finds it in whatever is wrapped around it.
@rs.register_backbone("s4d", matches=[f"{S4DClassifier.__module__}.S4DClassifier"])
def s4d(model: nn.Module) -> rs.Backbone:
    """Describe an S4DClassifier."""
    return rs.Backbone(blocks=model.blocks, width=model.width, mixer="s4d")


def loaders(classes: range, held_out: str) -> tuple[DataLoader, DataLoader]:
    """Return loaders of training images, shuffled, and of those that are held out."""
    train, valid = digits(classes), digits(classes, held_out)
    return DataLoader(train, batch_size=32, shuffle=True), DataLoader(valid, batch_size=256)


def pretrain(steps: int) -> S4DClassifier:
    """Return a model that has learned the digits 0-4."""
    model = S4DClassifier()
    rs.fit(model, *loaders(range(5), "valid"), steps=steps, lr=5e-3)
    return model


def head_alone(model: S4DClassifier) -> None:
    """Train the head, and nothing else."""
    model.requires_grad_(False)
    model.head.requires_grad_(True)


def steered(model: S4DClassifier) -> None:
    """Train the head with a field beside every block; everything else is frozen."""
    rs.steer(model, rank=8, train="head")


def in_full(model: S4DClassifier) -> None:
    """Train everything."""
    model.requires_grad_(True)


# The learning rate of each was picked on the validation split of the digits 5-9; what is printed is of the test split.
METHODS: dict[str, tuple[Callable[[S4DClassifier], None], float]] = {
    "new head alone": (head_alone, 1e-1),
    "steered": (steered, 2e-2),
    "in full": (in_full, 5e-2),
}


def adapt(pretrained: S4DClassifier, name: str, steps: int, held_out: str = "test") -> tuple[float, int]:
    """Adapt a copy, with a new head, to the digits 5-9; return its accuracy in %, and how many parameters trained."""
    torch.manual_seed(0)
    model = copy.deepcopy(pretrained)
    model.head.reset_parameters()
    prepare, rate = METHODS[name]
    prepare(model)
    train, test = loaders(range(5, 10), held_out)
    rs.fit(model, train, steps=steps, lr=rate)
    return 100 * evaluate(model, test)["accuracy"], sum(p.numel() for p in model.parameters() if p.requires_grad)


def main(arguments: list[str] | None = None) -> int:
    """Pre-train, adapt with every method, and print the accuracies; return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps, of pre-training and of each method")
    steps = parser.parse_args(arguments).steps
    torch.set_num_threads(1)  # these tensors are too small for a second one to pay
    torch.manual_seed(0)
    pretrained = pretrain(steps)
    print(f"\n{rs.find_backbone(pretrained)}\n")
    before = 100 * evaluate(pretrained, loaders(range(5), "test")[1])["accuracy"]
    print(f"the digits 0-4, which it was trained on:      {before:5.1f} %\n\nthe digits 5-9")
    for name in METHODS:
        accuracy, trained = adapt(pretrained, name, steps)
        print(f"  {name:15} {trained:6,} parameters trained: {accuracy:5.1f} %", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
