import io

import cv2
import numpy as np
import pytest
from matplotlib.colors import CenteredNorm, to_rgb
from matplotlib.text import Annotation

from nl_detectron.analysis.attention_figure import draw_attention, heat_colors
from nl_detectron.analysis.attention_map import AttentionMap, AttentionMaps, BlockAttention

IMAGE = np.full((48, 80, 3), 128, np.uint8)
WEIGHTS = np.array([[0.5, 0, 0.25], [0, 0, 0], [0.125, 0, 1e-7]], np.float32)


def one_map(pairwise="gaussian", weights=WEIGHTS, outside=0.0):
    attention_map = AttentionMap(weights, (0, 0, 96, 48), (16, 16, 32, 32), outside, keys=10)
    block = BlockAttention("res4.nonlocal4", pairwise, [attention_map])
    return AttentionMaps(IMAGE, [(24.0, 24.0)], [block])


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
    titles = [axes.get_title().splitlines() for axes in panels(figure)]
    assert titles == [
        [name, point]
        for point in ("point 1, 2", "point 70, 40", "point 24, 24")
        for name in ("backbone.res4.nonlocal4", "keypoint_head.nonlocal2")
    ]
    empty = ["no detected object's box" in axes.get_xlabel() for axes in panels(figure)]
    assert empty == [False, False, False, True, False, False]
    file = io.BytesIO()
    figure.savefig(file, dpi=50)
    picture = cv2.imdecode(np.frombuffer(file.getvalue(), np.uint8), cv2.IMREAD_COLOR)
    assert picture.std() > 10


def test_points_of_a_single_block_are_three_in_a_row():
    (block,) = one_map().blocks
    block.maps.extend(block.maps * 6)
    figure = draw_attention(AttentionMaps(IMAGE, [(24.0, 24.0)] * 7, [block]))
    figure.draw_without_rendering()
    bottoms = [round(axes.get_position().y0, 2) for axes in panels(figure)]
    assert [bottoms.count(bottom) for bottom in sorted(set(bottoms), reverse=True)] == [3, 3, 1]


def test_arrows_go_to_the_strongest_places_and_the_legend_has_their_weights():
    (panel,) = panels(draw_attention(one_map(), arrows=3))
    arrows = [c for c in panel.get_children() if isinstance(c, Annotation) and not c.get_text()]
    assert [arrow.xy for arrow in arrows] == [(16, 8), (80, 8), (16, 40)]
    assert {arrow.xyann for arrow in arrows} == {(24.0, 24.0)}
    legend = panel.get_xlabel()
    assert legend.startswith("1: 50 %   2: 25 %   3: 12.5 %\n")
    assert "at most 5 times an even share" in legend
    (panel,) = panels(draw_attention(one_map(), arrows=9))
    assert "4: < 0.0001 %" in panel.get_xlabel()
    assert "padding" not in panel.get_xlabel()


def test_says_what_is_in_the_padding():
    (panel,) = panels(draw_attention(one_map(outside=0.123)))
    assert "12.3 % of the weight is in the padding" in panel.get_xlabel()


@pytest.mark.parametrize(
    ("pairwise", "meaning"),
    [("dot_product", "any sign and sum, arrows by magnitude"), ("concatenation", "any sum")],
)
def test_weights_that_are_no_softmax(pairwise, meaning):
    (panel,) = panels(draw_attention(one_map(pairwise, WEIGHTS * [-40, 1, 4])))
    assert panel.get_xlabel().startswith("1: -20   2: -5   3: 1   4: 4e-07\n")
    assert meaning in panel.get_xlabel()
    assert "%" not in panel.get_xlabel()
    assert isinstance(panel.images[1].norm, CenteredNorm) == (pairwise == "dot_product")


def test_the_map_lies_where_its_cells_do():
    (panel,) = panels(draw_attention(one_map()))
    image, heat = panel.images
    assert image.get_extent() == [0, 80, 48, 0]
    assert heat.get_extent() == [0, 96, 48, 0]
    assert panel.get_xlim() == (0, 80)  # the padding is not shown
    assert panel.get_ylim() == (48, 0)


def test_colours_of_weak_weights_are_transparent():
    assert heat_colors("gaussian")([0.0, 1.0])[:, 3].tolist() == [0, 0.9]
    signed = heat_colors("dot_product")([0.0, 0.5, 1.0])
    assert signed[:, 3] == pytest.approx([0.9, 0, 0.9], abs=0.1)
    assert to_rgb(tuple(signed[0])) != to_rgb(tuple(signed[2]))
