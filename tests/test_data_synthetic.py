"""What is made from a seed: associative recall and the latent tasks."""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader

from residual_steer import SteerError, fit
from residual_steer.data import latent, mqar, recall
from residual_steer.data.synthetic import embedding, rule

SIZES = st.integers(1, 6).flatmap(
    lambda pairs: st.tuples(
        st.just(pairs), st.integers(4 * pairs, 60), st.integers(0, 5), st.sampled_from([0.0, 0.01, 0.7, 1.0, 2.0])
    )
)


@settings(deadline=None, max_examples=60)
@given(SIZES, st.integers(0, 2**40 - 1))
def test_every_query_is_labelled_with_the_value_of_its_key(sizes, seed):
    pairs, length, spare, power = sizes
    keys, values = range(10, 10 + pairs + spare), range(40, 40 + pairs + spare)
    data = mqar(7, pairs=pairs, length=length, keys=keys, values=values, noise=(2, 3), power=power, seed=seed)
    assert len(data) == 7
    for row in data:
        assert list(row) == ["input_ids", "labels"]
        assert {(t.shape, t.dtype) for t in row.values()} == {((length,), torch.int64)}
        ids, labels = row["input_ids"].tolist(), row["labels"].tolist()
        bound = dict(zip(ids[0 : 2 * pairs : 2], ids[1 : 2 * pairs : 2], strict=True))
        assert len(bound) == len(set(bound.values())) == pairs
        assert set(bound) <= set(keys)
        assert set(bound.values()) <= set(values)
        answers = [i for i, label in enumerate(labels) if label != -100]
        assert {ids[i - 1]: labels[i] for i in answers} == {ids[i - 1]: ids[i] for i in answers} == bound
        assert len(answers) == pairs
        for i in answers:
            assert i >= 2 * pairs + 1
            assert ids[2 * pairs : i].count(labels[i]) == 0  # it stands nowhere before but beside its key
        rest = [t for i, t in enumerate(ids) if i >= 2 * pairs and not {i, i + 1} & set(answers)]
        assert set(rest) <= {2, 3}


def small(seed=0, size=64, **options):
    return mqar(size, **{"pairs": 4, "length": 32, "keys": range(1, 30), "values": range(30, 60), **options}, seed=seed)


def test_rows_depend_on_their_seed_alone_and_share_no_memory_with_the_data():
    first, again, other = small(0).columns, small(0).columns, small(1).columns
    assert all(torch.equal(first[name], again[name]) for name in first)
    rows = {tuple(row) for row in first["input_ids"].tolist()}
    assert len(rows) == 64
    assert not rows & {tuple(row) for row in other["input_ids"].tolist()}
    data = small()
    data[3]["input_ids"].zero_()
    assert data[3]["input_ids"].any()


def test_the_power_law_of_gaps():
    """With one pair, its slot is one draw from p(g) ∝ g^(power - 1)."""
    gaps = torch.arange(1, 16).double()
    for power in (0.01, 1.0):
        ids = mqar(20_000, pairs=1, length=32, power=power, seed=3, keys=[1], values=[2]).columns["input_ids"]
        seen = (ids[:, 2::2] == 1).double().mean(0)
        wanted = gaps ** (power - 1) / (gaps ** (power - 1)).sum()
        assert (seen - wanted).abs().max() < 0.012  # three standard deviations of the most frequent slot


def test_pairs_and_noise_are_drawn_evenly_and_keys_do_not_tell_values():
    """Keys and values of a row are one of the 5 · 4 ordered pairs of five; bounds are four standard deviations."""
    ids = mqar(8000, pairs=2, length=8, keys=range(1, 6), values=range(6, 11)).columns["input_ids"]
    lone = mqar(8000, pairs=1, length=4, keys=range(1, 5), values=range(5, 9)).columns["input_ids"]
    for columns, kinds in ((ids[:, 0:4:2], 20), (ids[:, 1:4:2], 20), (lone[:, :2], 16)):
        counts = Counter(map(tuple, columns.tolist())).values()
        assert len(counts) == kinds
        assert max(abs(count * kinds / 8000 - 1) for count in counts) < 0.2
    ids = mqar(2000, pairs=1, length=20, keys=[1], values=[2], noise=range(3, 8)).columns["input_ids"]
    counts = ids.flatten().bincount()[3:].double()
    assert (counts / counts.sum() - 0.2).abs().max() < 0.01


class Lookup(nn.Module):
    """Answers from nothing but what stands before: with the token that followed the same token for the first time."""

    def __init__(self, vocabulary, forgets=0, plain=False):
        super().__init__()
        self.vocabulary, self.forgets, self.plain = vocabulary, forgets, plain
        self.dropout = nn.Dropout(0.5)

    def forward(self, input_ids):
        assert not self.training
        logits = torch.zeros(*input_ids.shape, self.vocabulary)
        for row, tokens in enumerate(input_ids.tolist()):
            for position, token in enumerate(tokens):
                before = tokens[: max(0, position - self.forgets)]
                if token in before[:-1]:
                    logits[row, position, before[before.index(token) + 1]] = 1.0
        return logits if self.plain else SimpleNamespace(logits=logits)


@pytest.mark.parametrize("plain", [False, True])
def test_a_lookup_recalls_everything_and_modes_and_random_numbers_stay(plain):
    model = Lookup(60, plain=plain).train()
    before = torch.get_rng_state()
    assert recall(model, DataLoader(small(), batch_size=10, shuffle=True)) == 1.0
    assert model.training
    assert model.dropout.training
    assert torch.equal(before, torch.get_rng_state())


def test_a_lookup_that_sees_less_recalls_less():
    columns = small().columns
    found = []
    for row, marks in zip(columns["input_ids"].tolist(), columns["labels"].tolist(), strict=True):
        found += [row.index(row[i - 1]) < i - 1 - 25 - 1 for i, mark in enumerate(marks) if mark != -100]
    share = recall(Lookup(60, forgets=25), DataLoader(small(), batch_size=10))
    assert 0 < share == sum(found) / len(found) < 1


def gpt2(vocabulary, length):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=vocabulary, n_positions=length, n_embd=32, n_layer=2, n_head=2, use_cache=False,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


@torch.no_grad()
def test_a_models_own_loss_is_over_the_queries_and_answers_cannot_be_seen_before():
    """The label is predicted one position before it: what transformers' loss shifts is what `recall` shifts."""
    model, batch = gpt2(60, 32).eval(), next(iter(DataLoader(small(), batch_size=8)))
    assert recall(model, DataLoader(small(size=500), batch_size=100)) < 4 / 60  # chance
    output = model(**batch)
    answers = (batch["labels"] != -100).nonzero().tolist()
    chances = output.logits.log_softmax(-1)
    by_hand = [-chances[row, i - 1, batch["labels"][row, i]] for row, i in answers]
    torch.testing.assert_close(output.loss, torch.stack(by_hand).mean())
    for row, i in answers[:8]:
        changed = batch["input_ids"][row].clone()
        changed[i:] = 0
        torch.testing.assert_close(model(input_ids=changed[None]).logits[0, i - 1], output.logits[row, i - 1])


def test_a_model_learns_from_it():
    """In a few steps it knows which two values a row has, so half are right and more, not a ninth."""
    torch.manual_seed(1)
    model, options = gpt2(9, 8), {"pairs": 2, "length": 8, "keys": range(1, 5), "values": range(5, 9)}
    train = DataLoader(mqar(4000, **options, seed=0), batch_size=64, shuffle=True)
    fit(model, train, steps=100, lr=1e-2, progress=False)
    assert recall(model, DataLoader(mqar(300, **options, seed=1), batch_size=100)) > 0.4


@pytest.mark.parametrize(
    ("make", "options", "words"),
    [
        (small, {"size": 0}, "`size`.* 1; received 0"),
        (small, {"size": True}, "`size`.* received True"),
        (small, {"pairs": 0}, "`pairs`.* received 0"),
        (small, {"length": 15}, "`length`.* 16; received 15"),
        (small, {"power": -1}, "`power`.* received -1"),
        (small, {"power": float("nan")}, "`power`.* received nan"),
        (small, {"keys": range(3)}, "`keys` lists at least 4 different tokens.* received range"),
        (small, {"keys": [1, 1, 2, 3, 4]}, "`keys`.* received .1, 1"),
        (small, {"keys": [-1, 2, 3, 4, 5]}, "`keys`.* received .-1"),
        (small, {"values": "abcdef"}, "`values`.* received 'abcdef'"),
        (small, {"values": [30.5, 31.5, 32.5, 33.5]}, "`values`.* received .30.5"),
        (small, {"values": 7}, "`values`.* received 7"),
        (small, {"noise": ()}, "`noise` lists at least 1"),
        (small, {"values": range(29, 60)}, "received 29 more than once"),
        (small, {"noise": (0, 31)}, "received 31 more than once"),
        (small, {"seed": -1}, "`seed`.* from 0 .* received -1"),
        (small, {"seed": 2**40}, "`seed`.* received 1099511627776"),
        (small, {"seed": None}, "`seed`.* received None"),
        (latent, {"size": 0}, "`size`.* received 0"),
        (latent, {"size": 4, "task": -1}, "`task`.* 0; received -1"),
        (latent, {"size": 4, "task": 1.5}, "`task`.* received 1.5"),
        (latent, {"size": 4, "tokens": 0}, "`tokens`.* received 0"),
        (latent, {"size": 4, "latents": 0}, "`latents`.* received 0"),
        (latent, {"size": 4, "width": 0}, "`width`.* received 0"),
        (latent, {"size": 4, "noise": -0.1}, "`noise`.* received -0.1"),
        (latent, {"size": 4, "noise": "1"}, "`noise`.* received '1'"),
        (latent, {"size": 4, "seed": -3}, "`seed`.* received -3"),
    ],
)
def test_arguments_out_of_range(make, options, words):
    with pytest.raises(SteerError, match=words):
        make(**options)


@pytest.mark.parametrize(
    ("batches", "words"),
    [
        ([], "nothing to recall"),
        ([{"input_ids": torch.ones(1, 3).long(), "labels": torch.full((1, 3), -100)}], "nothing to recall"),
        ([(torch.ones(1, 3), torch.ones(1))], "received tuple"),
        ([{"input_ids": torch.ones(1, 3).long()}], r"received \['input_ids'\]"),
    ],
)
def test_recall_errors(batches, words):
    with pytest.raises(SteerError, match=words):
        recall(Lookup(5), batches)


def recovered(x):
    """Return u as least squares finds it, and what it does not explain."""
    matrix, flat = embedding().flatten(0, 1), x.flatten(1)
    u = torch.linalg.lstsq(matrix, flat.T).solution.T
    return u, flat - u @ matrix.T


def test_latent_rows_are_what_the_definition_says():
    x, y = latent(3000, noise=0.5, seed=4).tensors
    assert (x.shape, x.dtype, y.shape, y.dtype) == ((3000, 16, 64), torch.float32, (3000,), torch.int64)
    u, rest = recovered(x)
    assert (u.mean(0)).abs().max() < 0.1
    assert (u.var(0) - 1).abs().max() < 0.15
    assert rest.std().item() == pytest.approx(0.5 * (1 - 8 / 1024) ** 0.5, rel=0.01)
    assert (rule(u, 0) == y).float().mean() > 0.95
    assert embedding().square().sum(-1).mean().item() == pytest.approx(1, abs=0.05)


def test_tasks_share_the_tokens_and_differ_in_their_labels():
    rows = [latent(4000, task=task).tensors for task in range(4)]
    assert all(torch.equal(x, rows[0][0]) for x, _ in rows)
    for i, (_, y) in enumerate(rows):
        assert 0.46 < y.float().mean() < 0.54
        for _, other in rows[:i]:
            assert 0.2 < (y == other).float().mean() < 0.8


def test_latent_rows_depend_on_their_seed_alone():
    first, again, other = (latent(10, seed=seed).tensors for seed in (1, 1, 2))
    assert torch.equal(first[0], again[0])
    assert not torch.equal(first[0], other[0])
    assert torch.equal(latent(10, seed=1, noise=0.0).tensors[1], first[1])


def test_without_noise_the_oracle_is_always_right_and_the_rule_is_not_linear():
    x, y = latent(4000, noise=0.0).tensors
    u, _ = recovered(x)
    assert (rule(u, 0) == y).float().mean() > 0.999
    plane = torch.linalg.lstsq(u, y[:, None] * 2.0 - 1).solution
    assert ((u @ plane)[:, 0].gt(0).long() == y).float().mean() < 0.9


@pytest.mark.parametrize("task", [0, 1, 2])
def test_the_best_possible_accuracy_is_far_above_nine_tenths(task):
    """Bayes: u given x is Gaussian, and the label is what most of it says."""
    x, y = latent(1000, task=task, seed=9).tensors
    matrix = embedding().flatten(0, 1)
    covariance = torch.linalg.inv(torch.eye(8) + matrix.T @ matrix)
    mean = x.flatten(1) @ matrix @ covariance
    spread = torch.linalg.cholesky(covariance)
    votes = sum(rule(mean + torch.randn(mean.shape) @ spread.T, task) for _ in range(25))
    assert ((votes > 12).long() == y).float().mean() > 0.94
