"""Pictures: the same bytes each time, no label over another one, and the user's matplotlib left alone."""

import random
import re
import struct
import sys
import xml.etree.ElementTree as ElementTree

import pytest

import residual_steer as rs
from report_samples import METHODS, bars, curves, ranks, tradeoff
from residual_steer.report import Axis, Measured, Plot, Series
from residual_steer.report.labels import doubtful, overlap, place
from residual_steer.report.plots import DPI, alt_text, draw, png, remarks, svg

matplotlib = pytest.importorskip("matplotlib")


def plot(kind="lines", *series, log=False):
    return Plot("p", kind, Axis("x", log=log), Axis("y", log=log), series)


@pytest.mark.parametrize("make", [tradeoff, curves, bars, ranks])
def test_equal_plots_are_equal_bytes_and_the_users_settings_stay(make):
    before = dict(matplotlib.rcParams)
    first = svg(make())
    with matplotlib.rc_context({"font.family": "monospace", "axes.titlecolor": "red", "svg.hashsalt": None}):
        changed = dict(matplotlib.rcParams)
        assert svg(make()) == first
        assert dict(matplotlib.rcParams) == changed
    assert dict(matplotlib.rcParams) == before
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()
    root = ElementTree.fromstring(first)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert "<metadata" not in first
    assert not re.search(r"\d{4}-\d\d-\d\d", first)


def test_a_png_of_its_size():
    content = png(tradeoff())
    assert content == png(tradeoff())
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", content[16:24])
    assert width == round(7.2 * DPI)
    assert height == round(4.4 * DPI)
    assert b"Software" not in content


def boxes_of(figure):
    """The labels' boxes, the markers' and the frame, as drawn."""
    figure.draw_without_rendering()
    (axes,) = figure.axes
    labels = {text.get_text(): tuple(text.get_window_extent().extents) for text in axes.texts if text.get_text()}
    radius = 4.5 * figure.dpi / 72
    markers = []
    for line in axes.lines:
        if line.get_marker() not in {"None", "|", "_", None} and not line.get_label().startswith("_"):
            for x, y in axes.transData.transform(list(zip(*line.get_data(), strict=True))):
                markers.append((x - radius, y - radius, x + radius, y + radius))
    return labels, markers, tuple(axes.get_window_extent().extents)


def nothing_overlaps(figure, names):
    labels, markers, frame = boxes_of(figure)
    assert set(labels) == set(names)
    boxes = list(labels.values())
    for index, box in enumerate(boxes):
        assert box[0] >= frame[0] - 1
        assert box[1] >= frame[1] - 1
        assert box[2] <= frame[2] + 1
        assert box[3] <= frame[3] + 1
        assert not any(overlap(box, other) for other in boxes[index + 1 :])
        assert not any(overlap(box, marker) for marker in markers)
    return markers


@pytest.mark.parametrize("seed", range(4))
def test_labels_of_eight_methods_neither_overlap_nor_leave_the_frame(seed):
    figure = draw(tradeoff(seed))
    assert len(nothing_overlaps(figure, METHODS)) == 8
    assert not figure.legends


def test_crowded_labels_find_a_place_or_become_a_legend():
    rng = random.Random(3)
    crowd = plot("scatter", *(Series(name, (rng.gauss(0, 1),), (rng.gauss(0, 0.2),)) for name in METHODS))
    nothing_overlaps(draw(crowd), METHODS)
    heap = plot("scatter", *(Series(f"{name} {'at the same place ' * 4}", (1.0,), (1.0,)) for name in METHODS))
    figure = draw(heap)
    assert boxes_of(figure)[0] == {}
    assert len(figure.legends[0].get_texts()) == 8


def test_points_with_labels_of_their_own_have_a_legend_too():
    figure = draw(ranks())
    assert {text.get_text() for text in figure.legends[0].get_texts()} == set(METHODS[:3])
    assert [text.get_text() for text in figure.axes[0].texts].count("r = 16") == 3


def test_places_of_labels():
    frame = (0.0, 0.0, 100.0, 100.0)
    (box,) = place([(50.0, 50.0)], [(20.0, 10.0)], frame, [], 5)
    assert box == pytest.approx((55, 45, 75, 55))  # at the right, in the middle
    (box,) = place([(95.0, 50.0)], [(20.0, 10.0)], frame, [], 5)
    assert box[2] <= 100
    (box,) = place([(50.0, 50.0)], [(20.0, 10.0)], frame, [(54.0, 0.0, 100.0, 100.0)], 5)
    assert box[2] <= 54
    assert place([(50.0, 50.0)], [(120.0, 10.0)], frame, [], 5) is None
    assert place([(50.0, 50.0)] * 60, [(40.0, 20.0)] * 60, frame, [], 5) is None
    assert place([], [], frame, [], 5) == []


def test_a_label_goes_elsewhere_where_it_leaves_no_place_for_another():
    """The first place that is free for each in turn does not do here."""
    points = [(23.0, 49.0), (77.0, 25.0), (44.0, 26.0), (47.0, 14.0)]
    markers = [(x - 4, y - 4, x + 4, y + 4) for x, y in points]
    found = place(points, [(41.0, 10.0)] * 4, (0.0, 0.0, 100.0, 60.0), markers, 6)
    assert found is not None
    assert not any(overlap(box, other) for index, box in enumerate(found) for other in [*found[:index], *markers])


def test_a_label_is_not_taken_for_another_points():
    others = [(50.0, 50.0), (78.0, 50.0)]
    (left, _) = place(others, [(10.0, 8.0)] * 2, (0.0, 0.0, 100.0, 100.0), [], 6)
    assert not doubtful(left, others[0], others[1:])
    assert doubtful((60.0, 46.0, 70.0, 54.0), others[0], others[1:])
    assert not doubtful((56.0, 46.0, 61.0, 54.0), others[0], others[1:])


def heights(figure):
    return sorted(round(patch.get_height(), 6) for patch in figure.axes[0].patches)


def test_bars_stand_where_they_should():
    two = plot("bars", Series("a", ("x", "y"), (1.0, 2.0)), Series("b", ("y", "z"), (Measured(3, 0.5, 4), None)))
    figure = draw(two)
    assert heights(figure) == [1, 2, 3]
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["x", "y", "z"]
    middles = [patch.get_x() + patch.get_width() / 2 for patch in figure.axes[0].patches]
    assert middles == pytest.approx([-0.2, 0.8, 1.2])
    assert figure.axes[0].get_ylim()[0] == 0
    assert remarks(two) == ["Not drawn: 1 point (not a finite number, or not positive on a logarithmic axis)."]
    (error,) = [c for c in figure.axes[0].collections if len(c.get_segments())]
    assert error.get_segments()[0][:, 1] == pytest.approx([2.5, 3.5])


def test_lines_have_bands_gaps_and_an_order():
    series = Series("a", (3, 1, 2), (Measured(3, 0.5, 4), Measured(1, 0.5, 4), None))
    figure = draw(plot("lines", series))
    (line,) = figure.axes[0].lines
    assert list(line.get_xdata()) == [1, 2, 3]
    assert str(line.get_ydata()[1]) == "nan"
    (band,) = figure.axes[0].collections
    reach = [point for path in band.get_paths() for point in path.vertices[:, 1]]
    assert (min(reach), max(reach)) == (0.5, 3.5)
    single = draw(plot("lines", Series("a", (1, 2), (Measured(1, 0, 1), 2.0))))
    assert not single.axes[0].collections


def test_logarithmic_axes_say_plain_numbers_and_leave_out_what_they_cannot_show():
    crossing = plot("lines", Series("a", (0, 1, 10, 100), (1.0, -1.0, Measured(0.02, 0.05, 3), 5000.0)), log=True)
    assert remarks(crossing)[0].startswith("Not drawn: 2 points")
    assert remarks(curves()) == []
    figure = draw(crossing)
    figure.draw_without_rendering()
    told = [tick.get_text() for tick in figure.axes[0].get_yticklabels()]
    assert {"0.1", "1,000"} <= set(told)
    (band,) = figure.axes[0].collections
    assert min(point[1] for path in band.get_paths() for point in path.vertices) == 0.01  # and not below zero
    assert figure.axes[0].get_ylim()[0] > 0.001
    assert "$" not in "".join(told)
    svg(crossing)


def test_texts_mean_what_they_say():
    name = "$5 & <b> \\alpha_x $"
    picture = svg(plot("lines", Series(name, (1,), (1.0,)), Series("b", (1,), (2.0,))))
    ElementTree.fromstring(picture)
    assert "<b>" not in picture
    texts = draw(plot("lines", Series(name, (1,), (1.0,)), Series("b", (1,), (2.0,)))).legends[0].get_texts()
    assert not any(text.get_parse_math() for text in texts)  # a dollar is no mathematics
    assert alt_text(tradeoff()).startswith("Quality against speed. Points: validation loss (nats per token) against")


def test_without_matplotlib_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for drawn in (svg, png, draw):
        with pytest.raises(rs.SteerError, match=r"pip install 'residual-steer\[plots\]'"):
            drawn(tradeoff())
