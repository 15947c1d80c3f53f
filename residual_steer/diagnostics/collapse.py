"""Neural collapse (Papyan, Han and Donoho 2020, arXiv 2008.08186): how far features and classifier are from a simplex.

The paper of this library says of H-Res that it "brings neural collapse" (claim 6), without numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from residual_steer._batches import Batch, batches, require_finite
from residual_steer.errors import SteerError
from residual_steer.recording import Call, record, uncompiled, undisturbed
from residual_steer.training.losses import IGNORE

from ._moments import ClassMoments, exact
from ._plots import Axes, Figure, bars, lines
from ._table import Table

__all__ = ["CollapseOverTraining", "NeuralCollapse", "collapse_over_training", "neural_collapse"]

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
        rows = tuple({"measure": label, "value": getattr(self, name)} for name, label in _NAMES.items())
        notes = [f"{self.rows:,} rows of {self.classes} classes, of what enters {self.head!r}; 0 is full collapse."]
        if self.absent:
            notes.append(f"Left out, as no row has them: {len(self.absent)} more classes of the classifier.")
        if self.classes == 2:
            notes.append("With two classes the NC2 of class means are 0 whatever the features are.")
        return Table("Neural collapse", {"measure": "measure", "value": "value"}, rows, tuple(notes))

    def plot(self, ax: Axes | None = None) -> Figure:
        """Draw the measures as bars."""
        values = {name.replace("_", " "): getattr(self, name) for name in _NAMES}
        return bars(ax, "Neural collapse", "distance from collapse", values)


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
    with undisturbed(model):
        rest = batches(model, loader)
        first = next(rest)
        classifier = _find(model, first, head)
        linear = classifier.linear
        moments = ClassMoments(linear.out_features, linear.in_features, exact(linear.weight).device)
        for batch in chain([first], rest):
            moments.add(*_labelled(model, batch, classifier)[:2])
        present = moments.counts.nonzero().squeeze(1)
        means = moments.means[present]
        _require_simplex(len(present), means.shape[1])
        centred, rows = means - means.mean(0), int(moments.counts.sum())
        wrong = again = 0
        for batch in batches(model, loader):
            features, _, logits = _labelled(model, batch, classifier)
            nearest = torch.cdist(features - means.mean(0), centred).argmin(1)
            wrong += int((nearest != logits[:, present].argmax(1)).sum())
            again += len(features)
        if again != rows:
            raise SteerError(
                f"`loader` gives the same rows at each reading; it gave {rows} and then {again}. Switch off what "
                "draws them at random."
            )
        weight = exact(linear.weight)[present]
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
            nc4=wrong / rows,
            classes=len(present),
            rows=rows,
            absent=tuple((moments.counts == 0).nonzero().squeeze(1).tolist()),
            head=classifier.path,
        )


@dataclass(frozen=True)
class CollapseOverTraining:
    """NC1 to NC4 against steps of training.

    Attributes:
        title: above the plot.
        found: what was measured, by step.
    """

    title: str
    found: Mapping[int, NeuralCollapse]

    def table(self) -> Table:
        """Return one row for every step that was measured."""
        columns = {"step": "step", "nc1": "NC1", "nc2_angles": "NC2", "nc3": "NC3", "nc4": "NC4"}
        found = sorted(self.found.items())
        rows = tuple({"step": step, **{key: getattr(one, key) for key in list(columns)[1:]}} for step, one in found)
        note = "NC2 is the distance of the class means' cosines from those of a simplex."
        return Table(self.title, columns, rows, (note,))

    def plot(self, ax: Axes | None = None) -> Figure:
        """Draw the measures against the step."""
        table = self.table()
        at, *series = ([row[key] for row in table.rows] for key in table.columns)
        named = dict(zip(list(table.columns.values())[1:], series, strict=True))
        return lines(ax, self.title, "step", "distance from collapse", named, at=at, log=True)


def collapse_over_training(
    found: Mapping[int, NeuralCollapse], *, title: str = "Collapse over training"
) -> CollapseOverTraining:
    """Put measurements between calls of `fit` side by side.

    >>> found = {0: neural_collapse(model, valid)}
    >>> for step in range(100, 600, 100):
    ...     fit(model, train, steps=100, warmup=0, schedule="constant")  # each call begins with a fresh optimizer
    ...     found[step] = neural_collapse(model, valid)
    >>> figure = collapse_over_training(found).plot()

    Args:
        found: by step.
        title: above the plot.

    Raises:
        SteerError: there is nothing to show.
    """
    if not found:
        raise SteerError("collapse over training is made of at least one measurement; received none.")
    return CollapseOverTraining(title, dict(found))


@dataclass(frozen=True)
class _Classifier:
    """The last linear layer of a model, its path, and whether it was found by its output.

    That is then looked for in every batch: it may run at every token, of which the model takes one for each row.
    """

    path: str
    linear: nn.Linear
    found: bool

    def features(self, model: nn.Module, batch: Batch) -> Call:
        """Run the model and return what entered and left the classifier, one vector per row of the batch."""
        with record({self.path: self.linear}) as seen:
            logits = _logits(batch.run(model))
        calls = seen.calls.get(self.path)
        if self.found and logits is not None:
            require_finite("the logits of a batch", logits)
        call = _by_row(calls[-1], logits if self.found else None, batch.rows) if calls else None
        if call is None:
            shape = f"an input of shape {tuple(calls[-1].entered.shape)}" if calls else "no input"
            raise SteerError(
                f"the classifier {self.path!r} takes one vector per row; for a batch of {batch.rows} rows it was given "
                f"{shape}. Name the right layer with `head`."
            )
        require_finite(f"what enters {self.path!r}", call.entered)
        return call


def _find(model: nn.Module, batch: Batch, head: str | None) -> _Classifier:
    """Find the last `nn.Linear` whose output is what the model returns as logits, or take the one that is named."""
    linears = {path: module for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    if head is not None:
        if not isinstance(head, str) or head not in linears:
            raise SteerError(f"`head` is the path of an nn.Linear, such as {list(linears)[-1:]}; received {head!r}.")
        return _Classifier(head, linears[head], False)
    logits = _logits(batch.run(model))
    if logits is None or logits.dim() != 2 or len(logits) != batch.rows:
        shape = "none" if logits is None else str(tuple(logits.shape))
        raise SteerError(
            f"neural collapse is measured on a classifier, whose logits are (rows, classes); for {batch.rows} rows "
            f"this {type(model).__name__} gave {shape}. Name a linear layer with one vector per row with `head`."
        )
    require_finite("the logits of a batch", logits)
    tried = {path: linear for path, linear in linears.items() if linear.out_features == logits.shape[1]}
    with record(tried) as seen:
        logits = _logits(batch.run(model))
    found = [path for path, calls in seen.calls.items() if _by_row(calls[-1], logits, batch.rows)]
    if not found:
        raise SteerError(
            f"the classifier is the last nn.Linear whose output is the model's logits, and no layer of this "
            f"{type(model).__name__} gives them (tried: {', '.join(tried) or 'none has as many outputs'}). Name the "
            "layer with `head`."
        )
    return _Classifier(found[-1], linears[found[-1]], True)


def _logits(output: Any) -> Tensor | None:
    """Return the logits in a model's output: the tensor itself, or `.logits`."""
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    return logits if isinstance(logits, Tensor) else None


def _by_row(call: Call, logits: Tensor | None, rows: int) -> Call | None:
    """Return one vector per row: all that entered, or, where every token did, the one whose output is the row's logits.

    `logits` is what has to be found; None takes what entered as it is.
    """
    left = call.left if logits is None else call.left.to(logits.dtype)
    if len(left) != rows:
        return None
    if left.dim() == 2:
        return call if logits is None or torch.equal(left, logits) else None
    if left.dim() != 3 or logits is None:
        return None
    same = (left == logits[:, None]).all(-1)
    if not bool(same.any(1).all()):
        return None
    at = torch.arange(rows, device=same.device), same.int().argmax(1)
    return Call(call.entered[at], call.left[at])


def _labelled(model: nn.Module, batch: Batch, classifier: _Classifier) -> tuple[Tensor, Tensor, Tensor]:
    """Return features in fp64, labels and logits of the rows that count, or raise if labels are no class indices."""
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
    call = classifier.features(model, batch)
    features = exact(call.entered[counts])
    return features, labels[counts].to(features.device), exact(call.left[counts])


def _require_simplex(classes: int, width: int) -> None:
    """Raise if there are fewer than two classes, or more than a simplex can have corners."""
    if classes < 2:
        raise SteerError(f"neural collapse is of two classes or more; the loader has rows of {classes}.")
    if classes > width + 1:
        raise SteerError(
            f"neural collapse is towards a simplex of one corner per class, which {classes} classes have in "
            f"{classes - 1} dimensions and more; these features have {width}."
        )


def _within(within: Tensor, means: Tensor) -> float:
    """Return NC1, with the pseudo-inverse of Σ_B from the singular values of the centred means; raise if all are 0."""
    _, values, directions = torch.linalg.svd(means - means.mean(0), full_matrices=False)
    # what rounding makes of one that is 0 is left out: the last, where there are no more classes than features
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
