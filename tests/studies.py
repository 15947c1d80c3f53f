"""A tiny ViT and what it is adapted to, for the tests of studies."""

import contextlib

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import DataLoader, Dataset

from cases import CASES
from experiments.problem import Arm, Problem
from residual_steer.training import evaluate

TABLE = {case.name: case for case in CASES}
STEPS, BATCH = 3, 4
HRES = Arm("H-Res", "hres", (1e-3, 1e-2, 1e-1), {"rank": 2})
LORA = Arm("LoRA", "lora", (1e-3, 1e-2), {"rank": 2})
LINEAR = Arm("head alone", "linear", (1e-2,))
PROMPT = Arm("prompt", "prompt", (1e-3, 1e-2), {"length": 2})  # for text alone
DIVERGES = 3e37  # with `fragile`


def fragile():
    """Return what makes a problem whose parameters overflow in the first step with such a rate."""

    def large(seed):
        model = fresh(seed)
        with torch.no_grad():
            model.head.weight.mul_(1e4)
        return model

    return {"fresh": large, "fit": {"weight_decay": 1.0}}


class Images(Dataset):
    """Labelled images, which remember in what order they were asked for."""

    def __init__(self, rows=16, seed=0, spoilt=False):
        generator = torch.Generator().manual_seed(seed)
        self.x = torch.randn(rows, 3, 16, 16, generator=generator)
        self.y = torch.randint(3, (rows,), generator=generator)
        self.x += 2 * torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(9))[self.y]
        if spoilt:
            self.x *= torch.nan
        self.asked = []

    def __len__(self):
        return len(self.y)

    def __getitem__(self, index):
        self.asked.append(index)
        return self.x[index], self.y[index]


def fresh(seed):
    model = TABLE["timm-vit"].build()
    torch.manual_seed(seed)
    model.head.reset_parameters()
    return model


def measured_on_images(model, split, seed):
    data = Images(8, seed=100 + 10 * seed + (split == "test"))
    return evaluate(model, DataLoader(data, batch_size=8))


def distance(model, split, seed):
    """Return how far the head has moved: the larger the rate, the farther; on test data the other way round."""
    moved = float((model.head.weight.detach() - fresh(seed).head.weight).abs().sum())
    return {"far": moved if split == "valid" else -moved}


def problem_of(**more):
    given = {
        "name": "images",
        "fresh": fresh,
        "train": lambda seed: DataLoader(Images(seed=seed), batch_size=BATCH, shuffle=True),
        "score": measured_on_images,
        "metric": "loss",
        "better": "down",
        "steps": STEPS,
        "identity": {"rows": 16},
        "train_also": ("head",),
    }
    return Problem(**{**given, **more})


def scores_of(entries):
    """Return all that a study found but times."""
    return [[(run.rate, run.seed, run.valid, run.test, run.merged) for run in entry.every] for entry in entries]


@contextlib.contextmanager
def counted_steps():
    """Count the steps of all optimizers: a list with a one for each."""
    steps = []
    handle = register_optimizer_step_post_hook(lambda *_: steps.append(1))
    try:
        yield steps
    finally:
        handle.remove()
