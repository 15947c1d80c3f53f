"""What steering costs on a GPU: a training step against the floor, prefill and decoding against the frozen model.

Models are compiled before any part measures; what is not compiled by then is left out. Eager columns come first, then
those of compiled models; CUDA graphs are recorded over both. All methods of a column take turns.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from closer import interval
from counters import count
from methods import CHEAPEST, FLOOR, FROZEN, IN_BF16, OURS, compile_apart, floor, lora, steered
from rounds import Variant, play
from shapes import scan_linearly, twin

from .decoding import Decoder
from .models import SUBJECTS
from .part import Job, run_part, why

RANK, ROWS, PROMPT = 32, (1, 16, 64), 128
LORA_IN_BF16 = "LoRA, adapters in bf16"
REHEARSED = ("gpt2", "mamba", "vit")
ROUNDS, SECONDS = (5, 25), 3  # of a column: between so many rounds, about so long
REPEATS = {"graph": 20, "step": 1, "prefill": 1, "decode": 3}  # calls of one measurement
Make = Callable[[str], Variant]


class Costs:
    """The columns of one backbone, in order of worth.

    Args:
        job: of the part.
        name: of the backbone.
    """

    def __init__(self, job: Job, name: str) -> None:
        self.job, self.name, self.subject = job, name, SUBJECTS[name]
        self.shape, self.traced = self.subject.shape, self.subject.traced
        self.base = self.subject.build(job.quick, job.device, job.dtype)
        self.rank, self.rows = (4, (2,)) if job.quick else (RANK, ROWS)
        self.times: dict[str, Any] = {}
        self.refused: dict[str, str] = {}
        self.compiled: dict[str, dict[str, int]] = {}  # into how many graphs, by column and method
        self.inner: dict[str, nn.Module] = {}  # the library's own models
        self.models: dict[str, nn.Module] = {}  # what was made of them
        targets = list(self.subject.targets)
        for method, make in {
            FROZEN: lambda model: model,
            FLOOR: floor,
            OURS: lambda model: steered(model, self.rank).model,
            IN_BF16: lambda model: cast(steered(model, self.rank).model, job.dtype),
            CHEAPEST: lambda model: lora(model, targets, self.rank).model,  # PEFT keeps adapters in fp32
            LORA_IN_BF16: lambda model: cast(lora(model, targets, self.rank).model, job.dtype),
        }.items():
            with self.attempt(method):
                self.inner[method] = scan_linearly(twin(self.base))
                self.models[method] = make(self.inner[method])
        backend = "eager" if job.quick else "inductor"
        self.calls = {key: torch.compile(model, dynamic=False, backend=backend) for key, model in self.models.items()}
        self.inputs = self.fitting()

    @contextlib.contextmanager
    def attempt(self, *what: str) -> Iterator[None]:
        """Note what goes wrong inside, and go on."""
        try:
            yield
        except Exception as error:
            self.refused[", ".join(what)] = why(error)
            if self.job.cuda:
                torch.cuda.set_stream(torch.cuda.default_stream())  # a recording that fails stays on its own
            if isinstance(error, torch.OutOfMemoryError):
                torch.cuda.empty_cache()

    def fitting(self) -> Tensor:
        """Return the batch of the subject's rows, or of half of them and so on, that LoRA's step has memory for."""
        rows, model = 2 if self.job.quick else self.subject.rows, self.models.get(CHEAPEST, self.models[OURS])
        while True:
            inputs = self.shape.batch(self.base, rows, 8 if self.job.quick else self.subject.length)
            try:
                self.step(model, inputs)
                return inputs
            except torch.OutOfMemoryError:
                if rows == 1:
                    raise
                rows //= 2
                torch.cuda.empty_cache()
            except RuntimeError:  # mamba_ssm reads weights itself, so that no gradient reaches LoRA; `measure` notes it
                if model is self.models[OURS]:
                    raise
                model = self.models[OURS]

    def step(self, call: Any, inputs: Tensor, _: Any = None) -> None:
        """Take a training step but for the optimizer's."""
        self.shape.loss(call, inputs).backward()
        for p in call.parameters():
            p.grad = None

    @torch.no_grad()
    def prefill(self, call: Any, _: Any = None) -> None:
        """Read the whole batch."""
        if self.subject.length is None or self.name == "mamba_ssm":
            call(self.inputs)
        else:
            call(input_ids=self.inputs, use_cache=False, logits_to_keep=1)

    def count(self) -> None:
        """Count what a step keeps and takes, and the adapters that no gradient reaches."""
        counts: dict[str, Any] = {}
        for name, model in self.models.items():
            loss = partial(self.shape.loss, model, self.inputs)
            with self.attempt(name, "counts"):
                if name != FROZEN:
                    counts[name] = asdict(count(model, loss, self.inputs, products=False))
                    del counts[name]["flops"]
                    loss().backward()
                    counts[name]["no gradient"] = sum(p.requires_grad and p.grad is None for p in model.parameters())
                    model.zero_grad()
        found = {"shape": self.shape.about, "batch": list(self.inputs.shape), "rank": self.rank, "counts": counts}
        self.save(**found)

    def save(self, **more: Any) -> None:
        """Write what there is."""
        found = self.job.record.setdefault("found", {}).setdefault(self.name, {})
        found.update(more, times=self.times, refused=self.refused, graphs=self.compiled)
        self.job.save()

    def columns(self, compiled: bool) -> Iterator[tuple[str, str, Make]]:
        """Give a column's name, its reference, and how a method becomes a variant."""
        kind, whole = "compiled" if compiled else "eager", self.traced or not compiled
        if whole:
            yield f"step, {kind}", FLOOR, partial(self.running, partial(self.step, inputs=self.inputs), compiled)
        for rows in self.rows if self.subject.length else ():
            decode = f"decode, {rows} rows, {kind}"
            if self.job.cuda:
                yield f"{decode}, graph", FROZEN, partial(self.decoding, rows, compiled, True)
            yield decode, FROZEN, partial(self.decoding, rows, compiled, False)
        if whole:
            yield f"prefill, {kind}", FROZEN, partial(self.running, self.prefill, compiled)

    def running(self, what: Callable[..., None], compiled: bool, name: str) -> Variant:
        """Return a pass; a compiled one goes once before it is measured: dynamo first looks at what it took last."""
        call = self.calls[name] if compiled else self.models[name]
        run = partial(what, call)
        return Variant(name, lambda _: run(), run) if compiled else Variant(name, lambda _: run())

    def decoding(self, rows: int, compiled: bool, graph: bool, name: str) -> Variant:
        """Return one token behind a prompt, from a cache that is put back before every measurement."""
        call = self.calls[name] if compiled else self.models[name]
        prompt = self.shape.batch(self.base, 1, 8 if self.job.quick else PROMPT).repeat(rows, 1)
        with torch.no_grad():
            decoder = Decoder(self.shape, self.inner[name], self.models[name], prompt)
        step = decoder.recorded(call) if graph else partial(decoder.step, call)
        return Variant(name, lambda _: step(), decoder.rewind)

    def names(self, reference: str) -> list[str]:
        """Return the methods of a column."""
        return [name for name in self.models if name != (FLOOR if reference == FROZEN else FROZEN)]

    def compile(self) -> None:
        """Compile one thing after the other, until somebody measures; note how many graphs became of it."""
        stats = torch._dynamo.utils.counters["stats"]
        for column, reference, make in self.columns(True):
            for name in self.names(reference):
                if not self.job.may_prepare() or column.endswith("graph") or name in (LORA_IN_BF16, IN_BF16):
                    continue
                with self.attempt(name, column):
                    variant, before = make(name), stats["unique_graphs"]
                    variant.run(variant.before())
                    self.compiled.setdefault(column, {})[name] = stats["unique_graphs"] - before

    def measure(self, compiled: bool) -> None:
        """Measure every column in rounds in which the methods take turns, and write it."""
        for column, reference, make in self.columns(compiled):
            variants, takes = [], 0.0
            repeats = REPEATS["graph" if column.endswith("graph") else column.split(",")[0]]
            for name in self.names(reference):
                if compiled and name not in self.compiled.get(column.removesuffix(", graph"), {}):
                    continue
                with self.attempt(name, column):
                    variant = make(name)
                    variant.run(variant.before())
                    once = play([variant], 1, warmup=0, repeats=repeats, device=self.job.device)
                    takes += once.time(name).median * repeats
                    variants.append(variant)
            if not {OURS, reference} <= {variant.name for variant in variants}:
                continue
            number = 2 if self.job.quick else int(min(max(SECONDS / takes, ROUNDS[0]), ROUNDS[1]))
            with self.attempt(column):
                rounds = play(variants, number, repeats=1 if self.job.quick else repeats, device=self.job.device)
                found = rounds.record(reference)
                for name, row in found.items():
                    row["interval"] = vars(interval(rounds.ratios(name, reference)))
                    if CHEAPEST in found:
                        row["against LoRA"] = vars(interval(rounds.ratios(name, CHEAPEST)))
                self.times[column] = found
            self.save()


def cast(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Return a model whose adapters are in another dtype."""
    for name, p in model.named_parameters():
        if "lora_" in name or "steering_" in name:
            p.data = p.data.to(dtype)
    return model


def work(job: Job) -> None:
    """Prepare every backbone, wait for the turn, and measure."""
    compile_apart()
    # all before one is compiled: a new class undoes that
    prepared = [Costs(job, name) for name in job.subjects or REHEARSED]
    for costs in prepared:
        costs.count()
    for costs in prepared[:1] if job.quick else prepared:
        costs.compile()
    job.wait()
    for costs in prepared:
        costs.measure(False)
    with torch.compiler.set_stance("fail_on_recompile"):  # what is timed is compiled
        for costs in prepared:
            costs.measure(True)
    refused = [(f"{one.name}: {what}: {text}", what) for one in prepared for what, text in one.refused.items()]
    wrong = [text for text, what in refused if not what.startswith("LoRA")]  # what another library cannot, is its own
    job.save(wrong=wrong)
    print("\n".join(text for text, _ in refused))


if __name__ == "__main__":
    sys.exit(run_part(work))
