"""Runs of `fit` by two processes, under everything that shards a model or copies it; each is stopped and resumed, too.

FOLDER/base is a model of transformers; `resume` goes on with what was killed.
"""

import json
import os
import signal
import warnings
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.utils.data import DataLoader, TensorDataset
from transformers import LlamaForCausalLM

import residual_steer as rs
from residual_steer.training import next_token_loss

OPTIONS = {"steps": 6, "lr": 1e-2, "clip": 0.05, "accumulate": 2, "log_every": 1, "checkpoint_every": 3}


def collate(rows):
    ids = torch.stack([row[0] for row in rows])
    return {"input_ids": ids, "labels": ids}


def data():
    generator = torch.Generator().manual_seed(1)
    return DataLoader(
        TensorDataset(torch.randint(0, 24, (10, 12), generator=generator)), 4, shuffle=True, collate_fn=collate
    )


def made(how, base):
    """Return a steered model, wrapped; every process begins with another seed."""
    torch.manual_seed(5 + (torch.distributed.get_rank() if torch.distributed.is_initialized() else 0))
    options = {}
    if how == "tp":
        options = {"tp_plan": "auto", "device_mesh": init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))}
    model = LlamaForCausalLM.from_pretrained(base, **options)
    rs.steer(model, rank=4, layers=[1] if "cache" in how else None)
    if how == "fsdp2":
        mesh = init_device_mesh("cpu", (2,))
        for block in model.model.layers:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    elif how == "fsdp1":
        policy = ModuleWrapPolicy({type(model.model.layers[0])})
        options = {"auto_wrap_policy": policy, "device_id": torch.device("cpu"), "use_orig_params": True}
        return FullyShardedDataParallel(model, **options)
    elif how == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    return model


class Stop(Exception):
    pass


def stopping(after, stop):
    calls = []

    def loss(model, batch):
        calls.append(1)
        if len(calls) > after:
            stop()
        return next_token_loss(model, batch)

    loss.weight = lambda batch: int((batch["labels"][:, 1:] != -100).sum())
    return loss


def raising():
    raise Stop


def run(model, folder, stop=None, **options):
    """Train; return the losses and norms of six steps, none if the run was stopped in its fifth."""
    loss = stopping(8 if stop else 99, stop)
    try:
        history = rs.fit(model, data(), save_to=folder, loss=loss, resume=True, progress=False, **OPTIONS, **options)
    except Stop:
        return None
    return [[record["loss"], record["grad_norm"]] for record in history.train] + ([history.cache] if options else [])


def every(how, folder):
    model = made(how, folder / "base")
    rs.save(model, folder / how / "fresh")
    records = run(model, folder / how / "run", **({"cache_prefix": True} if how == "cache" else {}))
    rs.save(model, folder / how / "trained")
    if how == "fsdp2":  # as Trainer saves: gathered on all, written by the first alone
        gathered = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        if torch.distributed.get_rank() == 0:
            model.save_pretrained(folder / how / "whole", state_dict=gathered)
    stopped = made(how, folder / "base")
    assert run(stopped, folder / how / "stopped", raising) is None
    resumed = run(made(how, folder / "base"), folder / how / "stopped")
    for (loss, _), (again, _) in zip(records[3:6], resumed[-3:], strict=True):
        assert loss == again or (how == "cache" and abs(loss - again) < 1e-4)
    return records


def refused(folder):
    """Words for what cannot be: a part that is sharded, processes that are not all there, a folder in the way."""
    model = made("whole", folder / "base")
    for block in model.model.layers[:1]:
        fully_shard(block, mesh=init_device_mesh("cpu", (2,)))
    found = {}
    (folder / "file").write_text("in the way")
    sharded, flat = made("fsdp2", folder / "base"), made("fsdp1", folder / "base")
    for name, act in {
        "part": lambda: run(model, folder / "refused"),
        "inner": lambda: rs.save(flat.module, folder / "refused"),
        "way": lambda: rs.save(sharded, folder / "file" / "in"),
        "cached": lambda: run(sharded, folder / "refused", cache_prefix=True),
        "wrapped": lambda: rs.steer(sharded, name="more"),
    }.items():
        try:
            act()
        except rs.SteerError as error:
            found[name] = str(error)
    return found


def main(rank, folder, resume):
    warnings.simplefilter("ignore")
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"ACCELERATE_USE_CPU": "true", "GLOO_SOCKET_IFNAME": "lo"}
    store = torch.distributed.FileStore(str(folder / ("store2" if resume else "store")), 2)
    late = timedelta(seconds=120)  # so that who waits in vain says where
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=late)
    killed = folder / "fsdp2" / "killed"
    if resume:
        model = made("fsdp2", folder / "base")
        found = {"killed": run(model, killed)}
        rs.save(model, folder / "fsdp2" / "again")
    else:
        found = {how: every(how, folder) for how in ("ddp", "fsdp2", "fsdp1", "tp", "cache")}
        found["refused"] = refused(folder)
    if rank == 0:
        (folder / "found.json").write_text(json.dumps(found))
    if not resume:
        torch.distributed.barrier()
        run(made("fsdp2", folder / "base"), killed, partial(os.kill, os.getpid(), signal.SIGKILL))
    torch.distributed.destroy_process_group()


def both(folder, resume=False):
    """Run it as two processes, this one and a copy."""
    torch.set_num_threads(1)
    child = os.fork()
    main(int(child == 0), Path(folder), resume)
    if child == 0:
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
