"""A steered model sharded by FSDP2: steer first, shard after, fit and save on every process.

Run it: ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2 examples/integrations/train_with_fsdp2.py
"""

import sys

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

import residual_steer as rs

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


def main(folder="runs/fsdp2"):
    """Train and save; return the losses."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.distributed.init_process_group("nccl" if device == "cuda" else "gloo")
    mesh = init_device_mesh(device, (torch.distributed.get_world_size(),))
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **SIZES))
    rs.steer(model, rank=4)  # begins alike on all processes
    for block in model.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    texts = torch.arange(24 * 8).reshape(6, 4, 8) % 64
    batches = [{"input_ids": ids, "labels": ids} for ids in texts]  # of all processes: fit splits them
    history = rs.fit(model, batches, steps=24, lr=0.02, log_every=1, progress=False)
    rs.save(model, folder)  # gathers the field, and no more; the first process writes
    torch.distributed.destroy_process_group()
    return [record["loss"] for record in history.train]


if __name__ == "__main__":
    print(main(*sys.argv[1:]))
