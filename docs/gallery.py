"""Draw the pictures of the gallery, one for each diagnostic: `make gallery`, a minute on one core.

A small ViT learns the digits 0–4 and is steered to 5–9, beside LoRA; a small Mamba of bytes is steered to a sentence.
"""

import copy
from pathlib import Path

import matplotlib as mpl
import torch
from timm.models.vision_transformer import VisionTransformer
from torch.utils.data import DataLoader
from transformers import MambaConfig, MambaForCausalLM

import residual_steer as rs
from residual_steer import diagnostics
from residual_steer.data import ByteBlocks, digits

OUT = Path(__file__).parent / "pictures" / "gallery"
STEPS = 150


def adapted(base, loader, method, **options):
    """Return a copy that was adapted by a method, and its collapse on the way."""
    model, found = rs.baselines.apply(copy.deepcopy(base), method, train="head", **options), {}
    for step in (20, 50, STEPS):
        rs.fit(model, loader, steps=step - max(found, default=0), lr=1e-2, progress=False)
        found[step] = diagnostics.neural_collapse(model, loader)
    return model, found


def results():
    """Yield the name of every picture, and its result."""
    torch.manual_seed(0)
    base = VisionTransformer(8, 2, in_chans=1, num_classes=5, embed_dim=64, depth=4, num_heads=4)
    old, new = (DataLoader(digits(which), batch_size=64, shuffle=True) for which in (range(5), range(5, 10)))
    rs.fit(base, old, steps=STEPS, lr=2e-3, progress=False)
    base.reset_classifier(5)
    (model, found), (lora, _) = (adapted(base, new, method, rank=8) for method in ("hres", "lora"))
    yield "control_effort", diagnostics.control_effort(model, new)
    yield "attention_entropy", diagnostics.attention_entropy(model, new)
    yield "stream_energy", diagnostics.stream_energy(model, new)
    yield "drift", diagnostics.drift(model, new, old)
    yield "neural_collapse", found[STEPS]
    yield "collapse_over_training", diagnostics.collapse_over_training(found)
    yield "displacement", diagnostics.displacement({"H-Res": model, "LoRA": lora}, new, reference=base)
    yield "landscape", diagnostics.landscape(model, new, size=11)
    yield "plane", diagnostics.plane(model, new)
    tokens = {"vocab_size": 256, "bos_token_id": 0, "eos_token_id": 0}
    mamba = MambaForCausalLM(MambaConfig(hidden_size=48, num_hidden_layers=3, state_size=8, **tokens))
    text = DataLoader(ByteBlocks(b"A river meets a stone; the stone steers the river. " * 20, 32), batch_size=8)
    rs.fit(rs.steer(mamba, rank=8), text, steps=30, lr=2e-2, progress=False)
    yield "memory_length", diagnostics.memory_length(mamba, text)


if __name__ == "__main__":
    mpl.use("agg")
    OUT.mkdir(parents=True, exist_ok=True)
    for name, result in results():
        result.plot().savefig(OUT / f"{name}.png", dpi=80, bbox_inches="tight")
        print(f"{name}\n{result.table()}\n")
