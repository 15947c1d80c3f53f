"""Neural collapse (Papyan, Han and Donoho 2020, arXiv 2008.08186): how far features and classifier are from a simplex.

The paper of this library says of H-Res that it "brings neural collapse" (claim 6), without numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from residual_steer._batches import Batch, batches, check_loader, require_finite
from residual_steer._checks import check_model
from residual_steer.errors import SteerError
from residual_steer.recording import record, uncompiled, undisturbed
from residual_steer.training.losses import IGNORE

from ._moments import ClassMoments, exact
from ._results import Axes, Figure, Table, bars, lines, table_of

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

    With features h of rows, class means μ_c, μ_G = mean_c μ_c, which gives classes of any size the same weight, Σ_W =
    mean over rows of (h − μ_c)(h − μ_c)ᵀ and Σ_B = mean_c (μ_c − μ_G)(μ_c − μ_G)ᵀ; deviations are divided by the count.

    Attributes:
        nc1: variability collapse, tr(Σ_W Σ_B⁺) / C.
        nc2_norms: of the class means, which become a simplex, std_c ‖μ_c − μ_G‖ / mean_c ‖μ_c − μ_G‖.
        nc2_spread: the standard deviation of cos(μ_c − μ_G, μ_c' − μ_G) over c ≠ c'.
        nc2_angles: the mean of |cos(μ_c − μ_G, μ_c' − μ_G) + 1/(C − 1)| over c ≠ c'.
        weight_norms, weight_spread, weight_angles: the same of the rows w_c of the classifier, which are not centred.
        nc3: self-duality, ‖W / ‖W‖_F − M / ‖M‖_F‖_F², with the μ_c − μ_G as rows of M; from 0 to 4. It and the measures
            of w_c are None for a classifier whose weights are all 0, as a new head's may be.
        nc4: the share of rows for which the class of the nearest mean is not the class of the largest logit.
        classes, rows: C, the classes that have rows, and how many rows were measured.
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
        values = [getattr(self, name) for name in _NAMES]
        notes = [f"{self.rows:,} rows of {self.classes} classes, of what enters {self.head!r}; 0 is full collapse."]
        if self.absent:
            notes.append(f"Left out, as no row has them: {len(self.absent)} more classes of the classifier.")
        if self.classes == 2:
            notes.append("With two classes the NC2 of class means are 0 whatever the features are.")
        columns = {"measure": ("measure", _NAMES.values()), "value": ("value", values)}
        return table_of("Neural collapse", columns, *notes)

    def plot(self, ax: Axes | None = None) -> Figure:
        """Draw the measures as bars."""
        values = {name.replace("_", " "): getattr(self, name) for name in _NAMES}
        return bars(ax, "Neural collapse", "distance from collapse", values)


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
        steps, found = zip(*sorted(self.found.items()), strict=True)
        names = {"nc1": "NC1", "nc2_angles": "NC2", "nc3": "NC3", "nc4": "NC4"}
        columns = {key: (head, [getattr(one, key) for one in found]) for key, head in names.items()}
        note = "NC2 is the distance of the class means' cosines from those of a simplex."
        return table_of(self.title, {"step": ("step", steps), **columns}, note)

    def plot(self, ax: Axes | None = None) -> Figure:
        """Draw the measures against the step."""
        table = self.table()
        at, *series = ([row[key] for row in table.rows] for key in table.columns)
        named = dict(zip(list(table.columns.values())[1:], series, strict=True))
        return lines(ax, self.title, "step", "distance from collapse", named, at=at, log=True)


def collapse_over_training(
    found: Mapping[int, NeuralCollapse], *, title: str = "Collapse over training"
) -> CollapseOverTraining:
    """Put measurements between calls of `fit` side by side, by step, under a title.

    >>> found = {0: neural_collapse(model, valid)}
    >>> for step in range(100, 600, 100):
    ...     fit(model, train, steps=100, warmup=0, schedule="constant")  # each call begins with a fresh optimizer
    ...     found[step] = neural_collapse(model, valid)
    >>> figure = collapse_over_training(found).plot()

    Raises:
        SteerError: there is nothing to show.
    """
    if not found:
        raise SteerError("collapse over training is made of at least one measurement; received none.")
    return CollapseOverTraining(title, dict(found))


def neural_collapse(model: nn.Module, loader: Iterable[Any], *, head: str | None = None) -> NeuralCollapse:
    """Measure neural collapse at the last linear layer of a classifier (arXiv 2008.08186, § 2 and figures 2 to 7).

    The model is any classifier, and its loader has labels `(rows,)`; rows with the label -100 are left out. It is read
    twice, for the class means and then for NC4. `head` is the path of the classifier, an `nn.Linear`; None looks for
    the last one whose output the model returns as logits, also where it runs at every token and the model takes one.

    Raises:
        SteerError: no classifier is found; labels are missing, not one per row, or no class of the classifier; rows of
            fewer than two classes, or of more than the width + 1, of which there is no simplex; equal class means; NaN
            or infinity; a loader that is empty, an iterator, or gives other rows at the second reading.
    """
    check_loader("loader", loader, read="twice")
    model = uncompiled(check_model(model))  # so that `head` is a path in it
    with undisturbed(model):
        rest = batches(model, loader)
        first = next(rest)
        classifier = _Classifier(model, first, head)
        linear = classifier.linear
        moments = ClassMoments(linear.out_features, linear.in_features, exact(linear.weight).device)
        for batch in chain([first], rest):
            moments.add(*classifier.rows(batch)[:2])
        present = moments.counts.nonzero().squeeze(1)
        means = moments.means[present]
        classes, width = means.shape
        if not 2 <= classes <= width + 1:
            raise SteerError(
                f"neural collapse is towards a simplex, which has 2 to {width + 1} corners in the {width} dimensions "
                f"of these features; the loader has rows of {classes} classes."
            )
        centred, rows = means - means.mean(0), int(moments.counts.sum())
        wrong = again = 0
        for batch in batches(model, loader):
            features, _, logits = classifier.rows(batch)
            nearest = torch.cdist(features - means.mean(0), centred).argmin(1)
            wrong += int((nearest != logits[:, present].argmax(1)).sum())
            again += len(features)
        if again != rows:
            raise SteerError(
                f"`loader` gives the same rows at each reading; it gave {rows} and then {again}. Switch off what "
                "draws them at random."
            )
        weight = exact(linear.weight)[present]
        of_weights: tuple[float | None, ...] = (None,) * 4
        if bool(weight.any()):
            nc3 = float((weight / weight.norm() - centred / centred.norm()).square().sum())
            of_weights = (*_simplex(weight), nc3)
        values = _within(moments.within / rows, means), *_simplex(centred), *of_weights, wrong / rows
        measures: dict[str, Any] = dict(zip(_NAMES, values, strict=True))
        absent = tuple((moments.counts == 0).nonzero().squeeze(1).tolist())
        return NeuralCollapse(**measures, classes=classes, rows=rows, absent=absent, head=classifier.path)


class _Classifier:
    """The last linear layer of a model: the one at a path, or else the last whose output is the model's logits."""

    def __init__(self, model: nn.Module, batch: Batch, head: str | None) -> None:
        linears = {path: module for path, module in model.named_modules() if isinstance(module, nn.Linear)}
        self._model, self._named = model, head is not None
        if head is not None and (not isinstance(head, str) or head not in linears):
            raise SteerError(f"`head` is the path of an nn.Linear, such as {list(linears)[-1:]}; received {head!r}.")
        self.path = self._find(linears, batch) if head is None else head
        self.linear = linears[self.path]

    def _find(self, linears: dict[str, nn.Linear], batch: Batch) -> str:
        """Return the path of the last layer whose output is the logits of a batch."""
        kind, logits = type(self._model).__name__, _logits(batch.run(self._model))
        if logits is None or logits.dim() != 2 or len(logits) != batch.rows:
            shape = "none" if logits is None else str(tuple(logits.shape))
            raise SteerError(
                f"neural collapse is measured on a classifier, whose logits are (rows, classes); for {batch.rows} rows "
                f"this {kind} gave {shape}. Name a linear layer with one vector per row with `head`."
            )
        require_finite("the logits of a batch", logits)
        tried = {path: linear for path, linear in linears.items() if linear.out_features == logits.shape[1]}
        with record(tried) as seen:
            logits = _logits(batch.run(self._model))
        found = [path for path, calls in seen.calls.items() if _by_row(calls[-1].left, logits, batch.rows)]
        if not found:
            raise SteerError(
                f"the classifier is the last nn.Linear whose output is the model's logits, and no layer of this {kind} "
                f"gives them (tried: {', '.join(tried) or 'none has as many outputs'}). Name it with `head`."
            )
        return str(found[-1])

    def rows(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Return features in fp64, labels and logits of the rows that count, or raise if labels are no classes."""
        labels, classes = batch.labels, self.linear.out_features
        fits = labels is not None and labels.shape == (batch.rows,) and labels.dtype != torch.bool
        if labels is None or not fits or labels.is_floating_point():
            given = "none" if labels is None else f"{labels.dtype} of shape {tuple(labels.shape)}"
            raise SteerError(
                f"neural collapse needs a class index for each row, (rows,): 'labels' in a dict, or the second of a "
                f"pair; received {given} for {batch.rows} rows."
            )
        counts = labels != IGNORE
        wrong = labels[counts & ((labels < 0) | (labels >= classes))]
        if len(wrong):
            raise SteerError(
                f"the classifier {self.path!r} has classes 0 to {classes - 1}; a label is {int(wrong[0])}. Give the "
                "labels that it was trained on, or name another layer with `head`."
            )
        with record({self.path: self.linear}) as seen:
            logits = _logits(batch.run(self._model))
        if self._named:
            logits = None
        elif logits is not None:
            require_finite("the logits of a batch", logits)
        calls = seen.calls.get(self.path)
        at = _by_row(calls[-1].left, logits, batch.rows) if calls else None
        if calls is None or at is None:
            shape = f"an input of shape {tuple(calls[-1].entered.shape)}" if calls else "no input"
            raise SteerError(
                f"the classifier {self.path!r} takes one vector per row; for a batch of {batch.rows} rows it was given "
                f"{shape}. Name the right layer with `head`."
            )
        entered, left = calls[-1].entered[at], calls[-1].left[at]
        require_finite(f"what enters {self.path!r}", entered)
        features = exact(entered[counts])
        return features, labels[counts].to(features.device), exact(left[counts])


def _logits(output: Any) -> Tensor | None:
    """Return the logits in a model's output: the tensor itself, or `.logits`."""
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    return logits if isinstance(logits, Tensor) else None


def _by_row(left: Tensor, logits: Tensor | None, rows: int) -> Any:
    """Return where in a layer's output, `(rows, [tokens,] classes)`, each row's logits stand (None: any one vector)."""
    if len(left) != rows:
        return None
    if left.dim() == 2:
        return ... if logits is None or torch.equal(left.to(logits.dtype), logits) else None
    if left.dim() != 3 or logits is None:
        return None
    same = (left.to(logits.dtype) == logits[:, None]).all(-1)
    return (torch.arange(rows, device=same.device), same.int().argmax(1)) if bool(same.any(1).all()) else None


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
