"""What it costs, and what it saves, that fields act on the prompt alone (after arXiv 2605.14217).

    python benchmarks/prompt_only.py --jobs 2

Accuracy: a small GPT-2 learns to copy a string of letters, and is frozen. Then a field learns another answer to the
same prompts, the string reversed or every letter's successor: once it acts on all tokens, once on the prompt alone,
with the same seeds, steps and learning rates, of which the best on validation strings counts. What is counted are the
letters of the answer to held-out strings, generated greedily with a cache.

Time: one cached step of decoding on GPT-2-small's shape, frozen, under a field on all tokens, and under one that acted
on the prompt alone, in interleaved rounds.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import residual_steer as rs
from options import add_device, parser_of, read
from output import exit_status, markdown, save_json
from rounds import Rounds, Variant, play
from shapes import SHAPES

LETTERS, LENGTH, SEPARATOR = 12, 6, 12
TASKS = {"reversed": lambda text: text.flip(1), "successors": lambda text: (text + 1) % LETTERS}
ACTING = ("all", "prompt")
SIZE = {"vocab_size": LETTERS + 1, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 2 * LENGTH + 1}
BATCH, STRINGS, BASE_RATE = 32, 512, 3e-3


@dataclass(frozen=True)
class Cell:
    """A field that is trained: its task, on which tokens it acts, its learning rate and seed."""

    task: str
    on: str
    rate: float
    seed: int


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; return the exit status."""
    parser = parser_of(__doc__, 30)
    add_device(parser)
    parser.add_argument("--base-steps", type=int, default=1500, help="of learning to copy")
    parser.add_argument("--steps", type=int, default=2000, help="of each field")
    parser.add_argument("--rates", type=float, nargs="+", default=(3e-3, 1e-2, 3e-2), help="learning rates")
    parser.add_argument("--seeds", type=int, default=3, help="number of them")
    parser.add_argument("--rank", type=int, default=16, help="of each field")
    parser.add_argument("--jobs", type=int, default=1, help="fields that are trained at the same time")
    return exit_status(lambda: report(read(parser, arguments)))


def report(options: argparse.Namespace) -> None:
    """Train, measure, print and save."""
    model = small()
    train(model, list(model.parameters()), "copied", BASE_RATE, 20 if options.quick else options.base_steps, 0)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    steps = 5 if options.quick else options.steps
    cells = [Cell(*one) for one in itertools.product(TASKS, ACTING, options.rates, range(options.seeds))]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.jobs, mp_context=spawn, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        scores = dict(zip(cells, pool.map(partial(adapted, weights, options.rank, steps), cells), strict=True))
    accuracies = {f"{task}, {on}": best(scores, task, on) for task, on in itertools.product(TASKS, ACTING)}
    accuracies["copied, frozen"] = {"accuracy": [accuracy(model, texts(STRINGS, 2), "copied")]}
    times = decoding(options)
    rows = [[task, *(shown(accuracies[f"{task}, {on}"]["accuracy"]) for on in ACTING)] for task in TASKS]
    print(markdown(["task", "on all tokens (%)", "on the prompt alone (%)"], rows))
    print(
        markdown(
            ["a step of decoding", "÷ frozen"], [[name, f"{times.ratio(name, 'frozen'):.3f}"] for name in times.seconds]
        )
    )
    kept = {key: value for key, value in vars(options).items() if key != "output"}
    record = {"options": kept, "accuracies": accuracies, "decoding": times.record("frozen")}
    save_json(record, options.output / f"prompt_only-{torch.device(options.device).type}.json", options.device)


def best(scores: dict[Cell, tuple[float, float]], task: str, on: str) -> dict[str, Any]:
    """Return the accuracies on held-out strings at the rate that is best on validation strings."""
    found: dict[float, list[tuple[float, float]]] = {}
    for cell, pair in scores.items():
        if (cell.task, cell.on) == (task, on):
            found.setdefault(cell.rate, []).append(pair)
    means = {rate: statistics.mean(valid for valid, _ in pairs) for rate, pairs in found.items()}
    rate = max(means, key=means.__getitem__)
    return {"rate": rate, "accuracy": [test for _, test in found[rate]], "validation": means}


def shown(values: list[float]) -> str:
    """Return a mean and the range, in per cent."""
    return f"{statistics.mean(values):.1f} ({min(values):.1f}–{max(values):.1f})"


def texts(number: int, seed: int) -> Tensor:
    """Return random strings of letters, `(number, LENGTH)`."""
    return torch.randint(LETTERS, (number, LENGTH), generator=torch.Generator().manual_seed(seed))


def batch(text: Tensor, answer: Tensor) -> dict[str, Tensor]:
    """Return prompts with their answers, and labels of the answers alone."""
    prompt = torch.cat([text, torch.full((len(text), 1), SEPARATOR)], dim=1)
    return {
        "input_ids": torch.cat([prompt, answer], dim=1),
        "labels": torch.cat([torch.full_like(prompt, -100), answer], dim=1),
    }


def small() -> nn.Module:
    """Return a small GPT-2 without dropout; the same weights each time."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    model = GPT2LMHeadModel(GPT2Config(**SIZE, **dropout, bos_token_id=SEPARATOR, eos_token_id=SEPARATOR))
    model.loss_type = "ForCausalLM"
    return model


def train(model: nn.Module, parameters: list[nn.Parameter], task: str, rate: float, steps: int, seed: int) -> None:
    """Minimise the loss of a task's answers."""
    optimizer = torch.optim.AdamW(parameters, rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    model.train()
    for step in range(steps):
        text = texts(BATCH, 10_000 * (seed + 1) + step)
        loss = model(**batch(text, TASKS.get(task, torch.clone)(text))).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()


def adapted(weights: dict[str, Tensor], rank: int, steps: int, cell: Cell) -> tuple[float, float]:
    """Train a new field; return its accuracy on validation and on held-out strings, in per cent."""
    model = small()
    model.load_state_dict(weights)
    torch.manual_seed(cell.seed)
    rs.steer(model, rank=rank)
    rs.use(model, "default", on=cell.on)
    train(model, rs.parameters(model), cell.task, cell.rate, steps, cell.seed)
    valid, test = (accuracy(model, texts(STRINGS, number), cell.task) for number in (1, 2))
    return valid, test


@torch.no_grad()
def accuracy(model: nn.Module, text: Tensor, task: str) -> float:
    """Return the share of letters that are right in what is generated, in per cent."""
    prompt = batch(text, text)["input_ids"][:, : LENGTH + 1]
    said = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=LENGTH,
        min_new_tokens=LENGTH,
        do_sample=False,
        pad_token_id=SEPARATOR,
    )
    return 100 * (said[:, LENGTH + 1 :] == TASKS.get(task, torch.clone)(text)).float().mean().item()


def decoding(options: argparse.Namespace) -> Rounds:
    """Time a step of decoding behind the same prompt."""
    shape = SHAPES["gpt2"]
    model = rs.steer(shape.build(tiny=options.quick, device=options.device), rank=32)
    inputs = shape.batch(model, 4, 8 if options.quick else 64)

    @torch.no_grad()
    def before(name: str | None, on: str) -> Any:
        rs.use(model, name, on=on)
        return shape.cached(model, inputs)

    @torch.no_grad()
    def run(cache: Any) -> None:
        shape.decode(model, inputs[:, :1], cache)

    asked = {"frozen": (None, "all"), "on all tokens": ("default", "all"), "on the prompt alone": ("default", "prompt")}
    variants = [Variant(name, run, partial(before, *one)) for name, one in asked.items()]
    return play(variants, options.rounds, device=options.device)


if __name__ == "__main__":
    sys.exit(main())
