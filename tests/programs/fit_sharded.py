"""A run of `fit` on models that FSDP2 has sharded, or on the whole ones; saved, resumed, and measured at the end.

Usage: fit_sharded.py FOLDER; below it every run has a folder, `whole` and, by the number of processes, `1` and `2`.
"""

import json
import os
import socket
import sys

import torch
from fit_two import collate
from forks import ended, fork
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset

import residual_steer as rs
from cases import CASES
from residual_steer.training import next_token_loss


def main(folder: str, sharded: bool) -> None:
    torch.set_num_threads(1)
    found = {}
    for name in ("gpt2", "mamba", "timm-vit"):
        case = next(case for case in CASES if case.name == name)
        model = case.build()
        torch.manual_seed(0)
        rs.steer(model, rank=4)
        if name == "timm-vit":
            data = TensorDataset(torch.randn(10, 3, 16, 16), torch.arange(10) % 3)
            loader = DataLoader(data, 4)
        else:
            loader = DataLoader(TensorDataset(torch.randint(0, 20, (10, 12))), 4, collate_fn=collate)
        if sharded:
            mesh = init_device_mesh("cpu", (int(os.environ["WORLD_SIZE"]),))
            for block in rs.find_backbone(model).blocks:
                fully_shard(block, mesh=mesh)
            fully_shard(model, mesh=mesh)
        records = []
        for steps in (3, 6):  # the second run goes on with the checkpoint of the first
            options = {"steps": 6, "lr": 1e-2, "clip": 0.05, "accumulate": 2, "log_every": 1, "checkpoint_every": 3}

            class Stop(Exception):
                pass

            calls = []

            def loss(model, batch, calls=calls, steps=steps, stop=Stop):
                calls.append(1)
                if len(calls) > 2 * steps:
                    raise stop
                if isinstance(batch, dict):
                    return next_token_loss(model, batch)
                return torch.nn.functional.cross_entropy(model(batch[0]), batch[1])

            loss.weight = lambda batch: (
                (batch["labels"][:, 1:] != -100).sum() if isinstance(batch, dict) else len(batch[1])
            )
            try:
                history = rs.fit(
                    model, loader, loader, loss=loss, save_to=f"{folder}/{name}", resume=True, progress=False, **options
                )
                records = [[r["step"], r["loss"], r["grad_norm"]] for r in history.train]
                records += [[r["step"], r["loss"], 0.0] for r in history.valid]
            except Stop:
                with torch.no_grad():
                    for parameter in rs.parameters(model):
                        parameter.fill_(7.0)  # what comes back comes from the checkpoint
        assert all(p.grad is None or not p.grad.isnan().any() for p in model.parameters())
        found[name] = records
    if int(os.environ.get("RANK", 0)) == 0:
        with open(f"{folder}/found.json", "w") as file:
            json.dump(found, file)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def start(folder: str, processes: int) -> list[int]:
    """Start a run, as torchrun would: of so many processes, or of one that is told nothing of others."""
    if not processes:
        return [fork(main, folder, False)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    size, place = {"WORLD_SIZE": str(processes)}, {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
    return [fork(main, folder, True, **size, **place, **rank) for rank in ranks]


if __name__ == "__main__":
    for name, processes in (("whole", 0), ("1", 1), ("2", 2)):
        os.mkdir(f"{sys.argv[1]}/{name}")
        statuses = [ended(child) for child in start(f"{sys.argv[1]}/{name}", processes)]
        if any(statuses):
            sys.exit(f"{name}: {statuses}")
