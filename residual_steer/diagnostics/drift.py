"""How far an adapted model moves the stream from the frozen trajectory, on its task and on other data."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from residual_steer.report import Axis, Column, Plot, Series, Table
from residual_steer.tokens import prefix_tokens

from .pairs import Pair, compared
from .stream import beside, states_of

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
        columns = [Column("layer", "block"), Column("task", "drift on the task", digits=4)]
        rows: list[dict[str, float | int | None]] = [
            {"layer": layer, "task": value} for layer, value in enumerate(self.task)
        ]
        if self.other is not None and self.interference is not None:
            columns += [Column("other", "drift on other data", digits=4), Column("ratio", "other / task")]
            for row, other, ratio in zip(rows, self.other, self.interference, strict=True):
                row.update(other=other, ratio=ratio)
        note = "Mean over tokens of ‖z_adapted − z_frozen‖ / ‖z_frozen‖ behind each block."
        return Table("Drift from the frozen trajectory", tuple(columns), tuple(rows), (note,))

    def plot(self) -> Plot:
        """Return the drift against the block."""
        blocks = tuple(range(len(self.task)))
        lines = [Series("task", blocks, self.task)]
        if self.other is not None:
            lines.append(Series("other data", blocks, self.other))
        return Plot("Drift from the frozen trajectory", "lines", Axis("block"), Axis("relative drift"), tuple(lines))


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
    with compared(model, reference) as pair:
        on_task, tokens = _measure(pair, task)
        if other is None:
            return Drift(on_task, None, (tokens,))
        on_other, more = _measure(pair, other)
    return Drift(on_task, on_other, (tokens, more))


def _measure(pair: Pair, loader: Iterable[Any]) -> tuple[tuple[float, ...], int]:
    """Return the mean drift at every block, and how many tokens there were."""
    blocks = range(len(pair.backbone("adapted").blocks))
    prefix = prefix_tokens(pair.inner("frozen"))
    sums, counts = [0.0 for _ in blocks], [0 for _ in blocks]
    for batch in pair.batches(loader):
        seen = []
        for side in ("frozen", "adapted"):
            with pair.on(side) as model:
                seen.append(states_of(model, pair.backbone(side), batch, blocks))
        frozen, adapted = seen
        for index in blocks:
            z = frozen[index]
            real = batch.real(z.shape[:2], z.device)
            moved, length = (beside(adapted[index], z, prefix) - z)[real].norm(dim=-1), z[real].norm(dim=-1)
            there = length > 0
            sums[index] += float((moved[there] / length[there]).sum())
            counts[index] += int(there.sum())
    return tuple(total / max(count, 1) for total, count in zip(sums, counts, strict=True)), counts[-1]
