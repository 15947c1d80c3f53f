"""A run of `fit` that a test kills and resumes: chance in data and model, and a checkpoint after every step."""

import random
import time

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import residual_steer as rs


class Noisy(Dataset):
    """Rows whose every reading is augmented by chance."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(5)
        self.x = torch.randn(40, 8, 16, generator=generator)
        self.y = torch.randint(0, 3, (40,), generator=generator)

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.x[index] + 0.1 * torch.randn(8, 16), self.y[index]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Linear(16, 16)
        self.dropout = nn.Dropout(0.2)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return z + self.dropout(torch.tanh(self.mlp(z)))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.norm = nn.BatchNorm1d(16)
        self.head = nn.Linear(16, 3)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            z = block(z)
        return self.head(self.norm(z.mean(1)))


@rs.register_backbone("net", matches=[f"{__name__}.Net"])
def net(model: nn.Module) -> rs.Backbone:
    return rs.Backbone(blocks=model.blocks, width=16, mlp="mlp")


def main(folder: str, steps: int) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = rs.steer(Net(), rank=4, dropout=0.1, train=["head", "norm"])

    def slow_loss(model: nn.Module, batch: list[torch.Tensor]) -> torch.Tensor:
        time.sleep(0.01)  # so that a killer can aim
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    rs.fit(
        model,
        DataLoader(Noisy(), 8, shuffle=True),
        DataLoader(Noisy(), 8),
        steps=steps,
        lr=1e-2,
        loss=slow_loss,
        save_to=folder,
        resume=True,
        checkpoint_every=1,
        eval_every=3,
        log_every=1,
        progress=False,
    )
    rs.save(model, f"{folder}/final")


def apart(folder: str, steps: int) -> None:
    random.seed()  # as in a process that has nothing of this one
    np.random.seed()
    main(folder, steps)
