"""How far an adapted model moves the stream from the frozen trajectory, on its task and on other data."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from ._moments import Sums
from ._plots import Axes, Figure, lines
from ._table import Table
from .compare import Pair, compare

__all__ = ["Drift", "drift"]


@dataclass(frozen=True)
class Drift:
    """The mean of ‖z_adapted − z_frozen‖ / ‖z_frozen‖ over tokens, of the stream that leaves each block.

    Attributes:
        task: by block, on data of the task.
        other: by block, on other data; None if there were none.
        tokens: how many tokens of each were measured.
    """

    task: tuple[float, ...]
    other: tuple[float, ...] | None
    tokens: tuple[int, ...]

    @property
    def interference(self) -> tuple[float | None, ...] | None:
        """The ratio of other to task by block: 0 is no interference, 1 as much drift as on the task itself."""
        if self.other is None:
            return None
        return tuple(other / task if task else None for other, task in zip(self.other, self.task, strict=True))

    @property
    def final_interference(self) -> float | None:
        """The interference behind the last block; None without other data or without drift on the task."""
        return None if self.interference is None else self.interference[-1]

    def table(self) -> Table:
        """Return one row for every block."""
        columns = {"layer": "block", "task": "drift on the task"}
        rows: list[dict[str, Any]] = [{"layer": layer, "task": value} for layer, value in enumerate(self.task)]
        if self.other is not None and self.interference is not None:
            columns |= {"other": "drift on other data", "ratio": "other / task"}
            for row, other, ratio in zip(rows, self.other, self.interference, strict=True):
                row.update(other=other, ratio=ratio)
        note = "Mean over tokens of ‖z_adapted − z_frozen‖ / ‖z_frozen‖ behind each block."
        return Table("Drift from the frozen trajectory", columns, tuple(rows), (note,))

    def plot(self, ax: Axes | None = None) -> Figure:
        """Draw the drift against the block."""
        series = {"task": self.task} if self.other is None else {"task": self.task, "other data": self.other}
        return lines(ax, "Drift from the frozen trajectory", "block", "relative drift", series)


def drift(
    model: nn.Module, task: Iterable[Any], other: Iterable[Any] | None = None, *, reference: nn.Module | None = None
) -> Drift:
    """Measure how far the stream of an adapted model is from the frozen one's, token by token, at every block.

    On other data than the task's, it is interference with what the backbone knew. Tokens that a method puts into the
    stream are left out: they are known by their place, before a text and behind the first tokens of an image, such as
    CLS. Padding and tokens whose frozen state is 0 are left out too; padding counts in an encoder-decoder, whose mask
    is not that of both halves.

    Args:
        model: a steered model; with a reference, one that was adapted by any method.
        task: batches of the task; labels are not needed. It is read once.
        other: batches of something else.
        reference: the frozen model; None is the same model with its fields off.

    Raises:
        SteerError: the model is neither steered nor given a reference, the two are not of one backbone, a loader gives
            nothing, a state is NaN or infinite.
    """
    with compare(model, reference) as pair:
        on_task, tokens = _measure(pair, task)
        if other is None:
            return Drift(on_task, None, (tokens,))
        on_other, more = _measure(pair, other)
    return Drift(on_task, on_other, (tokens, more))


def _measure(pair: Pair, loader: Iterable[Any]) -> tuple[tuple[float, ...], int]:
    """Return the mean drift at every block, and how many tokens there were behind the last."""
    sums, blocks = Sums(), range(len(pair.backbones["adapted"].blocks))
    for batch in pair.batches(loader):
        for index, (frozen, adapted) in pair.states(batch, blocks).items():
            moved, length = (adapted - frozen).norm(dim=-1), frozen.norm(dim=-1)
            there = length > 0
            sums.add(("moved", index), (moved[there] / length[there]).sum())
            sums.add(("tokens", index), there.sum())
    means = sums.layers("moved") / sums.layers("tokens").clamp_min(1)
    return tuple(means.tolist()), int(sums["tokens", blocks[-1]])
