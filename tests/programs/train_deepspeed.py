"""A step by DeepSpeed's engine on two processes, as far as a CPU goes; what was saved is the same before and after."""

import os
import sys

import pytest
import torch

import residual_steer as rs
from programs.fit_shards import data, made


def main(rank, folder, stage):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "GLOO_SOCKET_IFNAME": "lo"}
    os.environ |= {"DS_ACCELERATOR": "cpu", "MASTER_ADDR": "127.0.0.1", "ACCELERATE_USE_CPU": "true"}
    import deepspeed

    store = torch.distributed.FileStore(f"{folder}/store-{stage}", 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # which it would compile first
    deepspeed.init_distributed("gloo", dist_init_required=False)
    model = made("ddp", f"{folder}/base").module
    rs.save(model, f"{folder}/{stage}/fresh")
    options = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": stage}}
    options |= {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
    optimizer = torch.optim.SGD(rs.parameters(model), lr=0.0)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=options)
    batch = {key: value[2 * rank :][:2] for key, value in next(iter(data())).items()}
    engine.backward(engine(**batch).loss)
    engine.step()
    rs.save(engine, f"{folder}/{stage}/again")
    with pytest.raises(rs.SteerError, match="DeepSpeed takes the steps"):
        rs.fit(engine, data(), steps=1, progress=False)
    torch.distributed.destroy_process_group()


def both(folder, stage):
    torch.set_num_threads(1)
    child = os.fork()
    main(int(child == 0), folder, stage)
    if child == 0:
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
