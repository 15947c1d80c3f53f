"""How far an adapted model moves the stream from the frozen trajectory, on its task and on other data."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from ._moments import Sums
from ._results import Axes, Figure, Table, lines, table_of
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
        columns: dict[str, tuple[str, Iterable[Any]]] = {
            "layer": ("block", range(len(self.task))),
            "task": ("drift on the task", self.task),
        }
        if self.other is not None and self.interference is not None:
            columns |= {"other": ("drift on other data", self.other), "ratio": ("other / task", self.interference)}
        note = "Mean over tokens of ‖z_adapted − z_frozen‖ / ‖z_frozen‖ behind each block."
        return table_of("Drift from the frozen trajectory", columns, note)

    def plot(self, ax: Axes | None = None) -> Figure:
        """Draw the drift against the block."""
        series = {"task": self.task} if self.other is None else {"task": self.task, "other data": self.other}
        return lines(ax, "Drift from the frozen trajectory", "block", "relative drift", series)


def drift(
    model: nn.Module, task: Iterable[Any], other: Iterable[Any] | None = None, *, reference: nn.Module | None = None
) -> Drift:
    """Measure how far the stream of an adapted model is from the frozen one's, token by token, at every block.

    `task` and `other` are loaders; on other data than the task's, drift is interference with what the backbone knew.
    Tokens whose frozen state is 0 are left out.
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
