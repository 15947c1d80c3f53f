"""Neural collapse: zero where features are a simplex, and what the paper's formulas give by brute force elsewhere."""

import dataclasses
import itertools
import math

import pytest
import torch
from torch import nn

from residual_steer import SteerError, steer
from residual_steer.diagnostics import collapse_over_training, neural_collapse
from residual_steer.diagnostics._moments import ClassMoments, Moments
from sharp import case_of, rows_for

COUNTS = (7, 4, 9)


class Probe(nn.Module):
    """A linear classifier of features that are given, behind a layer that has as many outputs."""

    def __init__(self, width, classes):
        super().__init__()
        self.other = nn.Linear(width, classes)
        self.classifier = nn.Linear(width, classes)

    def forward(self, x):
        self.other(x)
        return self.classifier(x)


def collapsed(classes=4, width=6, rows=5):
    """A classifier and features at full collapse, away from the origin."""
    basis, away = torch.linalg.qr(torch.randn(width, classes)).Q, torch.randn(width)
    corners = ((torch.eye(classes) - 1 / classes) @ basis.T) * math.sqrt(classes / (classes - 1))
    model = Probe(width, classes)
    with torch.no_grad():
        model.classifier.weight.copy_(3 * corners)
        model.classifier.bias.copy_(-3 * corners @ away)
    labels = torch.arange(classes).repeat(rows)
    return model, (2 * corners + away)[labels], labels


def mixed(width=5):
    labels = torch.cat([torch.full((count,), index) for index, count in enumerate(COUNTS)])
    labels = labels[torch.randperm(len(labels))]
    means = torch.randn(len(COUNTS), width)
    return Probe(width, len(COUNTS)), means[labels] + 0.3 + torch.randn(len(labels), width), labels


def cut(x, y, *sizes):
    return list(zip(x.split(sizes), y.split(sizes), strict=True))


def angles(vectors):
    """The three numbers of NC2, pair by pair."""
    norms = [float(v.norm()) for v in vectors]
    cosines = [float(a @ b / a.norm() / b.norm()) for a, b in itertools.permutations(vectors, 2)]

    def mean(values):
        return sum(values) / len(values)

    def deviation(values):
        return math.sqrt(mean([(v - mean(values)) ** 2 for v in values]))

    off = mean([abs(c + 1 / (len(vectors) - 1)) for c in cosines])
    return [deviation(norms) / mean(norms), deviation(cosines), off]


def brute(model, x, y):
    """The formulas of arXiv 2008.08186, one row at a time, in fp64."""
    x, classes = x.double(), sorted(set(y.tolist()))
    w = model.classifier.weight.detach().double()[classes]
    means = torch.stack([x[y == c].mean(0) for c in classes])
    m = means - means.mean(0)
    centred = [h - means[classes.index(int(c))] for h, c in zip(x, y, strict=True)]
    within = sum(torch.outer(h, h) for h in centred) / len(x)
    between = sum(torch.outer(row, row) for row in m) / len(classes)
    nc1 = (within @ torch.linalg.pinv(between, rtol=1e-12)).trace() / len(classes)
    nc3 = (w / w.norm() - m / m.norm()).norm() ** 2
    logits = model.classifier.double()(x)[:, classes]
    wrong = sum(int((h - means).norm(dim=1).argmin()) != int(row.argmax()) for h, row in zip(x, logits, strict=True))
    model.float()
    return [float(nc1), *angles(m), *angles(w), float(nc3), wrong / len(x)]


def numbers(found):
    return list(dataclasses.astuple(found)[:9])


def test_full_collapse_is_zero_and_variability_alone_moves_nc1():
    model, x, y = collapsed()
    found = neural_collapse(model, cut(x, y, 8, 12))
    assert numbers(found) == pytest.approx([0.0] * 9, abs=1e-6)
    assert (found.classes, found.rows, found.absent, found.head) == (4, 20, (), "classifier")
    jitter = 0.3 * torch.randn(10, x.shape[1])
    rows = torch.cat([x[:10] + jitter, x[:10] - jitter, x[10:]])
    found = neural_collapse(model, [(rows, torch.cat([y[:10], y[:10], y[10:]]))])
    assert found.nc1 > 0.01
    assert numbers(found)[1:4] == pytest.approx([0.0] * 3, abs=1e-6)


def test_every_measure_is_what_the_formulas_give():
    model, x, y = mixed()
    expected = brute(model, x, y)
    assert min(expected) > 0.01
    assert numbers(neural_collapse(model, [(x, y)])) == pytest.approx(expected, rel=1e-5)
    far = neural_collapse(model.double(), cut(x.double() + 1e5, y, 3, 9, 8))  # from the origin, nothing is lost
    assert numbers(far)[:4] == pytest.approx(expected[:4], rel=1e-5)


def test_one_factor_between_classifier_and_means_is_no_distance():
    model, x, y = collapsed()
    with torch.no_grad():
        model.classifier.weight.mul_(-1)
    opposed = neural_collapse(model, [(x, y)])
    assert opposed.nc3 == pytest.approx(4, rel=1e-6)
    assert opposed.nc4 == pytest.approx(1)


def test_two_classes_at_two_points():
    model = Probe(2, 2)
    with torch.no_grad():
        model.classifier.weight.copy_(torch.eye(2))
        model.classifier.bias.zero_()
    x = torch.tensor([[1.0, 0.5], [1.0, -0.5], [-1.0, 0.5], [-1.0, -0.5]])
    found = neural_collapse(model, [(x, torch.tensor([0, 0, 1, 1]))])
    # the means are (±1, 0); within, the second entry varies by 1/4, across Σ_B's only direction: tr(Σ_W Σ_B⁺) = 0
    assert found.nc1 == pytest.approx(0, abs=1e-12)
    # w/‖w‖ = I/√2 and M/‖M‖ = ((1, 0), (−1, 0))/√2: (0 + ½ + ½)
    assert found.nc3 == pytest.approx(1)
    # of the four only (−1, −½) goes wrong: its logits are −1 and −½, which is class 1 as by its mean: none does
    assert found.nc4 == 0
    assert found.weight_angles == pytest.approx(1)
    assert any("two classes" in note for note in found.table().notes)


def test_labels_of_minus_100_and_classes_without_rows_are_left_out():
    model, x, y = mixed()
    kept = y != 1
    found = neural_collapse(model, cut(x, torch.where(kept, y, -100), 10, 10))
    assert numbers(found) == pytest.approx(brute(model, x[kept], y[kept]), rel=1e-5)
    assert (found.classes, found.rows, found.absent) == (2, int(kept.sum()), (1,))
    assert any("1 more" in note for note in found.table().notes)


def test_a_new_head_of_zeros_has_no_weights_to_measure():
    model, x, y = mixed()
    nn.init.zeros_(model.classifier.weight)
    nn.init.zeros_(model.other.weight)
    found = neural_collapse(model, [(x, y)], head="classifier")
    assert numbers(found)[4:8] == [None] * 4
    assert found.nc1 > 0
    found.plot()


def test_a_classifier_at_every_token_is_read_where_the_model_reads_it():
    case = case_of("gpt2-classifier")
    model = steer(case.build(), rank=2, train="score")
    rows = rows_for(case, model)
    found = neural_collapse(model, [rows])
    assert found.head == "score"
    ids, mask = rows["input_ids"], rows["attention_mask"]
    with torch.no_grad():
        hidden = model.eval().transformer(ids, attention_mask=mask).last_hidden_state
    features = hidden[torch.arange(12), mask.sum(1) - 1]
    probe = Probe(features.shape[1], 3)
    probe.classifier = nn.Linear(features.shape[1], 3, bias=False)
    probe.classifier.weight.data.copy_(model.score.weight)
    assert numbers(found) == pytest.approx(brute(probe, features, rows["labels"]), rel=1e-3)


@pytest.mark.parametrize(("name", "head"), [("timm-vit", "head"), ("hf-vit", "classifier"), ("timm-resnet", "fc")])
def test_the_classifier_of_real_models_is_found(name, head):
    case = case_of(name)
    model = case.build()
    found = neural_collapse(model, [rows_for(case, model, 9)])
    assert (found.head, found.classes, found.rows) == (head, 3, 9)


def test_collapse_over_training():
    (model, x, y), (full, corners, labels) = mixed(), collapsed()
    found = neural_collapse(model, [(x, y)])
    course = collapse_over_training({20: found, 0: neural_collapse(full, [(corners, labels)])})
    assert [row["step"] for row in course.table().rows] == [0, 20]
    assert list(course.table().rows[1].values()) == [20, found.nc1, found.nc2_angles, found.nc3, found.nc4]
    (axes,) = course.plot().axes
    assert [line.get_label() for line in axes.lines] == ["NC1", "NC2", "NC3", "NC4"]
    assert axes.get_yscale() == "log"
    assert axes.lines[0].get_xdata().tolist() == [0, 20]
    assert axes.lines[0].get_ydata()[1] == found.nc1
    assert math.isnan(axes.lines[3].get_ydata()[0])  # 0, which has no logarithm
    with pytest.raises(SteerError, match="at least one"):
        collapse_over_training({})


def changed(x=lambda x: x, y=lambda y: y):
    model, rows, labels = mixed()
    return model, [(x(rows), y(labels))]


class Reshuffled:
    """Gives fewer rows at the second reading."""

    def __init__(self, x, y):
        self.x, self.y, self.rows = x, y, len(x) + 1

    def __iter__(self):
        self.rows -= 1
        yield self.x[: self.rows], self.y[: self.rows]


class Moody(nn.Module):
    """A classifier that reads its rows in another order after the first two calls."""

    def __init__(self, change):
        super().__init__()
        self.fc, self.change, self.calls = nn.Linear(5, 3), change, 0

    def forward(self, x):
        self.calls += 1
        return self.fc(x) if self.calls < 3 else self.change(self.fc, x)


def moody(change):
    return Moody(change), [mixed()[1:]]


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: changed(y=torch.zeros_like), "2 to 6 corners.*rows of 1 classes"),
        (lambda: changed(y=lambda y: y[:, None].expand(-1, 3)), "a class index for each row.*\\(20, 3\\)"),
        (lambda: changed(y=lambda y: y.float()), "class index"),
        (lambda: changed(y=lambda y: y + 1), "classes 0 to 2; a label is 3"),
        (lambda: changed(y=lambda y: y - 1), "a label is -1"),
        (lambda: changed(x=torch.zeros_like), "class means are all the same"),
        (lambda: (mixed()[0], [mixed()[1]]), "received none"),
        (lambda: (mixed()[0], Reshuffled(*mixed()[1:])), "same rows.*gave 20 and then 19"),
        (lambda: (Probe(2, 5), [(torch.randn(9, 2), torch.arange(9) % 5)]), "2 to 3 corners.*rows of 5 classes"),
        (lambda: (nn.Tanh(), changed()[1]), "no layer of this Tanh"),
        (lambda: (nn.Flatten(0), changed()[1]), "gave \\(100,\\)"),
        (lambda: moody(lambda fc, x: fc(x[:, None, None])[:, 0, 0]), r"an input of shape \(20, 1, 1, 5\)"),
        (lambda: moody(lambda fc, x: fc(x[1:])[[0, *range(19)]]), r"an input of shape \(19, 5\)"),
        (lambda: moody(lambda fc, x: fc(x[:, None])[:, 0] + 1), r"an input of shape \(20, 1, 5\)"),
    ],
)
def test_bad_input_is_refused(make, match):
    model, loader = make()
    with pytest.raises(SteerError, match=match):
        neural_collapse(model, loader)


def test_a_named_head_is_taken_and_has_to_be_called():
    model, loader = changed()
    assert neural_collapse(model, loader, head="other").head == "other"
    model.idle = nn.Linear(5, 3)
    with pytest.raises(SteerError, match="given no input"):
        neural_collapse(model, loader, head="idle")


def test_moments_merge_in_any_order():
    x, y = torch.randn(11, 3, dtype=torch.float64) + 50, torch.randn(11, 2, dtype=torch.float64)
    moments = Moments()
    for a, b in zip(x.split((1, 6, 4)), y.split((1, 6, 4)), strict=True):
        moments.add(a, b)
    moments.add(x[:0], y[:0])
    torch.testing.assert_close(moments.scatter, (x - x.mean(0)).T @ (y - y.mean(0)), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(moments.mean, x.mean(0))
    torch.testing.assert_close(moments.other, y.mean(0))
    assert moments.count == 11
    by_class = ClassMoments(4, 3, torch.device("cpu"))
    labels = torch.tensor([0, 0, 2, 2, 2, 0, 3, 3, 0, 2, 3])
    for a, b in zip(x.split((2, 5, 4)), labels.split((2, 5, 4)), strict=True):
        by_class.add(a, b)
    means = torch.stack([x[labels == c].mean(0) if (labels == c).any() else torch.zeros(3).double() for c in range(4)])
    torch.testing.assert_close(by_class.means, means)
    torch.testing.assert_close(by_class.within, (x - means[labels]).T @ (x - means[labels]), rtol=1e-9, atol=1e-9)
    assert by_class.counts.tolist() == [4, 0, 4, 3]
