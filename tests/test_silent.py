"""Faults that were silent: what a gradient, a recomputation, a thread and a compiler meet is what was selected."""

import copy
import io
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import residual_steer as rs
from cases import randomise
from silent import TABLE, Residual, fresh, ids, three, tiny, two
from words import save_encoder


def switched(case):
    model = fresh(case)
    rs.use(model, None)
    rs.use(model, "default")
    return model


def loaded(case, folder):
    rs.save(fresh(case), folder)
    return rs.load(case.build(), folder)


def unpickled(case, _):
    file = io.BytesIO()
    torch.save(switched(case), file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def assigned(case, _):
    model = switched(case)
    model.load_state_dict({key: value.clone() for key, value in model.state_dict().items()}, assign=True)
    return model


WAYS = {
    "fresh": lambda case, _: fresh(case),
    "switched": lambda case, _: switched(case),
    "copied": lambda case, _: copy.deepcopy(switched(case)),
    "loaded": loaded,
    "unpickled": unpickled,
    "assigned": assigned,
}


@three
@pytest.mark.parametrize("way", WAYS)
def test_a_gradient_that_arrives_after_its_field_was_deselected_is_an_error_for_every_field(case, way, tmp_path):
    made = WAYS[way](case, tmp_path)
    for _ in range(2):
        loss = case.loss(made)
        rs.use(made, None)
        with pytest.raises(rs.SteerError, match=r"backward\(\) reached field 'default'"):
            loss.backward()
        rs.use(made, "default")
    case.loss(made).backward()
    assert all(p.grad is not None for p in rs.parameters(made))


class Recomputed(nn.Module):
    """A model whose steered blocks are recomputed, hooks and all, in `backward()`."""

    def __init__(self, reentrant):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([Residual(8) for _ in range(3)])
        self.reentrant = reentrant

    def forward(self, x):
        for block in self.blocks:
            x = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
        return x


def recomputed(reentrant, site, then):
    model = Recomputed(reentrant)
    rs.steer(model, rs.Backbone(blocks=model.blocks, width=8, mixer="mixer"), rank=2, name="a", site=site)
    rs.steer(model, rank=2, name="b", site=site)
    randomise(model)
    rs.use(model, {"a": 1.0, "b": 0.5})
    rs.thaw(model, "a")
    rs.thaw(model, "b")
    x = torch.linspace(-1, 1, 2 * 5 * 8).reshape(2, 5, 8).requires_grad_(True)
    loss = model(x).square().sum()
    then(model, x)
    loss.backward()
    return [p.grad.clone() for name in ("a", "b") for p in rs.parameters(model, name)]


OTHER = {"a": 0.1, "b": 2.0}


@pytest.mark.parametrize(
    "then", [lambda m, _: rs.use(m, OTHER), lambda m, x: rs.use(m, OTHER) and m(x)], ids=["mix", "mix and pass"]
)
@pytest.mark.parametrize("site", ["block", "mixer", "input"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_recomputation_uses_the_mix_of_its_forward_pass(reentrant, site, then):
    expected = recomputed(None, site, lambda *_: None)
    for actual, wanted in zip(recomputed(reentrant, site, then), expected, strict=True):
        torch.testing.assert_close(actual, wanted)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(
    "then", [lambda m, _: rs.use(m, None), lambda m, _: rs.unsteer(m, "a")], ids=["off", "removed"]
)
def test_a_recomputation_that_cannot_be_what_it_was_is_an_error(reentrant, then):
    with pytest.raises(rs.SteerError, match=r"backward\(\) reached field|inside the `with`"):
        recomputed(reentrant, "block", then)


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("reentrant", [False, True, None])
def test_a_recomputation_without_the_field_that_was_unsteered_is_an_error(reentrant, trains):
    model = Recomputed(reentrant)
    rs.steer(model, rs.Backbone(blocks=model.blocks, width=8), rank=2)
    if not trains:
        rs.freeze(model)
    x = torch.ones(1, 2, 8, requires_grad=True)
    loss = randomise(model)(x).sum()
    rs.unsteer(model)
    if reentrant is None and not trains:
        loss.backward()  # everything is kept
        return
    with pytest.raises(
        (rs.SteerError, torch.utils.checkpoint.CheckpointError), match=r"was unsteered since|recomp|reached field"
    ):
        loss.backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_recomputation_with_other_trained_tensors_in_place_is_an_error(reentrant):
    def made():
        model = Recomputed(reentrant)
        described = rs.Backbone(blocks=model.blocks, width=8)
        rs.steer(model, described, rank=2, name="a", train="blocks.1.mixer")
        rs.steer(model, rank=2, name="b")
        randomise(model)
        rs.use(model, {"a": 1.0})
        rs.thaw(model, "a")
        return model, model(torch.ones(1, 2, 8, requires_grad=True)).sum()

    made()[1].backward()
    model, loss = made()
    rs.use(model, {"a": 0.5})
    with pytest.raises(rs.SteerError, match="own tensors another selection has replaced"):
        loss.backward()


def test_a_part_called_by_itself_is_recomputed_under_one_selection_alone():
    model = Recomputed(False)
    rs.steer(model, rs.Backbone(blocks=model.blocks, width=8), rank=2)
    randomise(model)
    rs.steer(model, rank=2, name="other")
    rs.use(model, {"default": 1.0})
    rs.thaw(model, "default")
    loss = checkpoint(model.blocks[0], torch.ones(1, 2, 8), use_reentrant=False).sum()
    rs.use(model, {"default": 2.0})
    with pytest.raises(rs.SteerError, match="another selection was made"):
        loss.backward()


class InPlace(Residual):
    def forward(self, x):
        x += torch.tanh(self.mixer(x))
        return x


def race(*runs):
    """Run functions at once; return what they returned, one after the other."""
    with ThreadPoolExecutor(len(runs)) as pool:
        return [future.result() for future in [pool.submit(torch.no_grad()(run)) for run in runs]]


@torch.no_grad()
def test_threads_that_run_one_model_get_their_own_streams():
    model = nn.Sequential(*[InPlace(16) for _ in range(3)])
    rs.steer(model, rs.Backbone(blocks=list(model), width=16, inplace=True), rank=4)
    randomise(model)
    streams = [torch.randn(1, 4, 16) for _ in range(4)]
    expected = [model(z.clone()) for z in streams]

    def run(z, want):
        return all(torch.allclose(model(z.clone()), want, atol=1e-5) for _ in range(100))

    assert all(race(*[partial(run, z, want) for z, want in zip(streams, expected, strict=True)]))


@torch.no_grad()
def test_threads_may_have_batches_of_several_sizes_under_heads_by_row():
    case = TABLE["gpt2-classifier"]
    model = two(case, train=case.head)
    rs.use(model, ["a", "b"])
    ids = case.inputs(model)["input_ids"][:2]
    expected = model(input_ids=ids).logits

    def fits():
        return all(torch.allclose(model(input_ids=ids).logits, expected, atol=1e-5) for _ in range(30))

    def fails():
        for _ in range(30):
            with pytest.raises(rs.SteerError):
                model(input_ids=ids[:1])
        return True

    assert all(race(fits, fails, fits))


@dataclass
class Batch:
    words: torch.Tensor
    mask: torch.Tensor


class Task(nn.Module):
    """Hand what is nested in a batch to a language model."""

    def __init__(self, lm):
        super().__init__()
        self.lm = lm

    def forward(self, batch=None, mask=None, patches=None, words=None):
        if isinstance(batch, Batch):
            words = batch.words
        elif isinstance(batch, dict):
            words = batch["input_ids"]
        elif isinstance(batch, (list, tuple)):
            words = batch[0]
        return self.lm(input_ids=words).logits


class Opaque(Batch):
    pass


WRAPPED = {
    "dict": lambda x: ({"input_ids": x, "mask": torch.ones(1, 1, 6, 6)},),
    "list": lambda x: ([x, torch.zeros(1, 3)],),
    "dataclass": lambda x: (Batch(x, torch.ones(1, 1, 6, 6)),),
    "mask first": lambda x: (None, torch.ones(1, 1, 6, 6), None, x),
    "patches first": lambda x: (None, None, torch.ones(8, 5), x),
    "opaque": lambda x: (Opaque(x, torch.ones(1)),),
}


@pytest.mark.parametrize("way", WRAPPED)
@torch.no_grad()
def test_the_batch_is_found_wherever_it_stands(way):
    model, batch, own = two(None, Task(TABLE["gpt2"].build())), WRAPPED[way](ids(4)), {}
    for name in ("a", "b"):
        rs.use(model, name)
        own[name] = model(*batch)
    rs.use(model, ["a", "b", "b", "a"])
    mixed = model(*batch)
    for row, name in enumerate(["a", "b", "b", "a"]):
        torch.testing.assert_close(mixed[row], own[name][row])
    for names in (["a"], ["a", "b"], ["a"] * 3, ["a"] * 8):
        rs.use(model, names)

        def generate():
            return model(*batch)

        for call in (generate, lambda: model(*batch)):
            with pytest.raises(rs.SteerError, match=rf"has {len(names)} rows, and this batch has 4"):
                call()


@pytest.mark.parametrize("name", ["gpt2", "mamba", "t5"])
@torch.no_grad()
def test_a_batch_of_twice_as_many_rows_is_refused_though_generate_may_repeat_them(name):
    model = two(TABLE[name])
    rs.use(model, ["a", "b"])
    model.generate(ids(), num_beams=2, num_return_sequences=2, max_new_tokens=3, do_sample=False)
    words = {"input_ids": ids(4), "decoder_input_ids": ids(4)}
    with pytest.raises(rs.SteerError, match="has 2 rows, and this batch has 4"):
        model(**words if name == "t5" else {"input_ids": ids(4)})


def test_sentences_that_are_sorted_by_length_meet_their_own_fields(tmp_path):
    st = pytest.importorskip("sentence_transformers")
    save_encoder(tmp_path, "abcdefgh")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = st.SentenceTransformer(str(tmp_path), device="cpu")
    text, names, own = ["a", "a b c d e", "a b"], ["x", None, "y"], {}
    for name in ("x", "y"):
        rs.steer(model, rank=4, name=name)
    randomise(model)
    for name in ("x", "y", None):
        rs.use(model, name)
        own[name] = model.encode(text, convert_to_tensor=True)
    rs.use(model, names)
    for kind in ({"convert_to_tensor": True}, {}, {"convert_to_numpy": False}):
        mixed = model.encode(text, **kind)
        for row, name in enumerate(names):
            torch.testing.assert_close(torch.as_tensor(mixed[row]), own[name][row], rtol=0, atol=1e-5)
    assert rs.summary(model).acting == names
    for method in (model.encode_query, model.encode_document):  # which name what they hand to `encode`
        for row, name in enumerate(names):
            torch.testing.assert_close(torch.as_tensor(method(text)[row]), own[name][row], rtol=0, atol=1e-5)
    with pytest.raises(rs.SteerError, match="has 3 rows, and `encode` was given 2"):
        model.encode(text[:2])
    twin = copy.deepcopy(model)
    rs.use(twin, "x")
    torch.testing.assert_close(twin.encode(text, convert_to_tensor=True), own["x"])
    rs.unsteer(model)
    assert "encode" not in model.__dict__


@pytest.mark.filterwarnings("ignore")
def test_pairs_that_a_cross_encoder_sorts_by_length_meet_their_own_fields(tmp_path):
    st = pytest.importorskip("sentence_transformers")
    save_encoder(tmp_path, "abcdefgh")
    model = st.CrossEncoder(str(tmp_path), device="cpu", num_labels=1)
    for name in ("x", "y"):
        rs.steer(model, rank=4, name=name)
    randomise(model)
    pairs, names, own = [["a", "b"], ["a b c d", "e f"], ["a b", "c"]], ["x", None, "y"], []
    for name, pair in zip(names, pairs, strict=True):
        rs.use(model, name)
        own.append(float(model.predict(pair)))
    rs.use(model, names)
    torch.testing.assert_close(torch.as_tensor(model.predict(pairs)), torch.tensor(own))
    assert model.predict(pairs, convert_to_tensor=True).tolist() == model.predict(pairs).tolist()
    with pytest.raises(rs.SteerError, match="has 3 rows, and `predict` was given 2"):
        model.predict(inputs=pairs[:2])
    rs.use(model, ["x"] * 3)
    ranked = {each["corpus_id"]: each["score"] for each in model.rank("a", ["b", "c d e f", "a"])}
    rs.use(model, "x")
    for each in model.rank("a", ["b", "c d e f", "a"]):
        assert ranked[each["corpus_id"]] == pytest.approx(each["score"], abs=1e-5)


def compiled(model, x):
    output = torch.compile(model, backend="eager")(x)
    return getattr(output, "logits", output)


def by_hand(model, **more):
    return rs.steer(model, rs.Backbone(blocks=model.blocks, width=8), rank=2, **more)


@pytest.mark.parametrize("order", ["frozen first", "steered first"])
@torch._dynamo.config.patch(skip_nnmodule_hook_guards=True)  # as in a process that has steered nothing yet
@torch.no_grad()
def test_what_was_compiled_of_a_frozen_model_does_not_run_for_a_steered_one(order):
    torch._dynamo.reset()
    frozen, x = Recomputed(None).requires_grad_(False), torch.randn(2, 5, 8)
    ways = [partial(by_hand, layers=[0]), partial(by_hand, layers=[1]), by_hand]
    if order == "frozen first":  # with what transformers and a baseline put around their blocks, too
        frozen, x = tiny().requires_grad_(False), ids()
        ways = [partial(rs.steer, rank=2, layers=[1])]
        ways += [partial(rs.baselines.apply, method="parallel-adapter", rank=2)]
        compiled(frozen, x)
    models = [way(copy.deepcopy(frozen)) for way in ways]
    for parameter in (p for model in models for p in model.parameters() if p.requires_grad):
        parameter.add_(torch.randn_like(parameter))
    off = compiled(frozen, x)
    for model in models:
        expected = model(x)
        expected = getattr(expected, "logits", expected)
        torch.testing.assert_close(compiled(model, x), expected)
        assert not torch.allclose(expected, off)
        assert torch.equal(compiled(frozen, x), off)
