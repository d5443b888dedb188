import io
from dataclasses import replace

import cv2
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.text import Annotation

from nl_detectron.analysis.attention_figure import (
    draw_attention,
    fitted_scale,
    heat_colors,
    on_scale,
)
from nl_detectron.analysis.attention_map import AttentionMap, AttentionMaps, BlockAttention

IMAGE = np.full((48, 80, 3), 128, np.uint8)
WEIGHTS = np.zeros((3, 6), np.float32)
WEIGHTS[0, 0], WEIGHTS[0, 5], WEIGHTS[2, 0], WEIGHTS[1, 2] = 0.5, 0.25, 0.004, 0.246
EVEN = np.full((3, 6), 1 / 18, np.float32)


def one_map(pairwise="gaussian", weights=WEIGHTS, outside=0.0, what="weights", right=96):
    """Of a point in the cell in row 1, column 4 of 3 x 6."""
    keys = round(weights.size / (1 - outside))
    attention_map = AttentionMap(weights, (0, 0, right, 48), (64, 16, 80, 32), outside, keys)
    block = BlockAttention("res4.nonlocal4", pairwise, [attention_map])
    return AttentionMaps(IMAGE, [(72.0, 24.0)], [block], what)


def legend_of(panel):
    return " ".join(panel.get_xlabel().split())


def arrows_of(panel):
    return [c for c in panel.get_children() if isinstance(c, Annotation) and not c.get_text()]


def panels(figure):
    return [axes for axes in figure.axes if axes.get_title()]


def test_a_panel_for_each_point_and_block():
    ((attention_map,),) = [block.maps for block in one_map().blocks]
    points = [(1.0, 2.0), (70.0, 40.0), (24.0, 24.0)]
    blocks = [
        BlockAttention("backbone.res4.nonlocal4", "gaussian", [attention_map] * 3),
        BlockAttention("keypoint_head.nonlocal2", "gaussian", [attention_map, None, attention_map]),
    ]
    figure = draw_attention(AttentionMaps(IMAGE, points, blocks))
    titles = [axes.get_title().split("\n") for axes in panels(figure)]
    assert titles == [
        [name, point]
        for point in ("point 1, 2", "point 70, 40", "point 24, 24")
        for name in ("backbone.res4.nonlocal4", "keypoint_head.nonlocal2")
        if (name, point) != ("keypoint_head.nonlocal2", "point 70, 40")
    ]
    assert "1 in no detected object's box" in figure.get_supxlabel()
    file = io.BytesIO()
    figure.savefig(file, dpi=50)
    picture = cv2.imdecode(np.frombuffer(file.getvalue(), np.uint8), cv2.IMREAD_COLOR)
    assert picture.std() > 10


@pytest.mark.parametrize("size", [(32, 256), (48, 80), (100, 60)])
@pytest.mark.parametrize("points", [1, 4, 18])
def test_fits_a_page_where_nothing_is_clipped_or_overlaps(points, size):
    image = np.zeros((*size, 3), np.uint8)
    weights = np.random.default_rng(0).uniform(0, 1, (8, 8)).astype(np.float32)
    centre = (size[1] / 2, size[0] / 2)
    attention_map = AttentionMap(weights, (0, 0, size[1], size[0]), (*centre, *centre), 0.2, 80)
    name = "backbone.bottom_up.res4.nonlocal4"
    block = BlockAttention(name, "embedded_gaussian", [attention_map] * points)
    figure = draw_attention(AttentionMaps(image, [centre] * points, [block]))
    figure.draw_without_rendering()
    width, height = figure.get_size_inches() / (2 if points > 4 else 1)
    assert width <= 8.3  # A4, or A2
    assert height <= 11.7
    texts = [text for axes in panels(figure) for text in (axes.title, axes.xaxis.label)]
    boxes = [text.get_window_extent() for text in texts] + [
        axes.get_window_extent() for axes in figure.axes
    ]
    for i, box in enumerate(boxes):
        assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1
        assert figure.bbox.y0 <= box.y0 < box.y1 <= figure.bbox.y1
        assert not any(box.padded(-1).overlaps(other) for other in boxes[:i])


def test_arrows_go_to_the_strongest_places_and_the_legend_has_their_multiples():
    (panel,) = panels(draw_attention(one_map()))
    # Not to its own neighbour, nor to what counts for less than a hundredth.
    assert [arrow.xy for arrow in arrows_of(panel)] == [(8, 8), (40, 24)]
    assert {arrow.xyann for arrow in arrows_of(panel)} == {(72.0, 24.0)}
    assert legend_of(panel).startswith("1: 9 x 2: 4.43 x gaussian weights: at most 9 times an even")
    assert "padding" not in legend_of(panel)
    (panel,) = panels(draw_attention(one_map(), arrows=1))
    assert len(arrows_of(panel)) == 1


def test_what_is_nearly_even_has_no_arrows():
    weights = EVEN.copy()
    weights[0, 0] *= 1.09
    (panel,) = panels(draw_attention(one_map(weights=weights)))
    assert not arrows_of(panel)
    assert legend_of(panel).startswith("gaussian weights: nearly even, at most 1.08 times an even")
    (panel,) = panels(draw_attention(one_map(weights=0 * EVEN, what="contributions")))
    assert not arrows_of(panel)
    assert legend_of(panel) == "contributions: no place counts more than another"
    assert not panel.images[1].get_array().any()


def test_says_what_is_in_the_padding():
    (panel,) = panels(draw_attention(one_map(weights=EVEN / 2, outside=0.5)))
    assert "50.0 % of it is in the padding, not shown" in legend_of(panel)
    assert "at most 1 times" in legend_of(panel)


@pytest.mark.parametrize(
    ("pairwise", "what", "legend"),
    [
        ("dot_product", "weights", "by magnitude: they have either sign"),
        ("concatenation", "weights", "concatenation weights: at most 9 times the mean magnitude"),
        ("gaussian", "contributions", "contributions: at most 9 times the mean magnitude"),
        ("gaussian", "effect", "amber raises it, blue lowers it: at most 9 times"),
    ],
)
def test_what_is_no_share(pairwise, what, legend):
    weights = -WEIGHTS if pairwise == "dot_product" or what == "effect" else WEIGHTS
    (panel,) = panels(draw_attention(one_map(pairwise, 40 * weights, what=what)))
    sign = "-" if weights[0, 0] < 0 else ""
    assert legend_of(panel).startswith(f"1: {sign}9 x 2: {sign}4.43 x ")
    assert legend in legend_of(panel)


def test_the_map_lies_where_its_cells_do():
    (panel,) = panels(draw_attention(one_map()))
    image, heat = panel.images
    assert image.get_extent() == [0, 80, 48, 0]
    assert heat.get_extent() == [0, 96, 48, 0]
    assert panel.get_xlim() == (0, 80)  # the padding is not shown
    assert panel.get_ylim() == (48, 0)


def test_places_on_the_scale():
    multiples = np.array([0, 1 / 32, 1 / 4, 1, 4, 32])
    assert on_scale(multiples, "weights", 16) == pytest.approx([-1, -1, -0.5, 0, 0.5, 1])
    assert on_scale(-multiples, "weights", 16) == pytest.approx([-1, -1, -0.5, 0, 0.5, 1])
    assert on_scale(multiples, "effect", 16) == pytest.approx([0, 0, 0, 0, 0.5, 1])
    assert on_scale(-multiples, "effect", 16) == pytest.approx([0, 0, 0, 0, -0.5, -1])
    assert on_scale(multiples, "weights", 4) == pytest.approx([-1, -1, -1, 0, 1, 1])
    for what in ("weights", "effect"):
        low, even, high = heat_colors(what)([0.0, 0.5, 1.0])
        assert even[3] < 0.02
        assert high[3] > 0.5
        assert low[3] == pytest.approx({"weights": 0.4, "effect": 0.7}[what])
        assert to_rgb(tuple(low)) != to_rgb(tuple(high))


@pytest.mark.parametrize(
    ("multiple", "end"), [(0.5, 2), (1.5, 2), (3, 4), (-3, 4), (16, 16), (17, 32), (900, 64)]
)
def test_the_scale_is_fitted_to_all_but_a_point(multiple, end):
    multiples = np.full(2000, multiple)
    multiples[0] = 1000
    assert fitted_scale([multiples, np.ones(3)]) == end
    assert fitted_scale([]) == 2


def test_one_scale_for_all_panels():
    maps = one_map()
    (block,) = maps.blocks
    weaker = replace(block.maps[0], values=np.sqrt(WEIGHTS))
    both = replace(maps, blocks=[block, replace(block, maps=[weaker])])
    figure = draw_attention(both)
    *_, bar = figure.axes
    labels = [label.get_text() for label in bar.get_xticklabels()]
    assert labels == ["1/16", "1/4", "1", "4", "16"]
    assert [panel.images[1].get_array().max() for panel in panels(figure)] == pytest.approx(
        [np.log(values.max() / values.mean()) / np.log(16) for values in (WEIGHTS, weaker.values)]
    )
    assert "the scale is fitted to this picture" in bar.get_xlabel()


def test_the_point_itself_may_have_the_most():
    weights = np.where(np.arange(18).reshape(3, 6) == 10, 0.9, EVEN / 10).astype(np.float32)
    (panel,) = panels(draw_attention(one_map(weights=weights)))
    assert legend_of(panel).startswith("no arrow: nowhere but at the point is there a peak")
    assert "times an even share (the point itself)" in legend_of(panel)


def test_plain_has_but_image_point_and_arrows():
    figure = draw_attention(one_map(), plain=True)
    (panel,) = figure.axes
    assert len(panel.images) == 1
    assert len(panel.lines) == 1
    assert len(arrows_of(panel)) == 2
    assert not panel.get_title() + panel.get_xlabel()


def test_the_strip_without_keys_is_explained():
    """An image of 80 x 48 pixels, and cells that end at its right edge, before or behind it."""
    for right, is_told in ((80, False), (72, True), (96, False)):
        (panel,) = panels(draw_attention(one_map(right=right)))
        assert ("pooling leaves out" in legend_of(panel)) is is_told


@pytest.mark.parametrize(
    ("weight", "least", "most"), [(1 / 18, 0.98, 1.02), (0.0, 0.65, 0.75)], ids=["even", "none"]
)
def test_the_image_keeps_its_colours(weight, least, most):
    """As it is drawn: unchanged where the map is even, darker but not dark where nothing counts."""
    color = np.array([120, 30, 60])
    weights = np.full((3, 6), weight, np.float32)
    weights[0, 0] = 1 - weights.flat[1:].sum()
    image = np.full_like(IMAGE, color)
    figure = draw_attention(replace(one_map(weights=weights), image=image), arrows=0)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    (panel,) = panels(figure)
    assert (panel.images[0].get_array() == color).all()
    x, y = panel.transData.transform((36, 40))
    *drawn, _ = np.asarray(canvas.buffer_rgba())[-round(y), round(x)]
    assert least < np.sum(drawn, dtype=int) / color.sum() < most
    assert drawn[0] > drawn[2] > drawn[1]
