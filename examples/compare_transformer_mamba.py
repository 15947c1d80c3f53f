"""Adapt a frozen Transformer, a frozen Mamba and a frozen ViT with the same call, beside full fine-tuning: `make demo`.

Small backbones are pre-trained on what every machine has, and kept in ~/.cache/residual-steer; no network, no GPU.
"""

import argparse
import math
import os
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from safetensors.torch import load_model, save_model
from tabulate import tabulate
from timm.models.vision_transformer import VisionTransformer
from torch.utils.data import DataLoader, Subset
from transformers import GPT2Config, GPT2LMHeadModel, MambaConfig, MambaForCausalLM

import residual_steer as rs
from residual_steer.data import ByteBlocks, digits, english_prose, python_source
from residual_steer.training import evaluate

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "residual-steer" / "demo"
# Steps, learning rate and batch of the pre-training, and steps of every method, whose rates another seed has chosen.
PLANS = {"GPT-2": (550, 4e-3, 16, 80), "Mamba": (400, 4e-3, 16, 80), "ViT": (300, 2e-3, 64, 100)}
RATES = {"new head alone": 5e-2, "H-Res": 2e-2, "full fine-tuning": 2e-3}


def build(name):
    """Return an untrained backbone: over bytes, or for grey images of 8 × 8 pixels and five classes."""
    torch.manual_seed(0)
    if name == "ViT":
        return VisionTransformer(8, 2, in_chans=1, num_classes=5, embed_dim=64, depth=4, num_heads=4)
    tokens = {"vocab_size": 256, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "use_cache": False}
    if name == "GPT-2":
        shape = {"n_embd": 128, "n_layer": 3, "n_head": 4, "n_positions": 64, "initializer_range": 0.1}
        return GPT2LMHeadModel(GPT2Config(embd_pdrop=0.0, resid_pdrop=0.0, attn_pdrop=0.0, **shape, **tokens))
    model = MambaForCausalLM(MambaConfig(hidden_size=128, num_hidden_layers=4, expand=1, state_size=4, **tokens))
    rs.find_backbone(model).prepare(model.backbone.layers)  # trains in linear time on a CPU too, as `steer` has it
    return model


def data_of(name, new, most=128):
    """Return training data and some that are held out, texts `most`, of the pre-training or of the new task."""
    if name == "ViT":
        return [digits(range(5, 10) if new else range(5), split) for split in ("train", "valid")]
    text = english_prose() if new else python_source(4_000_000)
    train, valid = (ByteBlocks(text, 64, split) for split in ("train", "valid"))
    return train, Subset(valid, range(0, len(valid), len(valid) // 128)[:most])


def pretrained(name, cache=CACHE, quick=False):
    """Return a backbone that knows Python's source, or the digits 0–4, from the cache or pre-trained now."""
    steps, rate, batch = (2, 1e-3, 4) if quick else PLANS[name][:3]
    path, model = Path(cache) / f"{name}-{steps}.safetensors", build(name)
    if not path.exists():
        print(f"{name}: pre-training, {steps} steps; kept in {path}", flush=True)
        loader = DataLoader(data_of(name, new=False)[0], batch, shuffle=True)
        rs.fit(model, loader, steps=steps, lr=rate, weight_decay=0.05, warmup=0.1, seed=0)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_model(model, f"{path}.partial")
        os.replace(f"{path}.partial", path)  # whole, or not at all
    load_model(model, path)  # also what was made just now: a first run computes what a later one does
    return model.eval()


def adapt(name, method, options):
    """Adapt a backbone by a method; return what it reaches after how many steps, and what that takes."""
    model, images = pretrained(name, options.cache, options.quick), name == "ViT"
    torch.manual_seed(options.seed)
    if images:
        model.reset_classifier(5)
    if method == "H-Res":
        rs.steer(model, rank=16, train=["head"] if images else [])
    elif method == "new head alone":
        model.requires_grad_(False).head.requires_grad_(True)
    batch, steps = (4, 4) if options.quick else PLANS[name][2:]
    train, valid = data_of(name, new=True, most=32 if options.quick else 128)
    train, valid = DataLoader(train, batch, shuffle=True, drop_last=True), DataLoader(valid, 4 * batch)
    metric = (lambda one: 100 * one["accuracy"]) if images else (lambda one: one["loss"] / math.log(2))
    curve = [] if images else [(0, metric(evaluate(model, valid)))]  # a new field changes nothing yet
    history = rs.fit(model, train, valid, steps=steps, lr=RATES[method], eval_every=-(-steps // 4), seed=options.seed)
    curve += [(one["step"], metric(one)) for one in history.valid]
    print(f"{name}, {method}: {curve[-1][1]:.3f}", flush=True)
    trains, total = (sum(p.numel() for p in model.parameters() if p.requires_grad or both) for both in (False, True))
    return {"curve": curve, "size": [f"{trains:,}", f"{trains / total:.1%}"], "step": f"{history.seconds_per_step:.3f}"}


def main(arguments=None):
    """Adapt every backbone by every method; print the table, and write it with the learning curves."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0, help="of new heads, new fields and the data's order")
    parser.add_argument("--out", type=Path, default=Path("runs/compare_transformer_mamba"), help="folder for results")
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder of the pre-trained backbones")
    parser.add_argument("--quick", action="store_true", help="a few steps: a test, no result")
    options = parser.parse_args(arguments)
    rows, (figure, panels) = [], plt.subplots(1, 3, figsize=(12.6, 3.8), layout="constrained")
    for panel, name in zip(panels, PLANS, strict=True):
        unit, digit = ("accuracy (%) ↑", 1) if name == "ViT" else ("bits per byte ↓", 3)
        found = {method: adapt(name, method, options) for method in RATES if name == "ViT" or "head" not in method}
        own, full = found["H-Res"], found["full fine-tuning"]
        before = found["new head alone"]["curve"][-1][1] if name == "ViT" else own["curve"][0][1]
        steered, tuned = own["curve"][-1][1], full["curve"][-1][1]
        cells = [f"{value:.{digit}f}" for value in (before, steered, tuned)]
        closed = f"{(steered - before) / ((tuned - before) or math.nan):.0%}"
        rows.append([name, unit, *own["size"], *cells, closed, own["step"], full["step"]])
        for method, one in found.items():
            panel.plot(*zip(*one["curve"], strict=True), "o-", color=f"C{list(RATES).index(method)}", label=method)
        panel.set(title=name, xlabel="optimizer steps", ylabel=unit)
        panel.legend()
    heads = "backbone,metric,trainable,share,before,H-Res,full,gap closed,s/step H-Res,s/step full"
    table = tabulate(rows, heads.split(","), "pipe", colalign=["left"] * 2 + ["right"] * 8, disable_numparse=True)
    print(f"\n{table}\n\nOn validation data, {options.out} has the curves. Before, for images: a new head alone.")
    options.out.mkdir(parents=True, exist_ok=True)
    options.out.joinpath("table.md").write_text(f"{table}\n", "utf-8")
    figure.savefig(options.out / "curves.png", dpi=150)


if __name__ == "__main__":
    main()
