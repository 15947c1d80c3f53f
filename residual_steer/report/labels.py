"""Where labels of points go, so that none covers another, a point, or the frame.

Boxes are (left, bottom, right, top) in pixels. Each label has a ring of places around its point, near ones first; a
search with backtracking takes the first combination in which nothing overlaps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .styles import INK, QUIET

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Box", "Mark", "doubtful", "overlap", "place", "write_labels"]

Box = tuple[float, float, float, float]
_ANGLES = (0, 90, 270, 180, 45, 315, 135, 225, 22, 338, 158, 202, 67, 293, 113, 247)
_MOST = 20_000  # steps of the search
_SIZES = (9.5, 8.5, 7.5)  # points of type, until all labels fit
_MARKER = 6.0  # points from a marker's middle to its edge, and some air


@dataclass(frozen=True)
class Mark:
    """A point of a scatter plot, in the data's units.

    Attributes:
        x: along the bottom.
        y: along the left.
        across: half the length of its bar of error along x.
        up: half the length of its bar of error along y.
        label: beside it; "" for none.
    """

    x: float
    y: float
    across: float
    up: float
    label: str


def write_labels(axes: Axes, marks: Sequence[Mark]) -> bool:
    """Write the labels of `marks` into axes whose limits and layout are settled; False, and none, if they do not fit.

    Bars of error are kept free too, unless there is no other place.
    """
    figure: Any = axes.figure
    if figure is None:
        return False
    figure.draw_without_rendering()
    to_pixels, dots = axes.transData.transform, figure.dpi / 72
    middles = [tuple(to_pixels((mark.x, mark.y))) for mark in marks]
    markers = [(x - r, y - r, x + r, y + r) for (x, y), r in zip(middles, [_MARKER * dots] * len(marks), strict=True)]
    bars = [box for mark in marks for box in _bars_of(mark, axes, 2 * dots)]
    extent = axes.get_window_extent()
    frame = (extent.x0 + 3 * dots, extent.y0 + 3 * dots, extent.x1, extent.y1)
    named = [index for index, mark in enumerate(marks) if mark.label]
    for obstacles in ([*markers, *bars], markers):
        for size in _SIZES:
            texts = [axes.text(0, 0, marks[index].label, fontsize=size) for index in named]
            extents = [text.get_window_extent() for text in texts]
            for text in texts:
                text.remove()
            sizes = [(found.width + 3 * dots, found.height + 2 * dots) for found in extents]
            points = [middles[index] for index in named]
            boxes = place(points, sizes, frame, obstacles, (_MARKER + 1) * dots)
            if boxes is not None:
                for index, box in zip(named, boxes, strict=True):
                    others = [middle for middle in middles if middle != middles[index]]
                    led = doubtful(box, middles[index], others) or _gap(box, middles[index]) > 2 * _MARKER * dots
                    _write(axes, marks[index], middles[index], (box, led), size)
                return True
    return False


def _write(axes: Axes, mark: Mark, middle: tuple[float, float], place: tuple[Box, bool], size: float) -> None:
    """Write one label into its box, and lead a thin line to it if that is asked for."""
    box, led = place
    dots = axes.figure.dpi / 72
    nearest = _nearest(box, middle)
    axes.annotate(
        mark.label,
        (mark.x, mark.y),
        ((box[0] - middle[0]) / dots + 1.5, (box[1] - middle[1]) / dots + 1),
        textcoords="offset points",
        fontsize=size,
        color=INK,
        ha="left",
        va="bottom",
        zorder=4,
    )
    if led:
        axes.annotate(
            "",
            (mark.x, mark.y),
            ((nearest[0] - middle[0]) / dots, (nearest[1] - middle[1]) / dots),
            textcoords="offset points",
            arrowprops={"arrowstyle": "-", "color": QUIET, "linewidth": 0.8, "shrinkA": 0, "shrinkB": _MARKER},
        )


def _bars_of(mark: Mark, axes: Axes, half: float) -> list[Box]:
    """Return what the bars of error cover, `half` pixels to either side."""
    (left, _), (right, _), (_, low), (_, high) = (
        axes.transData.transform(end)
        for end in (
            (mark.x - mark.across, mark.y),
            (mark.x + mark.across, mark.y),
            (mark.x, mark.y - mark.up),
            (mark.x, mark.y + mark.up),
        )
    )
    x, y = axes.transData.transform((mark.x, mark.y))
    ends = [(left, y - half, right, y + half)] if mark.across else []
    ends += [(x - half, low, x + half, high)] if mark.up else []
    return [box for box in ends if all(map(math.isfinite, box))]


def place(
    points: Sequence[tuple[float, float]],
    sizes: Sequence[tuple[float, float]],
    frame: Box,
    obstacles: Sequence[Box],
    distance: float,
) -> list[Box] | None:
    """Return a box for each label; None if no place was found for all of them.

    Args:
        points: what is labelled, as (x, y) in pixels.
        sizes: width and height of each label.
        frame: what labels stay within.
        obstacles: what they must not cover, the points' own markers among them.
        distance: of the nearest places from the point.
    """
    choices = []
    for point, size in zip(points, sizes, strict=True):
        boxes = [_box(point, size, distance * reach, angle) for reach in (1, 1.6, 2.4, 3.5, 5) for angle in _ANGLES]
        free = [box for box in boxes if _within(box, frame) and not any(overlap(box, other) for other in obstacles)]
        others = [other for other in points if other != point]
        clear = [box for box in free if not doubtful(box, point, others)]
        choices.append(clear + [box for box in free if box not in clear])
    order = sorted(range(len(points)), key=lambda index: (len(choices[index]), index))
    found: dict[int, Box] = {}
    steps = [0]

    def search(depth: int) -> bool:
        if depth == len(order):
            return True
        for box in choices[order[depth]]:
            steps[0] += 1
            if steps[0] > _MOST:
                return False
            if not any(overlap(box, other) for other in found.values()):
                found[order[depth]] = box
                if search(depth + 1):
                    return True
                del found[order[depth]]
        return False

    return [found[index] for index in range(len(points))] if search(0) else None


def overlap(one: Box, other: Box) -> bool:
    """Say whether two boxes share any area."""
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def doubtful(box: Box, point: tuple[float, float], others: Sequence[tuple[float, float]]) -> bool:
    """Say whether a label could be taken for another point's: one that is not clearly further away than its own."""
    return any(_gap(box, other) < 1.7 * _gap(box, point) for other in others)


def _gap(box: Box, point: tuple[float, float]) -> float:
    """Return how far a point is from a box."""
    return math.dist(_nearest(box, point), point)


def _nearest(box: Box, point: tuple[float, float]) -> tuple[float, float]:
    return (min(max(point[0], box[0]), box[2]), min(max(point[1], box[1]), box[3]))


def _within(box: Box, frame: Box) -> bool:
    return box[0] >= frame[0] and box[1] >= frame[1] and box[2] <= frame[2] and box[3] <= frame[3]


def _box(point: tuple[float, float], size: tuple[float, float], distance: float, angle: float) -> Box:
    """Return a label's box in a direction from its point, whose nearest edge or corner is `distance` away."""
    across, up = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    x = point[0] + distance * across + (across - 1) / 2 * size[0]
    y = point[1] + distance * up + (up - 1) / 2 * size[1]
    return (x, y, x + size[0], y + size[1])
