"""The contract of every backbone, in bf16, on small models of transformers; every point stands alone."""

from __future__ import annotations

import copy
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import residual_steer as rs

from .models import small
from .part import Job, run_part, why

KINDS = ("gpt2", "llama", "vit", "mamba", "mamba2")
RANK, SCALE, SHARE = 8, 0.7, 3e-2  # of the largest entry, in bf16
OK, LEFT_OUT = "ok", "left out of the rehearsal"


@dataclass(frozen=True)
class Case:
    """A model, and the batch that it is run on."""

    kind: str
    device: str
    dtype: torch.dtype
    quick: bool

    def build(self) -> nn.Module:
        """Return the frozen model."""
        return small(self.kind, self.device, self.dtype, self.quick)

    def steered(self, *names: str) -> nn.Module:
        """Return a model with a field of random weights for every name."""
        model = self.build()
        for name in names or ("default",):
            rs.steer(model, rank=RANK, scale=SCALE, name=name)
        generator = torch.Generator().manual_seed(3)
        for field in (module for module in model.modules() if isinstance(module, rs.HRes)):
            for p in field.parameters():
                p.data.copy_(torch.randn(p.shape, generator=generator) * 0.2)
        return model

    def run(self, model: Callable[..., Any]) -> Tensor:
        """Return the logits of a batch of four."""
        generator = torch.Generator().manual_seed(1)
        if self.kind == "vit":
            given = torch.randn(4, 3, 32, 32, generator=generator).to(self.device, self.dtype)
            return model(pixel_values=given).logits
        return model(input_ids=self.tokens(), use_cache=False).logits

    def tokens(self) -> Tensor:
        """Return four rows of tokens."""
        return torch.randint(3, 64, (4, 16), generator=torch.Generator().manual_seed(1)).to(self.device)

    def loss(self, model: Callable[..., Any]) -> Tensor:
        """Return a loss to which every logit matters differently."""
        logits = self.run(model).float()
        return (logits * torch.linspace(-1, 1, logits.numel(), device=logits.device).view_as(logits)).mean()


def close(found: Tensor, expected: Tensor) -> None:
    """Compare to a share of the largest entry."""
    bound = SHARE * expected.abs().max().item()
    torch.testing.assert_close(found.double(), expected.double(), rtol=0, atol=bound)


def fresh_is_the_identity(case: Case) -> None:
    for training in (False, True):
        expected = case.run(case.build().train(training))
        found = case.run(rs.steer(case.build().train(training), rank=RANK))
        if training and case.device == "cpu":  # where steering lets Mamba scan
            close(found, expected)
        else:
            assert torch.equal(found, expected), f"training={training}"


@torch.no_grad()
def stream_moves_by_the_field(case: Case) -> None:
    model, frozen, calls = case.steered(), case.build(), []
    backbone, twins = rs.find_backbone(model), rs.find_backbone(frozen).blocks
    for block in backbone.blocks:
        block.register_forward_hook(lambda _, *call: calls.append(call), with_kwargs=True)
    case.run(model)
    for block, twin, (args, kwargs, output) in zip(backbone.blocks, twins, calls, strict=True):
        field = next(module for module in block.modules() if isinstance(module, rs.HRes))
        z, before = backbone.read(args, kwargs), twin(*args, **kwargs)
        before, after = (x if isinstance(x, Tensor) else x[0] for x in (before, output))
        moved = SCALE * field(z.to(field.down.weight.dtype)).double()
        assert after.dtype == before.dtype
        assert moved.abs().max() > 0.05 * before.abs().max()
        close(after, before.double() + moved)


def only_fields_learn(case: Case) -> None:
    model = rs.steer(case.build().train(), rank=RANK)
    learn = rs.parameters(model)
    optimizer = torch.optim.SGD(learn, lr=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        case.loss(model).backward()
        assert {id(p) for p in model.parameters() if p.grad is not None} == {id(p) for p in learn}
        optimizer.step()
    assert all(p.grad.abs().max() > 0 for p in learn)


def off_and_unsteer_give_the_frozen_model(case: Case) -> None:
    expected, model = case.run(case.build()), case.steered()
    assert not torch.equal(case.run(model), expected)
    with rs.use(model, None):
        assert torch.equal(case.run(model), expected)
    assert torch.equal(case.run(rs.unsteer(model)), expected)


def saved_steering_loads(case: Case) -> None:
    model = case.steered()
    with tempfile.TemporaryDirectory() as folder:
        rs.save(model, f"{folder}/field")
        fresh = rs.load(case.build(), f"{folder}/field")
    assert torch.equal(case.run(fresh), case.run(model))


@torch.no_grad()
def rows_equal_their_own_runs(case: Case) -> None:
    model, asked = case.steered("a", "b"), ["a", None, "b", "a"]
    rs.use(model, asked)
    mixed = case.run(model)
    for row, name in enumerate(asked):
        rs.use(model, name)
        close(mixed[row], case.run(model)[row])


@torch.no_grad()
def cached_generation_agrees(case: Case) -> None:
    if case.kind == "vit":
        return
    model, prompt = case.steered(), case.tokens()[:, :5]
    options = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True, "use_cache": True}
    found = model.generate(prompt, min_new_tokens=6, max_new_tokens=6, **options)
    whole = model(input_ids=found.sequences, use_cache=False).logits[:, 4:-1]
    close(torch.stack(found.logits, dim=1), whole)


def checkpointing_gives_the_same_gradients(case: Case) -> None:
    plain, saving = case.steered().train(), case.steered().train()
    saving.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for model in (plain, saving):
        case.loss(model).backward()
    for p, q in zip(rs.parameters(plain), rs.parameters(saving), strict=True):
        close(q.grad, p.grad)


def a_copy_stands_alone(case: Case) -> None:
    model = case.steered()
    twin, expected = copy.deepcopy(model), case.run(model)
    rs.unsteer(model)
    assert torch.equal(case.run(twin), expected)


@torch.no_grad()
def compiled_agrees(case: Case) -> str | None:
    model = case.steered()
    expected, off = case.run(model), case.run(case.build())
    compiled = partial(torch.compile, fullgraph=True, backend="eager" if case.quick else "inductor")
    call = compiled(model)
    try:
        close(case.run(call), expected)
    except torch._dynamo.exc.Unsupported:
        try:
            case.run(compiled(case.build()))
        except torch._dynamo.exc.Unsupported:
            return "the frozen model is not one graph either"
        raise
    with rs.use(model, None):
        close(case.run(call), off)
    return None


POINTS = (
    fresh_is_the_identity,
    stream_moves_by_the_field,
    only_fields_learn,
    off_and_unsteer_give_the_frozen_model,
    saved_steering_loads,
    rows_equal_their_own_runs,
    cached_generation_agrees,
    checkpointing_gives_the_same_gradients,
    a_copy_stands_alone,
    compiled_agrees,  # last: it takes the longest
)


def work(job: Job) -> None:
    """Hold every model to every point."""
    found: dict[str, dict[str, str]] = {kind: {} for kind in job.subjects or KINDS}
    wrong: list[str] = []
    seconds: dict[str, float] = {}
    for point in POINTS:
        started = time.perf_counter()
        for kind, points in found.items():
            if job.quick and point is compiled_agrees and kind != "vit":  # which is traced in the least time
                points[point.__name__] = LEFT_OUT
                continue
            torch.compiler.reset()
            try:
                points[point.__name__] = point(Case(kind, job.device, job.dtype, job.quick)) or OK
            except Exception as error:
                points[point.__name__] = why(error)
                wrong.append(f"{kind}: {point.__name__}: {why(error)}")
            seconds[point.__name__] = time.perf_counter() - started
            job.save(points=found, took=seconds, wrong=wrong)
    print("\n".join(wrong) or f"{len(POINTS)} points hold on {', '.join(found)}")


if __name__ == "__main__":
    sys.exit(run_part(work))
