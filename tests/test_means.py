"""Means of means: whatever a step or an evaluation is divided into, it gives what the undivided one gives."""

import contextlib
import math
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import residual_steer as rs
from cases import TABLE
from residual_steer import _undisturbed as undisturbed
from residual_steer.training import evaluate, next_token_loss
from residual_steer.training.data_order import BatchStream, Share
from residual_steer.training.losses import IGNORE
from runs import classifier, fit, pairs, same, weights

ROWS, LENGTH = 6, 7
PARTS = [slice(0, 3), slice(3, 4), slice(4, 6)]  # of unequal rows


def padded(name, first=True):
    """Tokens and their labels, with as many labels in a row as its number, the first included or not."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, 40 if name != "bert" else 20, (ROWS, LENGTH), generator=generator)
    counted = torch.arange(LENGTH) < torch.tensor([7, 2, 3, 7, 1, 4])[:, None] + (not first)
    counted &= torch.arange(LENGTH) >= (not first)
    return {"input_ids": ids, "labels": ids.masked_fill(~counted, IGNORE)}


def steered(name, **more):
    model = TABLE[name].build()
    torch.manual_seed(0)
    return rs.steer(model, rank=4, **more)


def own_loss(model, batch):
    return 0.5 * model(**batch).loss


def images():
    x = torch.randn(ROWS, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    return x, torch.tensor([0, 1, IGNORE, 2, IGNORE, 1])


class Dense(nn.Module):
    """Classes for every token, `(batch, classes, length)`."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Conv1d(3, 4, 1)

    def forward(self, x):
        return self.head(x)


def dense():
    x = torch.randn(ROWS, 3, LENGTH, generator=torch.Generator().manual_seed(2))
    return x, padded("gpt2")["labels"].clamp(max=3)


class Masked(nn.Module):
    """A loss over labels where they stand, as in a masked language model."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(40, 8), nn.Linear(8, 40)

    def forward(self, input_ids, labels):
        logits = self.head(self.embed(input_ids).cumsum(1))
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


def prompted():
    """Tokens that train in front of the text."""
    model = TABLE["gpt2"].build()
    torch.manual_seed(0)
    return rs.baselines.apply(model, "prompt", length=2)


def classes():
    batch = padded("bert")
    return {**batch, "labels": torch.where(batch["labels"] == IGNORE, IGNORE, batch["labels"] % 2)}


KINDS = {
    "causal": (lambda: steered("gpt2"), lambda: padded("gpt2"), None),
    "causal, prompts masked": (lambda: steered("gpt2"), lambda: padded("gpt2", first=False), None),
    "causal, a prompt in front": (prompted, lambda: padded("gpt2"), None),
    "ssm": (lambda: steered("mamba"), lambda: padded("mamba"), None),
    "ssm, next_token_loss": (lambda: steered("mamba2"), lambda: padded("mamba2"), next_token_loss),
    "ssm, a loss of one's own": (lambda: steered("mamba"), lambda: padded("mamba"), own_loss),
    "token classifier": (lambda: steered("distilbert", train="classifier"), classes, None),
    "masked": (Masked, lambda: padded("gpt2"), None),
    "encoder-decoder": (lambda: steered("bart"), lambda: padded("bart"), None),
    "vision": (lambda: steered("timm-vit"), images, None),
    "dense": (Dense, dense, None),
}


def rows(batch, part):
    return {k: v[part] for k, v in batch.items()} if isinstance(batch, dict) else tuple(v[part] for v in batch)


def trained(make, batches, loss, **options):
    model = make()
    rates = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    history = fit(model, batches, steps=2, optimizer=rates, loss=loss, clip=None, warmup=0, log_every=1, **options)
    return history, [p.detach().clone() for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("kind", KINDS)
def test_means_of_means_accumulated_parts_are_the_step_of_one_batch(kind):
    make, data, loss = KINDS[kind]
    batch = data()
    whole, expected = trained(make, [batch], loss)
    parts, actual = trained(make, [rows(batch, part) for part in PARTS], loss, accumulate=len(PARTS))
    for one, other in zip(whole.train, parts.train, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=2e-6)
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=2e-4)
    for one, other in zip(expected, actual, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_means_of_means_evaluated_parts_are_one_batch(kind):
    make, data, loss = KINDS[kind]
    model, batch = make(), data()
    parts = [rows(batch, part) for part in PARTS]
    assert evaluate(model, parts, loss) == pytest.approx(evaluate(model, [batch], loss), rel=2e-6)


def test_a_loss_says_by_its_weight_what_its_mean_is_over():
    def loss(model, batch):
        return nn.functional.cross_entropy(model(batch["x"])[batch["counts"]], batch["y"][batch["counts"]])

    loss.weight = lambda batch: batch["counts"].sum()
    x, y = pairs(rows=ROWS).dataset.tensors
    batch = {"x": x, "y": y, "counts": torch.tensor([1, 1, 0, 1, 0, 1]).bool()}
    found = [
        evaluate(classifier(), batches, loss)["loss"] for batches in ([batch], [rows(batch, part) for part in PARTS])
    ]
    assert found[0] == pytest.approx(found[1], rel=1e-6)


def nothing(batch):
    return {**batch, "labels": torch.full_like(batch["labels"], IGNORE)} if isinstance(batch, dict) else (
        batch[0], torch.full_like(batch[1], IGNORE))  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_that_weighs_nothing_is_as_if_it_were_not_there(kind):
    make, data, loss = KINDS[kind]
    batch = data()
    empty = nothing(batch)
    assert evaluate(make(), [empty, batch, empty], loss) == pytest.approx(evaluate(make(), [batch], loss), rel=1e-6)
    with pytest.raises(rs.SteerError, match="no label that counts"):
        evaluate(make(), [empty], loss)
    expected, _ = trained(make, [batch], loss)
    for batches, accumulate in (([empty, batch], 2), ([batch, empty], 2), ([empty, batch, empty], 1)):
        found, tensors = trained(make, batches, loss, accumulate=accumulate)  # a part of a step, or all of it
        assert found.train[-1]["step"] == 2
        losses = [[record["loss"] for record in history.train] for history in (found, expected)]
        assert losses[0] == pytest.approx(losses[1], rel=2e-5)
        assert all(torch.isfinite(tensor).all() for tensor in tensors)


def test_data_of_which_no_label_counts_are_refused():
    model = steered("gpt2")
    before = weights(model)
    with pytest.raises(rs.SteerError, match="no label of the training data counts: all are -100"):
        fit(model, [nothing(padded("gpt2"))] * 3, accumulate=2)
    assert same(weights(model), before)


def test_a_custom_mean_over_nothing_gives_no_gradient_of_nan():
    """A sum divided by a count of zero has a gradient of NaN, also where it is multiplied by zero afterwards."""

    def loss(model, batch):
        x, y = batch
        each = nn.functional.cross_entropy(model(x), y, reduction="none")
        return each.sum() / (y != IGNORE).sum()

    batch = pairs(rows=ROWS).dataset.tensors
    history, tensors = trained(classifier, [batch, nothing(batch)], loss, accumulate=2)
    assert all(math.isfinite(record["grad_norm"]) for record in history.train)
    assert all(torch.isfinite(tensor).all() for tensor in tensors)


def test_accuracy_is_over_labels_that_count_and_over_shares_of_classes():
    model, (x, _) = classifier().eval(), pairs(rows=ROWS).dataset.tensors
    predicted = model(x).argmax(1)
    wrong = (predicted + 1) % 3
    labels = torch.where(torch.arange(ROWS) < 2, predicted, wrong)
    assert evaluate(model, [(x, labels)])["accuracy"] == pytest.approx(2 / 6)
    labels[-2:] = IGNORE
    assert evaluate(model, [(x, labels)])["accuracy"] == pytest.approx(2 / 4)
    shares = nn.functional.one_hot(torch.where(torch.arange(ROWS) < 2, predicted, wrong), 3) * 0.7 + 0.1
    assert evaluate(model, [(x, shares)])["accuracy"] == pytest.approx(2 / 6)
    tokens, classes = dense()
    hit = ((logits := Dense()(tokens)).argmax(1) == classes)[classes != IGNORE]
    assert logits.shape == (ROWS, 4, LENGTH)
    assert evaluate(Dense(), [(tokens, classes)])["accuracy"] == pytest.approx(float(hit.float().mean()))
    shares = nn.functional.one_hot(logits.argmax(1), 4).movedim(-1, 1) * 0.6 + 0.1
    assert evaluate(Dense(), [(tokens, shares)])["accuracy"] == 1


def test_what_counts_is_found_out_only_where_it_matters_and_leaves_no_trace():
    model, batch, calls = steered("gpt2"), padded("gpt2"), []
    model.register_forward_hook(lambda module, *_: calls.append(module.training))
    full = {**batch, "labels": batch["input_ids"]}
    fit(model, [full], steps=2)
    fit(model, [full], steps=2, accumulate=2)  # the same counts in every part
    assert calls == [True] * 6
    evaluate(model, [full, full])
    assert calls == [True] * 6 + [False] * 2
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    evaluate(model, [full, batch])
    assert torch.equal(torch.rand(1), expected)
    assert len(calls) == 8 + 2 + 4


@pytest.mark.parametrize(
    ("iterable", "number", "workers"),
    [*((iterable, number, 0) for iterable in (False, True) for number in (2, 3, 5)), (False, 3, 2)],
)
def test_every_row_falls_to_one_process_and_every_process_takes_every_step(iterable, number, workers):
    loader = DataLoader(TensorDataset(torch.arange(22)), 7, num_workers=workers)  # 7, 7, 7 and 1
    batches = [batch[0] for batch in loader]
    shares = [Share([[b] for b in batches] if iterable else loader, index, number) for index in range(number)]
    for _ in range(2):
        parts = [list(share) for share in shares]
        assert {len(part) for part in parts} == {4}
        for step, batch in enumerate(batches):
            counted = [part[step][0][0] for part in parts if part[step][1]]
            assert torch.equal(torch.cat(counted), batch)
            assert len(counted) == min(number, len(batch))
            assert max(map(len, counted)) - min(map(len, counted)) <= 1
            assert all(len(part[step][0][0]) > 0 for part in parts)


class Noise(TensorDataset):
    """Rows that are drawn anew by every generator."""

    def __getitem__(self, index):
        return torch.rand(()), torch.tensor(random.random()), torch.tensor(np.random.rand())


@pytest.mark.parametrize("index", [0, 1])
def test_data_draw_other_numbers_in_every_batch_which_no_other_generator_notices(index):
    torch.manual_seed(index)  # as processes differ
    state = undisturbed.get_state()
    streams = [BatchStream(Share(DataLoader(Noise(torch.arange(8)), 2), index, 2), 5, shuffles=True) for _ in range(2)]
    drawn = [torch.stack([torch.cat(next(stream)[0]) for _ in range(8)]).T for stream in streams]  # two epochs
    assert torch.equal(*drawn)
    assert all(len(set(numbers.tolist())) == 8 for numbers in drawn[0])
    first = next(BatchStream(Share(DataLoader(Noise(torch.arange(8)), 2)), 5, shuffles=True))[0]
    assert torch.equal(first[0][:1], drawn[0][0][:1])  # every process begins a batch alike
    assert str(undisturbed.get_state()) == str(state)


def test_a_loader_that_is_one_process_s_part_already_is_not_split_again():
    data = TensorDataset(torch.arange(22))
    loader = DataLoader(data, 4, sampler=DistributedSampler(data, num_replicas=2, rank=0))
    assert len(list(Share(loader))) == 3
    with pytest.raises(rs.SteerError, match="DistributedSampler gives the part of one"):
        Share(loader, 0, 2)


def test_a_step_that_overflows_in_fp16_is_repeated_and_not_counted():
    model, seen = classifier(), []

    def loss(model, batch):
        seen.append(batch[0])
        return 3e2 * nn.functional.cross_entropy(model(batch[0]), batch[1])

    history = fit(model, pairs(), loss=loss, precision="fp16", log_every=1, steps=4)
    assert len(seen) > 4
    assert [record["step"] for record in history.train] == [1, 2, 3, 4]
    assert all(math.isfinite(record["grad_norm"]) for record in history.train)
    assert all(torch.equal(batch, seen[0]) for batch in seen[: len(seen) - 3])  # the same batch at a smaller scale
    before = weights(model)
    with pytest.raises(rs.SteerError, match="gradient's norm became"):
        fit(
            model,
            pairs(),
            loss=lambda m, b: loss(m, b) - loss(m, b).detach() + m(b[0]).mul(0).sum().sqrt(),
            precision="fp16",
        )
    assert same(weights(model), before)


@contextlib.contextmanager
def untouched(sampler):
    generator = sampler.generator
    yield
    assert sampler.generator is generator


@pytest.mark.parametrize("seeded", [False, True])
def test_a_seed_fixes_the_order_and_the_users_generator_is_left_alone(seeded):
    orders = []
    for seed in (1, 2):
        generator = torch.Generator().manual_seed(seed) if seeded else None
        loader = DataLoader(pairs().dataset, 8, shuffle=True, generator=generator)
        seen = []
        with untouched(loader.sampler):
            fit(classifier(), loader, loss=lambda m, b: (seen.append(b[0]), m(b[0]).mean())[1])  # noqa: B023
        assert generator is None or generator.initial_seed() == seed
        orders.append(torch.cat(seen))
    assert torch.equal(*orders)
