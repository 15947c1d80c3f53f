"""Faults that were silent, or errors nobody could read: data, labels and settings other than what was meant."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import residual_steer as rs
from cases import randomise
from residual_steer.cli import main
from residual_steer.data.hub import Pixels
from residual_steer.recipe import read_yaml
from residual_steer.recording import record
from residual_steer.training import evaluate
from silent import Residual, ids, tiny


class Classifier(nn.Module):
    def __init__(self, classes):
        super().__init__()
        torch.manual_seed(0)
        self.blocks, self.head = nn.ModuleList([Residual(8), Residual(8)]), nn.Linear(8, classes)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


def classifier(classes=3, width=8, **more):
    model = Classifier(classes)
    return rs.steer(model, rs.Backbone(blocks=model.blocks, width=width), rank=2, train="head", **more)


def fit(model, data, **options):
    return rs.fit(model, data, **{"steps": 2, "lr": 1e-2, "progress": False, **options})


X = torch.randn(6, 5, 8, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 1, 2, 1, 0, 2])
NO_CLASSES = {
    "regression": (1, torch.randn(6, 1)),
    "regression without a dimension": (1, torch.randn(6)),
    "one logit for two classes": (1, Y.clamp(max=1)),
    "several numbers": (3, torch.randn(6, 3)),
    "several labels": (3, torch.tensor([[1.0, 1.0, 0.0]] * 6)),
    "classes as floats": (3, Y.double()),
    "a column of classes": (3, Y[:, None]),
    "a class too many": (3, Y + 1),
    "a negative class": (3, Y - 1),
    "a list": (3, Y.tolist()),
    "an array": (3, Y.numpy()),
}


@pytest.mark.parametrize("case", NO_CLASSES)
def test_a_pair_whose_labels_are_no_classes_is_an_error_and_no_cross_entropy(case):
    classes, y = NO_CLASSES[case]
    for run in (fit, evaluate):
        with pytest.raises(rs.SteerError, match=r"goes through cross-entropy.*received logits .* and y .*`loss=`"):
            run(classifier(classes), [(X, y)])


def test_labels_of_any_whole_type_and_shares_in_half_precision_are_classes():
    model = classifier()
    wanted = F.cross_entropy(model(X), Y).item()
    shares = F.one_hot(Y, 3) * 0.9 + 0.1 / 3
    for y in (Y, Y.int(), Y.to(torch.uint8), F.one_hot(Y, 3).float()):
        assert evaluate(model, [(X, y)])["loss"] == pytest.approx(wanted, rel=1e-6)
    assert evaluate(model, [(X, shares.bfloat16())])["loss"] == pytest.approx(
        F.cross_entropy(model(X), shares).item(), rel=1e-2
    )


WRONG_BATCHES = {
    "lists": ({"input_ids": ids().tolist(), "labels": ids().tolist()}, "input_ids: list, labels: list"),
    "one list": ({"input_ids": ids(), "labels": ids().tolist()}, r"int64 \(2, 6\) from .*, labels: list"),
    "arrays": ({"input_ids": ids().numpy(), "labels": ids().numpy()}, "input_ids: ndarray"),
    "collated lists": ({"input_ids": list(ids().T), "labels": list(ids().T)}, r"input_ids: \(int64 \(2,\) from"),
    "unknown ids": ({"input_ids": ids() + 60, "labels": ids()}, "out of range"),
    "too long": ({"input_ids": ids(2, 40), "labels": ids(2, 40)}, r"input_ids: int64 \(2, 40\)"),
    "no batch": ({"input_ids": ids()[0], "labels": ids()[0]}, r"input_ids: int64 \(6,\)"),
}


@pytest.mark.parametrize("case", WRONG_BATCHES)
def test_an_error_of_a_batch_that_no_model_takes_says_what_was_given(case):
    batch, words = WRONG_BATCHES[case]
    for run in (fit, evaluate):
        with pytest.raises(rs.SteerError, match=rf"GPT2LMHeadModel cannot be run on .*{words}"):
            run(rs.steer(tiny(), rank=2), [batch])


def test_what_fit_and_evaluate_cannot_begin_with_is_said(tmp_path):
    model, batch = rs.steer(tiny(), rank=2), {"input_ids": ids(), "labels": ids()}
    for wrong in (batch, ids(), 5, "squad"):
        with pytest.raises(rs.SteerError, match=r"is a DataLoader, or a list of batches.*\[batch\]"):
            fit(model, wrong)
        with pytest.raises(rs.SteerError, match=r"is a DataLoader, or a list of batches.*\[batch\]"):
            evaluate(model, wrong)
    with pytest.raises(rs.SteerError, match="`optimizer` is a torch optimizer that was made"):
        fit(model, [batch], optimizer=torch.optim.SGD)
    with pytest.raises(rs.SteerError, match="`cache_prefix` is True, False or a folder; received 'no'"):
        fit(model, [batch], cache_prefix="no")
    with pytest.raises(rs.SteerError, match="depends on nothing that trains"):
        fit(model, [batch], loss=lambda model, batch: model(**batch).loss.detach())
    meta = rs.steer(tiny().to("meta"), rank=2)
    for run in (fit, evaluate):
        with pytest.raises(rs.SteerError, match="meta device"):
            run(meta, [batch])
    with pytest.raises(rs.SteerError, match="nothing to evaluate"):
        evaluate(classifier(), [(X[:0], Y[:0])])
    (tmp_path / "file").write_text("")
    with pytest.raises(rs.SteerError, match="could not make the folder"):
        rs.export(model, tmp_path / "file")


def test_a_loss_may_weigh_a_batch_by_a_fraction():
    weights = torch.tensor([0.3, 1.0, 0.05])

    def loss(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1], weight=weights)

    loss.weight = lambda batch: weights[batch[1]].sum()
    parts = [(X[at], Y[at]) for at in (slice(0, 1), slice(1, 5), slice(5, 6))]
    model = classifier()
    assert evaluate(model, parts, loss)["loss"] == pytest.approx(loss(model, (X, Y)).item(), rel=1e-6)
    one, several = classifier(), classifier()
    fit(one, [(X, Y)], loss=loss, steps=1, optimizer=torch.optim.SGD(rs.parameters(one), lr=1))
    fit(several, parts, loss=loss, steps=1, accumulate=3, optimizer=torch.optim.SGD(rs.parameters(several), lr=1))
    for a, b in zip(rs.parameters(one), rs.parameters(several), strict=True):
        torch.testing.assert_close(a, b)
    loss.weight = lambda batch: float("nan")
    with pytest.raises(rs.SteerError, match=r"`loss\.weight` is a number of at least 0"):
        evaluate(model, parts, loss)


def masked():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = transformers.BertConfig(vocab_size=60, max_position_embeddings=32, **sizes)
    return randomise(rs.steer(transformers.BertForMaskedLM(config), rank=2).eval())


@pytest.mark.parametrize("model", [masked, lambda: randomise(rs.steer(tiny(), rank=2))], ids=["masked", "causal"])
def test_losses_are_means_over_the_labels_that_count_also_where_a_batch_has_only_the_first_or_none(model):
    model, labels = model(), ids(4)
    labels[:, 0] = -100
    labels[1], labels[1, 0] = -100, 5
    whole = {"input_ids": ids(4), "labels": labels}
    parts = [{key: value[at] for key, value in whole.items()} for at in (slice(0, 1), slice(1, 2), slice(2, 4))]
    parts.append({"input_ids": ids(2), "labels": torch.full((2, 6), -100)})
    with torch.no_grad():
        wanted = model(**whole).loss.item()
    assert evaluate(model, parts)["loss"] == pytest.approx(wanted, rel=1e-5)
    assert rs.diagnostics.landscape(model, parts, size=2).adapted.loss == pytest.approx(wanted, rel=1e-5)


def test_a_run_is_resumed_with_fields_that_compute_what_they_did(tmp_path):
    data = DataLoader(TensorDataset(X, Y), batch_size=3)
    for name, other in {"scale": 3.0, "activation": "relu", "dropout": 0.5}.items():
        fit(classifier(), data, save_to=tmp_path / name)
        with pytest.raises(rs.SteerError, match=rf"computes otherwise: .*{name}=.* → .*{name}="):
            fit(classifier(**{name: other}), data, save_to=tmp_path / name, resume=True)
        fit(classifier(), data, save_to=tmp_path / name, resume=True)


def test_a_width_that_the_blocks_do_not_have_is_said_when_they_run():
    model = classifier(width=9)
    with pytest.raises(rs.SteerError, match=r"width is 9, and this Residual is given \(6, 5, 8\)"):
        model(X)
    rs.use(model, None)
    model(X)


def test_splits_that_number_their_classes_differently_are_an_error():
    datasets = pytest.importorskip("datasets")
    image = pytest.importorskip("PIL.Image").new("RGB", (2, 2))

    def split(feature, labels):
        features = datasets.Features({"image": datasets.Image(), "label": feature})
        return datasets.Dataset.from_dict({"image": [image] * 2, "label": labels}, features=features)

    ours = split(datasets.ClassLabel(names=["cat", "dog"]), [0, 1])
    for other in (
        split(datasets.ClassLabel(names=["dog", "cat"]), [0, 1]),
        split(datasets.ClassLabel(names=["cat", "dog", "emu"]), [0, 2]),
        split(datasets.Value("string"), ["dog", "cat"]),
    ):
        with pytest.raises(rs.SteerError, match="number their classes differently"):
            rs.data.images({"train": ours, "test": other}, "test")
    assert rs.data.images({"train": ours, "test": ours}, "test").classes == ("cat", "dog")


@pytest.mark.parametrize("kind", [np.uint16, np.int32, np.float32])
def test_an_image_of_more_than_eight_bits_is_not_read_as_white(kind):
    image = pytest.importorskip("PIL.Image").fromarray(np.full((4, 4), 4000, kind))
    with pytest.raises(rs.SteerError, match="more than 8 bits a channel"):
        Pixels(2)(image)


def test_data_of_a_wrong_type_is_an_error_that_says_so():
    for wrong in (list(range(40)), np.arange(40), torch.rand(40), torch.arange(40)[None]):
        with pytest.raises(rs.SteerError, match="a tensor of integers of shape"):
            rs.data.TokenBlocks(wrong, 8)
    for wrong in (3, [3.0, 1.0], [True, False], [np.float64(1)], [-1]):
        with pytest.raises(rs.SteerError, match="different digits from 0 to 9"):
            rs.data.digits(wrong)
    assert len(rs.data.digits([np.int64(3)])) == len(rs.data.digits([3]))
    for predictions, references in (([None], [["a"]]), (["1"], [[1]])):
        with pytest.raises(rs.SteerError, match="a prediction is a string"):
            rs.data.squad_scores(predictions, references)
    with pytest.raises(rs.SteerError, match="list a number per channel"):
        Pixels(mean=0.5, std=0.5)
    with pytest.raises(rs.SteerError, match="`tokenizer` is a tokenizer, not its name"):
        rs.data.wikitext("nowhere", tokenizer="gpt2")


def test_yaml_says_what_it_says_everywhere_else():
    text = "{a: 1e-3, b: -1.5E+2, c: no, d: off, e: true, f: 7, g: .5, h: 1., i: null, j: -.inf, k: 3e, l: 1.0e-05}"
    wanted = {"a": 1e-3, "b": -150.0, "c": "no", "d": "off", "e": True, "f": 7, "g": 0.5, "h": 1.0, "i": None}
    wanted |= {"j": float("-inf"), "k": "3e", "l": 1e-5}
    found = read_yaml("it", text)
    assert found == wanted
    assert {key: type(value) for key, value in found.items()} == {key: type(value) for key, value in wanted.items()}
    for wrong in ("a: 1\na: 2", "a: {b: 1, b: 1}", "a: [1"):
        with pytest.raises(rs.SteerError, match="it is no YAML"):
            read_yaml("it", wrong)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--set", "field.rank.x=3"], "'rank.x' is to be set inside 'rank', which is 2"),
        (["--set", "model.x=3"], "inside 'model', which is 'm' and has no keys"),
        (["--set", "fit.lr=[1"], "is no YAML"),
        (["--set", "data.text=5"], "`text` is a path or a name"),
    ],
)
def test_a_setting_that_would_come_to_nothing_is_an_error(given, words, capsys, tmp_path):
    flags = ["--model", "m", "--text", "t", "--steps", "2", "--rank", "2", "--out", str(tmp_path / "out")]
    assert main(["train", *flags, *given]) == 1
    assert words in capsys.readouterr().err


def test_a_field_is_measured_as_it_was_trained(capsys, tmp_path):
    for key in ("field.rank=8", "fit.steps=3"):
        assert main(["eval", str(tmp_path), "--set", "data.limit=3", "--set", key]) == 1
        assert "measures a field as it was trained" in capsys.readouterr().err


def test_a_recording_of_nothing_is_an_error():
    model = rs.steer(tiny(), rank=2)
    for options in ({"site": "blok"}, {"site": "mixer.nothing"}, {"blocks": [2]}, {"blocks": [0, "1"]}):
        with pytest.raises(rs.SteerError), record(model, **options):
            pass
    by_hand = classifier()
    with pytest.raises(rs.SteerError, match="has the site 'mixer'"), record(by_hand, site="mixer"):
        pass
    with record(model, (index for index in [-1])) as seen:
        model(ids())
    assert seen.leaving[-1].shape == (2, 6, 32)


def test_a_loop_of_ones_own_behind_fit_begins_without_its_last_gradient():
    model = classifier()
    fit(model, [(X, Y)])
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.filterwarnings("ignore:`torch.jit.trace:FutureWarning")
def test_a_trace_of_few_numbers_is_checked_without_a_word():
    model = randomise(classifier()).eval()
    traced = torch.jit.trace(model, X)  # which compares with a pass without gradients
    torch.testing.assert_close(traced(X + 1), model(X + 1))


class Pair(Residual):
    def forward(self, x):
        return x.mean(), super().forward(x), x


class Pairs(Classifier):
    """A classifier whose blocks return the stream at a place of a tuple, which are called or not."""

    def __init__(self, place, called=True):
        super().__init__(3)
        self.blocks, self.place, self.called = nn.ModuleList([Pair(8), Pair(8)]), place, called

    def forward(self, x):
        for block in self.blocks if self.called else ():
            x = block(x)[self.place]
        return self.head(x.mean(1))


def test_what_trains_without_a_part_in_the_loss_is_said():
    model = Pairs(1)
    rs.steer(model, rs.Backbone(blocks=model.blocks, width=8), rank=2)
    with pytest.raises(rs.SteerError, match=r"returns \(\)\. .*`read` and `write` if the stream is not the first"):
        model(X)

    def last(output, f):
        return (*output[:-1], f(output[-1]))

    for place, called in ((1, True), (2, False)):
        model = Pairs(place, called)
        rs.steer(model, rs.Backbone(blocks=model.blocks, width=8, write=last), rank=2, train="head")
        with pytest.warns(UserWarning, match=r"blocks\.0\.steering_block.* got no gradient in the first step"):
            fit(model, [(X, Y)])


def test_a_base_whose_head_is_tied_to_its_embedding_is_saved_as_it_was(tmp_path):
    model = randomise(rs.steer(tiny(), rank=2, train="lm_head"))
    with torch.no_grad():
        on, off = model(ids()).logits, tiny()(ids()).logits
        model.save_pretrained(tmp_path)
        again = rs.from_pretrained(tmp_path)
        torch.testing.assert_close(again(ids()).logits, on)
        rs.use(again, None)
        assert torch.equal(again(ids()).logits, off)
        assert torch.equal(transformers.GPT2LMHeadModel.from_pretrained(tmp_path)(ids()).logits, off)


def test_evaluation_leaves_generators_as_they_were_also_with_a_loader_that_draws():
    model, loader = classifier(), DataLoader(TensorDataset(X, Y), batch_size=2, shuffle=True)
    torch.manual_seed(5)
    wanted = torch.rand(1)
    torch.manual_seed(5)
    evaluate(model, loader)
    assert torch.equal(torch.rand(1), wanted)
