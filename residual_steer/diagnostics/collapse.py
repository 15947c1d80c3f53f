"""Neural collapse (Papyan, Han and Donoho 2020, arXiv 2008.08186): how far features and classifier are from a simplex.

The paper of this library says of H-Res that it "brings neural collapse" (claim 6), without numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from residual_steer.errors import SteerError
from residual_steer.passes import Batch, batches, reading, uncompiled
from residual_steer.report import Axis, Column, Plot, Series, Table
from residual_steer.training.losses import IGNORE

from .classifier import Classifier, find_classifier
from .moments import ClassMoments, exact

__all__ = ["NeuralCollapse", "collapse_over_training", "neural_collapse"]

_NAMES = {
    "nc1": "NC1: within-class variability",
    "nc2_norms": "NC2: norms of class means, coefficient of variation",
    "nc2_spread": "NC2: cosines of class means, standard deviation",
    "nc2_angles": "NC2: cosines of class means, distance from a simplex",
    "weight_norms": "NC2: norms of classifiers, coefficient of variation",
    "weight_spread": "NC2: cosines of classifiers, standard deviation",
    "weight_angles": "NC2: cosines of classifiers, distance from a simplex",
    "nc3": "NC3: distance of classifiers from class means",
    "nc4": "NC4: disagreement with the nearest class mean",
}


@dataclass(frozen=True)
class NeuralCollapse:
    """NC1 to NC4 of a model on data; all of them are 0 at full collapse.

    Attributes:
        nc1: tr(Σ_W Σ_B⁺) / C.
        nc2_norms: std_c ‖μ_c − μ_G‖ / mean_c ‖μ_c − μ_G‖.
        nc2_spread: the standard deviation of cos(μ_c − μ_G, μ_c' − μ_G) over c ≠ c'.
        nc2_angles: the mean of |cos(μ_c − μ_G, μ_c' − μ_G) + 1/(C − 1)| over c ≠ c'.
        weight_norms: as `nc2_norms`, of the rows w_c of the classifier, which are not centred.
        weight_spread: as `nc2_spread`, of the w_c.
        weight_angles: as `nc2_angles`, of the w_c.
        nc3: ‖W / ‖W‖_F − M / ‖M‖_F‖_F², with the μ_c − μ_G as rows of M; from 0 to 4.
            It and the measures of w_c are None for a classifier whose weights are all 0, as a new head's may be.
        nc4: the share of rows for which the class of the nearest mean is not the class of the largest logit.
        classes: C, the classes that have rows.
        rows: how many rows were measured.
        absent: classes of the classifier without rows, which are left out of everything.
        head: the path of the classifier.
    """

    nc1: float
    nc2_norms: float
    nc2_spread: float
    nc2_angles: float
    weight_norms: float | None
    weight_spread: float | None
    weight_angles: float | None
    nc3: float | None
    nc4: float
    classes: int
    rows: int
    absent: tuple[int, ...]
    head: str

    def table(self) -> Table:
        """Return the numbers as a table, one measure a row."""
        rows = [{"measure": label, "value": getattr(self, name)} for name, label in _NAMES.items()]
        notes = [f"{self.rows:,} rows of {self.classes} classes, of what enters {self.head!r}; 0 is full collapse."]
        if self.absent:
            notes.append(f"Left out, as no row has them: {len(self.absent)} more classes of the classifier.")
        if self.classes == 2:
            notes.append("With two classes the NC2 of class means are 0 whatever the features are.")
        columns = (Column("measure", "measure"), Column("value", "value", digits=4))
        return Table("Neural collapse", columns, tuple(rows), tuple(notes))

    def plot(self) -> Plot:
        """Return the measures as bars."""
        values = tuple(getattr(self, name) for name in _NAMES)
        groups = tuple(name.replace("_", " ") for name in _NAMES)
        y = Axis("distance from collapse")
        return Plot("Neural collapse", "bars", Axis("measure"), y, (Series("model", groups, values),))


def neural_collapse(model: nn.Module, loader: Iterable[Any], *, head: str | None = None) -> NeuralCollapse:
    """Measure neural collapse at the last linear layer of a classifier (arXiv 2008.08186, § 2 and figures 2 to 7).

    With features h of rows, class means μ_c, μ_G = mean_c μ_c, Σ_W = mean over rows of (h − μ_c)(h − μ_c)ᵀ and
    Σ_B = mean_c (μ_c − μ_G)(μ_c − μ_G)ᵀ, it measures

    - NC1, variability collapse: tr(Σ_W Σ_B⁺) / C;
    - NC2, the class means become a simplex: equal norms, and every cosine −1/(C − 1);
    - NC3, self-duality: the classifier's rows become the centred class means, but for one factor;
    - NC4, the classifier becomes that of the nearest class mean.

    Standard deviations are divided by the count. With classes of different size μ_G gives each the same weight, as the
    authors' own program does. Features are added up in fp64 over batches; the loader is read twice, since NC4 needs
    the class means.

    Args:
        model: a classifier, adapted in whatever way; it is run in evaluation mode.
        loader: batches with labels `(rows,)`, as dicts or pairs, the same rows at each reading. Rows with the label
            -100 are left out.
        head: the path of the classifier, an `nn.Linear`. None looks for the last one whose output is what the model
            returns as logits; one that runs at every token is found too, with the token that the model takes.

    Raises:
        SteerError: the model is no module; no classifier is found; labels are missing, not one per row, or no class of
            the classifier; rows of fewer than two classes; more classes than the width + 1, of which there is no
            simplex; equal class means; features that are NaN or infinite; a loader that is empty or can be read only
            once.
    """
    if not isinstance(model, nn.Module):
        raise SteerError(f"a model is a torch.nn.Module; received {type(model).__name__}.")
    if isinstance(loader, Iterator):
        raise SteerError("`loader` is read twice, which an iterator cannot be. Give the list or DataLoader itself.")
    model = uncompiled(model)  # so that `head` is a path in it
    with reading(model):
        classifier, moments = _first_pass(model, loader, head)
        present = moments.counts.nonzero().squeeze(1)
        means = moments.means[present]
        _check(len(present), means.shape[1])
        centred = means - means.mean(0)
        rows = int(moments.counts.sum())
        disagree, again = _disagreements(model, loader, classifier, present, means)
        if again != rows:
            raise SteerError(
                f"`loader` gives the same rows at each reading; it gave {rows} and then {again}. Switch off what "
                "draws them at random."
            )
        weight = exact(classifier.linear.weight)[present]
        fresh = not bool(weight.any())
        norms, spread, angles = _simplex(centred)
        weight_norms, weight_spread, weight_angles = (None, None, None) if fresh else _simplex(weight)
        return NeuralCollapse(
            nc1=_within(moments.within / rows, means),
            nc2_norms=norms,
            nc2_spread=spread,
            nc2_angles=angles,
            weight_norms=weight_norms,
            weight_spread=weight_spread,
            weight_angles=weight_angles,
            nc3=None if fresh else float((weight / weight.norm() - centred / centred.norm()).square().sum()),
            nc4=disagree / rows,
            classes=len(present),
            rows=rows,
            absent=tuple((moments.counts == 0).nonzero().squeeze(1).tolist()),
            head=classifier.path,
        )


def collapse_over_training(found: Mapping[int, NeuralCollapse], *, title: str = "Collapse over training") -> Plot:
    """Return NC1 to NC4 against steps of training, measured between calls of `fit`.

    >>> found = {0: neural_collapse(model, valid)}
    >>> for step in range(100, 600, 100):
    ...     fit(model, train, steps=100, warmup=0, schedule="constant")  # each call begins with a fresh optimizer
    ...     found[step] = neural_collapse(model, valid)
    >>> plot = collapse_over_training(found)

    Args:
        found: by step.
        title: above the plot.

    Raises:
        SteerError: there is nothing to show.
    """
    if not found:
        raise SteerError("collapse over training is made of at least one measurement; received none.")
    steps = sorted(found)
    names = {"nc1": "NC1", "nc2_angles": "NC2", "nc3": "NC3", "nc4": "NC4"}
    values = {label: tuple(getattr(found[step], name) for step in steps) for name, label in names.items()}
    lines = tuple(Series(label, tuple(steps), measured) for label, measured in values.items())
    note = "NC2 is the distance of the class means' cosines from those of a simplex."
    return Plot(title, "lines", Axis("step"), Axis("distance from collapse", log=True), lines, (note,))


def _first_pass(model: nn.Module, loader: Iterable[Any], head: str | None) -> tuple[Classifier, ClassMoments]:
    """Find the classifier and add up its features by class.

    Raises:
        SteerError: the loader gives nothing.
    """
    classifier: Classifier | None = None
    moments: ClassMoments | None = None
    for batch in batches(model, loader):
        classifier = find_classifier(model, batch, head) if classifier is None else classifier
        features, labels, _ = _labelled(model, batch, classifier)
        if moments is None:
            moments = ClassMoments(classifier.linear.out_features, features.shape[1], features.device)
        moments.add(features, labels)
    if classifier is None or moments is None:  # which `batches` has refused already
        raise SteerError("the loader gave no batch. Give it data.")
    return classifier, moments


def _labelled(model: nn.Module, batch: Batch, classifier: Classifier) -> tuple[Tensor, Tensor, Tensor]:
    """Return features in fp64, labels and logits of the rows of a batch that count.

    Raises:
        SteerError: the labels are not one class index per row.
    """
    labels, classes = batch.labels, classifier.linear.out_features
    whole = labels is not None and not labels.is_floating_point() and labels.dtype != torch.bool
    if labels is None or not whole or labels.shape != (batch.rows,):
        given = "none" if labels is None else f"{labels.dtype} of shape {tuple(labels.shape)}"
        raise SteerError(
            f"neural collapse needs a class index for each row, (rows,): 'labels' in a dict, or the second of a pair; "
            f"received {given} for {batch.rows} rows."
        )
    counts = labels != IGNORE
    wrong = labels[counts & ((labels < 0) | (labels >= classes))]
    if len(wrong):
        raise SteerError(
            f"the classifier {classifier.path!r} has classes 0 to {classes - 1}; a label is {int(wrong[0])}. Give the "
            "labels that it was trained on, or name another layer with `head`."
        )
    found = classifier.features(model, batch)
    features = exact(found.entered[counts])
    return features, labels[counts].to(features.device), exact(found.left[counts])


def _check(classes: int, width: int) -> None:
    """Hold the number of classes against what a simplex needs.

    Raises:
        SteerError: fewer than two, or more than width + 1.
    """
    if classes < 2:
        raise SteerError(f"neural collapse is of two classes or more; the loader has rows of {classes}.")
    if classes > width + 1:
        raise SteerError(
            f"neural collapse is towards a simplex of one corner per class, which {classes} classes have in "
            f"{classes - 1} dimensions and more; these features have {width}."
        )


def _disagreements(
    model: nn.Module, loader: Iterable[Any], classifier: Classifier, present: Tensor, means: Tensor
) -> tuple[int, int]:
    """Return for how many rows the nearest mean and the classifier disagree, of how many."""
    centre = means.mean(0)
    wrong = rows = 0
    for batch in batches(model, loader):
        features, _, logits = _labelled(model, batch, classifier)
        nearest = torch.cdist(features - centre, means - centre).argmin(1)
        wrong += int((nearest != logits[:, present].argmax(1)).sum())
        rows += len(features)
    return wrong, rows


def _within(within: Tensor, means: Tensor) -> float:
    """Return NC1, with the pseudo-inverse of Σ_B from the singular values of the centred means, `(classes, width)`.

    What rounding makes of one that is 0 is left out, as the last is wherever there are no more classes than features.

    Raises:
        SteerError: the class means are all the same.
    """
    _, values, directions = torch.linalg.svd(means - means.mean(0), full_matrices=False)
    kept = values > means.norm() * max(means.shape) * torch.finfo(values.dtype).eps
    if not bool(kept.any()):
        raise SteerError("the class means are all the same, and NC1 divides by their spread. Look at the features.")
    along = torch.einsum("kd,de,ke->k", directions[kept], within, directions[kept])
    return float((along / values[kept].square()).sum())  # Σ_B has the eigenvalues s²/C, and NC1 divides by C again


def _simplex(vectors: Tensor) -> tuple[float, float, float]:
    """Return how far vectors, `(classes, width)`, are from equal norms and from equal, and the widest, angles."""
    norms = vectors.norm(dim=1)
    unit = vectors / norms.clamp_min(torch.finfo(norms.dtype).tiny)[:, None]
    classes = len(vectors)
    first, second = torch.triu_indices(classes, classes, 1)
    cosines = (unit @ unit.T)[first, second]
    spread, off = cosines.std(correction=0), (cosines + 1 / (classes - 1)).abs().mean()
    return float(norms.std(correction=0) / norms.mean()), float(spread), float(off)
