"""Runs of `fit` on models that FSDP2 has sharded, and on the whole ones; saved, resumed, and measured at the end."""

import json
import os

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset

import residual_steer as rs
from cases import TABLE
from programs.fit_two import collate
from programs.forks import ended, fork, torchrun
from residual_steer.training import next_token_loss


def main(folder: str, sharded: bool) -> None:
    torch.set_num_threads(1)
    found = {}
    for name in ("gpt2", "mamba", "timm-vit"):
        model = TABLE[name].build()
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


def every(folder: str) -> None:
    """Run it as one process that is told nothing of others, as the only one of a group, and as two."""
    for name, processes in (("whole", 0), ("1", 1), ("2", 2)):
        place = f"{folder}/{name}"
        os.mkdir(place)
        statuses = torchrun(processes, main, place, True) if processes else [ended(fork(main, place, False))]
        assert not any(statuses), f"{name}: {statuses}"
