"""A field trained by Lightning: steer inside the module, optimise the fields' parameters, save them alone.

Run it: python examples/integrations/train_with_lightning.py
"""

import sys

import lightning
import torch
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel

import residual_steer as rs


class Steered(lightning.LightningModule):  # noqa: D101
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=32, n_head=2, n_positions=16, vocab_size=64))
        rs.steer(self.model, rank=4)

    def training_step(self, ids):  # noqa: D102
        return self.model(input_ids=ids, labels=ids).loss

    def configure_optimizers(self):  # noqa: D102
        return torch.optim.AdamW(rs.parameters(self.model), lr=0.02)


def main(folder="runs/lightning"):
    """Train and save; return the model."""
    module, texts = Steered(), torch.arange(24 * 8).reshape(24, 8) % 64
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    lightning.Trainer(max_steps=6, **quiet).fit(module, DataLoader(texts, 4))
    return rs.save(module.model, folder) and module.model


if __name__ == "__main__":
    print(rs.summary(main(*sys.argv[1:])))
