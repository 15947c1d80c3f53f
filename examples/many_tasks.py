"""Serve many tasks in one batch from one frozen backbone, every row by the field of its own task: `make serve`.

A GPT-2, a Mamba and a ViT, those of compare_transformer_mamba.py, get a field for each of three tasks. The fields are
trained one by one and saved; then a fresh backbone loads them all. A row of a mixed batch gets what it would get in a
batch of its own, in scoring and in cached generation: anything else is an error.
"""

import argparse
import math
import time
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Subset, TensorDataset

import residual_steer as rs
from compare_transformer_mamba import CACHE, PLANS, pretrained
from residual_steer.data import ByteBlocks, digits, english_prose, python_source
from residual_steer.training import evaluate

ROWS, PROMPT, NEW = 16, 24, 32  # rows of a mixed batch, bytes that are read, bytes that are generated
TOLERANCE = 1e-5  # of the largest output: the same sums in another order


def tasks_of(name):
    """Return training and held-out data by task: three questions about the digits, or three kinds of text."""
    if name == "ViT":
        yes = {"odd": [1, 3, 5, 7, 9], "above-four": [5, 6, 7, 8, 9], "has-a-loop": [0, 6, 8, 9]}
        parts = [digits(split=split).tensors for split in ("train", "valid")]
        labels = {task: [torch.isin(y, torch.tensor(which)).long() for _, y in parts] for task, which in yes.items()}
        return {
            task: [TensorDataset(x, y) for (x, _), y in zip(parts, new, strict=True)] for task, new in labels.items()
        }
    source = python_source(100_000)
    backwards = b"\n".join(line[::-1] for line in source.split(b"\n"))
    texts = {"prose": english_prose()[:100_000], "capitals": source.upper(), "backwards": backwards}
    return {task: [ByteBlocks(text, 64, split) for split in ("train", "valid")] for task, text in texts.items()}


def backbone_of(name, options):
    """Return the frozen backbone; the ViT with a head for two classes."""
    torch.manual_seed(0)
    model = pretrained(name, options.cache, options.quick)
    if name == "ViT":
        model.reset_classifier(2)
    return model


@torch.no_grad()
def logits(model, inputs):
    """Return the logits of a batch."""
    output = model(inputs)
    return getattr(output, "logits", output)


@torch.no_grad()
def generated_logits(model, prompts):
    """Return the logits of every byte that cached, greedy generation adds, `(rows, new, 256)`."""
    how = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "use_cache": True, "output_logits": True}
    made = model.generate(prompts, attention_mask=torch.ones_like(prompts), return_dict_in_generate=True, **how)
    return torch.stack(made.logits, dim=1)


def check_rows(model, fields, inputs, run):
    """Run a mixed batch, then each field's rows alone; return the largest difference, and the ratio of the times."""
    started = time.perf_counter()
    with rs.use(model, fields):
        mixed = run(model, inputs)
    between, worst = time.perf_counter(), 0.0
    for field in dict.fromkeys(fields):
        rows = [row for row, own in enumerate(fields) if own == field]
        with rs.use(model, field):
            worst = max(worst, float((run(model, inputs[rows]) - mixed[rows]).abs().max() / mixed.abs().max()))
    if not worst <= TOLERANCE:
        raise rs.SteerError(f"rows of a mixed batch differ from separate runs by {worst:.1e} of the largest output.")
    return worst, (between - started) / (time.perf_counter() - between)


def serve(name, options):
    """Train, save, load and serve the fields of one backbone."""
    tasks, folders, images = tasks_of(name), [], name == "ViT"
    for task, (train, _) in tasks.items():
        model = backbone_of(name, options)
        rs.steer(model, rank=16, name=task, train=["head"] if images else [])
        batch, steps = (4, 4) if options.quick else PLANS[name][2:]
        rs.fit(model, DataLoader(train, batch, shuffle=True), steps=steps, lr=2e-2, seed=0)
        folders.append(rs.save(model, options.out / name.lower() / task))
    model = backbone_of(name, options)
    for folder in folders:
        rs.load(model, folder)
    print(f"\n{name}\n{rs.fields(model)}\n")
    for task, (_, valid) in tasks.items():
        for field in (None, *tasks):
            with rs.use(model, field):
                found = evaluate(model, DataLoader(Subset(valid, range(32)) if options.quick else valid, 64))
            score = f"{found['accuracy']:.1%} right" if images else f"{found['loss'] / math.log(2):.2f} bits per byte"
            print(f"{task:10} under {field or 'no field':10}: {score}", flush=True)
    fields = [[*tasks, None][row % 4] for row in range(ROWS)]  # None is the frozen model
    items = [tasks[field or next(iter(tasks))][1][row] for row, field in enumerate(fields)]
    inputs = torch.stack([item[0] if images else item["input_ids"] for item in items])
    runs = {"scoring": (inputs, logits), "cached generation": (inputs[:, :PROMPT], generated_logits)}
    for what, (given, run) in list(runs.items())[: 1 if images else 2]:
        worst, ratio = check_rows(model.eval(), fields, given, run)
        print(f"{what}: rows differ by {worst:.0e} at most; {ratio:.2f} of the time of one batch per field", flush=True)


def main(arguments=None):
    """Serve on every backbone."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/many_tasks"), help="folder for the fields")
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder of the pre-trained backbones")
    parser.add_argument("--quick", action="store_true", help="a few steps: a test, no result")
    options = parser.parse_args(arguments)
    for name in PLANS:
        serve(name, options)


if __name__ == "__main__":
    main()
