"""A run of `fit` that is the same on any number of processes: no dropout, shuffled data and evaluation, accumulation.

The texts are of many lengths, so that every process has other labels that count, some none; the last batch has one row.
"""

import torch
from torch.utils.data import DataLoader, TensorDataset
from transformers import GPT2Config, GPT2LMHeadModel

import residual_steer as rs
from programs.forks import torchrun


def collate(rows: list[tuple[torch.Tensor]]) -> dict[str, torch.Tensor]:
    ids = torch.stack([row[0] for row in rows])
    return {"input_ids": ids, "labels": ids.masked_fill(torch.arange(12) >= ids[:, :1] % 13, -100)}


def main(folder: str) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    config = GPT2Config(
        n_layer=2, n_embd=16, n_head=2, n_positions=12, vocab_size=20, bos_token_id=0, eos_token_id=0,
        resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
    )  # fmt: skip
    model = rs.steer(GPT2LMHeadModel(config), rank=4)
    data = TensorDataset(torch.randint(0, 20, (41, 12)))
    train = DataLoader(data, 8, shuffle=True, collate_fn=collate)
    rows = TensorDataset(torch.randint(0, 20, (19, 12)))
    valid = DataLoader(rows, 6, shuffle=True, collate_fn=collate)  # does not divide evenly
    rs.fit(
        model,
        train,
        valid,
        steps=8,
        lr=1e-2,
        accumulate=2,
        save_to=folder,
        eval_every=4,
        log_every=1,
        progress=False,
        trackers=["tensorboard"],
    )
    if torch.distributed.is_initialized():
        torch.distributed.barrier()  # whoever fits goes on with the same processes
        torch.distributed.destroy_process_group()


def two(folder: str) -> None:
    statuses = torchrun(2, main, folder)
    assert not any(statuses), statuses
