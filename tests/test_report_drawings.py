"""Heat maps, surfaces and arrows as they are drawn: the right things, in the right place, that can be read."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from picture_samples import STREAM, arrows, flow, forgetting, matrix, surface
from residual_steer.report import Arrows, Axis, Flow, Trajectory
from residual_steer.report.plots import draw, remarks, svg
from residual_steer.report.quivers import factor_of
from residual_steer.report.scales import Scale, levels_of, plain, ticks_of
from residual_steer.report.styles import colors_for, styles_for

matplotlib = pytest.importorskip("matplotlib")

LONG = "a very long name of a task that goes on, "
CLASSES = tuple(f"class {index}" for index in range(10))
SAMPLES = {
    "forgetting": forgetting(),
    "one cell": matrix(1, 1),
    "one row": matrix(1, 8, scale=100),
    "one column": matrix(8, 1, scale=100),
    "twelve": matrix(12, 12),
    "many": matrix(48, 32),
    "long": matrix(
        3,
        6,
        title="A title that cannot stand in one line, and goes on to a second one, with words",
        rows=(LONG * 2, LONG, "short"),
        columns=tuple(f"{LONG}{index}" for index in range(6)),
        y=Axis("after training on one task after the other", "in order"),
        z=Axis("accuracy on the test split of the task, averaged over seeds", "%"),
    ),
    "constant": matrix(3, 3, values=[[2.5] * 3] * 3),
    "huge": matrix(scale=3e9, z=Axis("memory", "bytes")),
    "small": matrix(scale=3e-7, z=Axis("drift")),
    "negative": matrix(scale=4, shift=-2),
    "mixed": matrix(2, 3, values=[[1e-9, 3, -4e5], [0, -12, 2e8]]),
    "log": matrix(2, 3, values=[[1e-5, 2e-3, 1], [4e3, None, 5e5]], z=Axis("condition", log=True)),
    "nothing": matrix(2, 2, values=[[None, None]] * 2),
    "surface": surface(),
    "flat": surface(scale=0, shift=3.2),
    "high": surface(scale=2e7, shift=-4e7, side=9),
    "two by two": surface(side=2),
    "logarithmic": surface(values=[[10 ** ((x + y) / 3) for x in range(9)] for y in range(9)], side=9, log=True),
    "beyond": surface(side=9, paths=(Trajectory("H-Res", (0, 5), (0, -4)), Trajectory("a point", (1,), (1,)))),
    "two": arrows(),
    "four": arrows(
        *(flow(name, i, 40, 0.05 * (i + 1), CLASSES) for i, name in enumerate((LONG, "H-Res", "LoRA", "frozen")))
    ),
    "too long": arrows(flow("H-Res", length=40), flow("LoRA", 1, length=30)),
    "too short": arrows(flow("H-Res", length=1e-4)),
    "big": arrows(*(flow(name, size=1e7) for name in "abc")),
    "one arrow": arrows(Flow("H-Res", (1,), (2,), (0.5,), (-0.5,))),
    "still": arrows(Flow("H-Res", (1, 2), (2, 2), (0, 0), (0, 0))),
}
MATRICES = [name for name in SAMPLES if hasattr(SAMPLES[name], "rows")]
FIELDS = [name for name in SAMPLES if isinstance(SAMPLES[name], Arrows)]


@pytest.fixture(scope="module")
def drawn():
    """Each sample, drawn once."""
    pages = {}

    def page(name):
        if name not in pages:
            pages[name] = draw(SAMPLES[name])
            pages[name].draw_without_rendering()
        return pages[name]

    return page


def box(artist):
    return artist.get_window_extent().extents


@pytest.mark.parametrize("name", SAMPLES)
def test_nothing_leaves_the_page_and_titles_are_there(drawn, name):
    page = drawn(name)
    reach = page.get_tightbbox()
    wide, high = page.get_size_inches()
    assert wide == 7.2
    assert high < 9
    assert reach.x0 >= 0
    assert reach.y0 >= 0
    assert reach.x1 <= wide
    assert reach.y1 <= high
    title = page.get_suptitle() if hasattr(page, "get_suptitle") else page._suptitle.get_text()
    assert title.replace("\n", " ") == SAMPLES[name].title


@pytest.mark.parametrize("name", ["forgetting", "logarithmic", "two"])
def test_equal_pictures_are_equal_bytes_and_the_users_settings_stay(name):
    first = svg(SAMPLES[name])
    with matplotlib.rc_context({"font.family": "monospace", "image.cmap": "jet", "hatch.color": "red"}):
        changed = dict(matplotlib.rcParams)
        assert svg(SAMPLES[name]) == first
        assert dict(matplotlib.rcParams) == changed
    assert "<image" not in first


def light(color):
    """Relative luminance, by WCAG 2.2."""
    parts = np.array(matplotlib.colors.to_rgb(color))
    return np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722]


@pytest.mark.parametrize("name", MATRICES)
def test_cells_hold_their_numbers_which_can_be_read(drawn, name):
    page, given = drawn(name), SAMPLES[name]
    axes = page.axes[0]
    texts = {tuple(map(round, text.get_position())): text for text in axes.texts}
    cells = {(x, y): value for y, row in enumerate(given.values) for x, value in enumerate(row) if value is not None}
    if name == "many":
        assert not texts
        return
    assert texts.keys() == cells.keys()
    (mesh,) = axes.collections
    for place, text in texts.items():
        corner = axes.transData.transform((place[0] - 0.5, place[1] + 0.5))
        other = axes.transData.transform((place[0] + 0.5, place[1] - 0.5))
        x0, y0, x1, y1 = box(text)
        assert corner[0] <= x0 <= x1 <= other[0]
        assert corner[1] <= y0 <= y1 <= other[1]
        inside, outside = sorted((light(text.get_color()), light(mesh.to_rgba(cells[place])[:3])))
        assert (outside + 0.05) / (inside + 0.05) >= 4.5
        assert text.get_fontsize() >= 6.5


def test_numbers_in_cells(drawn):
    def told(name):
        return [text.get_text() for text in drawn(name).axes[0].texts]

    assert told("forgetting")[:3] == ["90", "83", "91"]
    assert told("huge")[0] == f"{SAMPLES['huge'].values[0][0] / 1e9:.2f}"
    assert told("mixed") == ["1e−9", "3", "−400,000", "0", "−12", "2e8"]
    assert told("log") == ["1e−5", "0.002", "1", "4,000", "500,000"]
    assert sum(text.startswith("−") for text in told("negative")) == sum(
        value < 0 for row in SAMPLES["negative"].values for value in row
    )


def test_rows_go_down_columns_go_right_and_empty_cells_are_hatched(drawn):
    axes = drawn("forgetting").axes[0]
    low, high = axes.get_ylim()
    assert low > high
    assert [label.get_text() for label in axes.get_yticklabels()] == list(forgetting().rows)
    assert [label.get_text() for label in axes.get_xticklabels()] == list(forgetting().columns)
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("evaluated on", "after training on")
    (mesh,) = axes.collections
    grid = np.ma.getmaskarray(mesh.get_array()).reshape(5, 5)
    assert grid.tolist() == [[x > y for x in range(5)] for y in range(5)]
    assert axes.patch.get_hatch() == "////"


@pytest.mark.parametrize("name", MATRICES)
def test_the_colours_reach_from_the_lowest_to_the_highest_value(drawn, name):
    page, given = drawn(name), SAMPLES[name]
    numbers = [value for row in given.values for value in row if value is not None]
    bars = page.axes[0].child_axes
    if not numbers:
        assert not bars
        return
    (mesh,), (bar,) = page.axes[0].collections, bars
    assert bar.get_ylabel().replace("\n", " ") == Scale.of(numbers, given.z.log).label(given.z)
    low, high = mesh.norm.vmin, mesh.norm.vmax
    assert (low, high) == (min(numbers), max(numbers)) or (len(set(numbers)) == 1 and low < numbers[0] < high)
    assert isinstance(mesh.norm, matplotlib.colors.LogNorm) == given.z.log
    ticks = bar.get_yticks()
    assert len(ticks) == len(bar.get_yticklabels()) >= (2 if low == min(numbers) else 1)
    assert min(numbers) <= min(ticks) <= max(ticks) <= max(numbers)
    texts = sorted((box(label) for label in bar.get_yticklabels()), key=lambda found: found[1])
    assert all(upper[1] >= lower[3] for lower, upper in itertools.pairwise(texts))


@pytest.mark.parametrize("name", MATRICES)
def test_names_of_rows_and_columns_do_not_overlap(drawn, name):
    axes = drawn(name).axes[0]
    rows = sorted((box(label) for label in axes.get_yticklabels()), key=lambda found: found[1])
    assert all(upper[1] >= lower[3] - 1 for lower, upper in itertools.pairwise(rows))
    labels = axes.get_xticklabels()
    if all(label.get_rotation() == 0 for label in labels):
        columns = [box(label) for label in labels]
        assert all(right[0] >= left[2] for left, right in itertools.pairwise(columns))
    else:
        assert name in {"long", "many"}
        apart = np.diff([axes.transData.transform((x, 0))[0] for x in axes.get_xticks()])
        assert apart.min() * math.sin(math.pi / 4) >= labels[0].get_fontsize() * axes.figure.dpi / 72


def test_a_surface_has_bands_that_cover_it_and_paths_over_them(drawn):
    axes, given = drawn("surface").axes[0], SAMPLES["surface"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == (str(STREAM[0]), str(STREAM[1]))
    assert axes.child_axes[0].get_ylabel() == "loss (nats)"
    filled = next(found for found in axes.collections if getattr(found, "filled", False))
    values = [value for row in given.values for value in row]
    assert filled.levels[0] <= min(values) < filled.levels[1]
    assert filled.levels[-2] < max(values) <= filled.levels[-1]
    assert 7 <= len(filled.levels) <= 18
    assert axes.get_xlim() == (-2, 2)
    assert axes.get_ylim() == (-1.5, 1.5)
    styles = styles_for(path.name for path in given.paths)
    for path in given.paths:
        (line,) = [line for line in axes.lines if line.get_label() == path.name]
        assert (tuple(line.get_xdata()), tuple(line.get_ydata())) == (path.x, path.y)
        assert line.get_color() == styles[path.name].color
        markers = {(*line.get_xdata(), *line.get_ydata()): line for line in axes.lines if len(line.get_xdata()) == 1}
        assert markers[path.x[-1], path.y[-1]].get_marker() == styles[path.name].marker
        assert markers[path.x[0], path.y[0]].get_markerfacecolor() == "#fefefe"
    legend = drawn("surface").legends[0]
    assert [text.get_text() for text in legend.get_texts()] == ["frozen", "H-Res", "start"]
    assert legend.get_window_extent().y1 < box(axes.xaxis.label)[1]


def test_arrowheads_point_along_a_path(drawn):
    given = surface(side=5, paths=(Trajectory("H-Res", (-1, 1, 1, 1), (0, 0, 0, 1)),))
    heads = [(text.xyann, text.xy) for text in draw(given).axes[0].texts]
    assert len(heads) == 3
    for tail, tip in heads:
        step = np.subtract(tip, tail)
        assert step.max() > 0
        assert step.min() == 0  # along one of the two parts, and onwards
    assert [tip[1] > 0 for _, tip in heads] == [False, False, True]
    assert not draw(surface(side=5, paths=(Trajectory("a", (1, 1), (0, 0)),))).axes[0].texts


def test_a_path_that_leaves_the_plane_is_shown_whole(drawn):
    axes = drawn("beyond").axes[0]
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    assert (left, high) == (-2, 1.5)
    assert right > 5
    assert low < -4


def test_a_surface_of_one_value_and_logarithmic_ones(drawn):
    (flat,) = [found for found in drawn("flat").axes[0].collections if hasattr(found, "levels")]
    assert flat.levels[0] < 6.2 < flat.levels[1] or len(flat.levels) == 2
    bar = drawn("flat").axes[0].child_axes[0]
    assert len(bar.get_yticks()) >= 1
    steep = next(found for found in drawn("logarithmic").axes[0].collections if getattr(found, "filled", False))
    assert isinstance(steep.norm, matplotlib.colors.LogNorm)
    log = surface(side=3, across=(1, 10, 100), up=(1, 10, 100), x=Axis("x", log=True), y=Axis("y", log=True), paths=())
    axes = draw(log).axes[0]
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")


def tips(axes, quiver):
    """Where arrows as they are drawn start and end, in the data's units."""
    to_data = axes.transData.inverted().transform
    starts = axes.transData.transform(quiver.XY)
    found = []
    for path, start in zip(quiver.get_paths(), starts, strict=True):
        corners = quiver.get_transform().transform(path.vertices)
        far = corners[np.argmax(np.hypot(*corners.T))]
        found.append((to_data(start), to_data(start + far)))
    return found


@pytest.mark.parametrize("name", ["two", "four", "too long", "big", "one arrow"])
def test_arrows_go_from_where_they_start_to_where_they_end(drawn, name):
    page, given = drawn(name), SAMPLES[name]
    factor = factor_of(given)
    for axes, panel in zip(page.axes, given.panels, strict=True):
        (quiver,) = axes.collections
        for index, (start, tip) in enumerate(tips(axes, quiver)):
            begin = np.array([panel.x[index], panel.y[index]])
            move = factor * np.array([panel.dx[index], panel.dy[index]])
            assert start == pytest.approx(begin)
            length = np.diff(axes.transData.transform([begin, begin + move]), axis=0)
            if np.hypot(*length[0]) > 10:  # pixels; a shorter one is all head
                scale = np.ptp([axes.get_xlim(), axes.get_ylim()], axis=1)
                assert tip / scale == pytest.approx((begin + move) / scale, abs=2e-3)


@pytest.mark.parametrize("name", FIELDS)
def test_panels_share_limits_that_show_every_arrow(drawn, name):
    page, given = drawn(name), SAMPLES[name]
    factor = factor_of(given)
    limits = {(axes.get_xlim(), axes.get_ylim()) for axes in page.axes}
    assert len(page.axes) == len(given.panels)
    (((left, right), (low, high)),) = limits
    for panel in given.panels:
        for x, dx in zip(panel.x, panel.dx, strict=True):
            assert left < min(x, x + factor * dx) <= max(x, x + factor * dx) < right
        for y, dy in zip(panel.y, panel.dy, strict=True):
            assert low < min(y, y + factor * dy) <= max(y, y + factor * dy) < high
    assert len({axes.collections[0].scale for axes in page.axes}) == 1
    assert [axes.get_title(loc="left").replace("\n", " ").strip() for axes in page.axes] == [
        panel.name.strip() for panel in given.panels
    ]


def test_arrows_are_to_scale_or_say_by_which_factor(drawn):
    assert [factor_of(SAMPLES[name]) for name in ("two", "one arrow", "still")] == [1, 1, 1]
    assert remarks(SAMPLES["two"]) == []
    for name, said in (("too long", r"1/"), ("too short", " times")):
        factor = factor_of(SAMPLES[name])
        assert (factor < 1) == (name == "too long")
        (note,) = remarks(SAMPLES[name])
        written = note.removeprefix("Arrows are drawn at ").split()[0]
        assert said in note
        number = float(written.replace(",", "").removeprefix("1/"))
        assert factor == pytest.approx(1 / number if factor < 1 else number)
        page = drawn(name)
        assert any(text.get_text() == note for text in page.findobj(matplotlib.text.Text))
    grouped = arrows(flow("a", length=40, groups=("g", "h")))
    assert draw(grouped).legends[0].get_title().get_text() == remarks(grouped)[0]


@pytest.mark.parametrize("values", [[[1e100, -1e100], [0, 1]], [[1e-300, 5e-324], [0, 0]], [[1, 1 + 2e-16], [1, 1]]])
def test_numbers_of_any_size_can_be_drawn(values):
    move = Flow("a", (0, 1), (0, 1), *values)
    path = Trajectory("a", *values)
    for picture in (matrix(2, 2, values=values), surface(side=2, values=values, paths=(path,)), arrows(move)):
        draw(picture).draw_without_rendering()


@given(st.floats(-6, 6))
@settings(max_examples=50, deadline=None)
def test_the_factor_brings_any_length_into_sight(power):
    picture = arrows(flow("a", length=10**power, count=12))
    wide, high = np.ptp(picture.panels[0].x), np.ptp(picture.panels[0].y)
    panel = picture.panels[0]
    longest = max(math.hypot(dx / wide, dy / high) for dx, dy in zip(panel.dx, panel.dy, strict=True))
    assert 0.02 <= factor_of(picture) * longest <= 1


def test_groups_have_colours_of_their_own_and_the_others_are_grey(drawn):
    page = drawn("four")
    names = [text.get_text() for text in page.legends[0].get_texts()]
    assert names == [*CLASSES[:7], "3 others"]
    colors = [patch.get_facecolor() for patch in page.legends[0].get_patches()]
    assert len(set(colors)) == 8
    for axes in page.axes:
        (quiver,) = axes.collections
        for index, face in enumerate(quiver.get_facecolors()):
            assert tuple(face) == colors[min(index % 10, 7)]
    assert not drawn("two").legends
    assert colors_for(["x", "LoRA", "x"]) == {"x": "#0072b2", "LoRA": styles_for(["LoRA"])["LoRA"].color}
    assert len({*colors_for(["x", "H-Res", "y", "z"]).values()}) == 4


@pytest.mark.parametrize(
    ("numbers", "texts", "label"),
    [
        ([0.0], ["0"], "z (s)"),
        ([1.0, 2.0, -3.0], ["1", "2", "−3"], "z (s)"),
        ([82.14, 79.3], ["82.1", "79.3"], "z (s)"),
        ([3.1801, 3.1809], ["3.18010", "3.18090"], "z (s)"),
        ([0.5, 0.25], ["0.500", "0.250"], "z (s)"),
        ([2.5e9, 1e7], ["2.50", "0.01"], "z (in 10⁹ s)"),
        ([-3e-7, 1e-7], ["−300", "100"], "z (in 10⁻⁹ s)"),
        ([1234.5, 0.001], ["1,234", "1e−3"], "z (s)"),
        ([1e-9, 2e8], ["1e−9", "2e8"], "z (s)"),
    ],
)
def test_numbers_that_belong_together(numbers, texts, label):
    scale = Scale.of(numbers)
    assert [scale.text(number) for number in numbers] == texts
    assert scale.label(Axis("z", "s")) == label
    assert Scale(6, 0).label(Axis("z")) == "z (in 10⁶)"


def test_plain_numbers():
    told = [plain(number) for number in (0, 1500, 0.012, -2.5, 3.2e9, -1e-7, 999999, 123.4)]
    assert told == ["0", "1,500", "0.012", "−2.5", "3.2e9", "−1e−7", "999,999", "123"]


@given(st.floats(-1e12, 1e12), st.floats(1e-9, 1e12), st.booleans())
@example(0.0, 1e7, True)  # whose logarithm is rounded down to a whole number
@settings(max_examples=150, deadline=None)
def test_ticks_and_levels_of_any_reach(low, reach, log):
    low = abs(low) + 1e-9 if log else low
    high = low + reach
    assume(high - low > 1e-9 * max(abs(low), abs(high)))
    ticks, texts = ticks_of(low, high, Scale.of([low, high], log), log)
    assert 1 <= len(ticks) == len(texts) <= 9
    assert low <= min(ticks) <= max(ticks) <= high
    assert sorted(set(ticks)) == ticks
    levels = levels_of(low, high, log)
    assert levels[0] <= low < high <= levels[-1]
    assert sorted(set(levels)) == levels
    assert 3 <= len(levels) <= 20
    assert not log or levels[0] > 0


@pytest.mark.parametrize(
    ("low", "high", "log", "texts"),
    [
        (0, 1, False, ["0", "0.2", "0.4", "0.6", "0.8", "1.0"]),
        (0, 10, False, ["0", "2", "4", "6", "8", "10"]),
        (-2.4e9, 2.4e9, False, ["−2", "−1", "0", "1", "2"]),
        (2.4, 2.4, False, ["2.40"]),
        (1e-3, 1e3, True, ["0.001", "0.01", "0.1", "1", "10", "100", "1,000"]),
        (3, 40, True, ["5", "10", "20"]),
    ],
)
def test_texts_of_ticks(low, high, log, texts):
    assert ticks_of(low, high, Scale.of([low, high], log), log)[1] == texts
