import numpy as np
import pytest
import torch

from nl_detectron.analysis.placement import Axis, grid_stride, place


@pytest.mark.parametrize(
    ("position", "cell"), [(0, 0), (15.999, 0), (16, 1), (31.5, 1), (63.999, 3), (64, 3)]
)
def test_a_cell_covers_a_stride_of_pixels(position, cell):
    assert Axis(0, 64, 4).cell_at(position) == cell
    if position % 16:
        assert Axis(64, 0, 4).cell_at(position) == 3 - cell  # mirrored


@pytest.mark.parametrize(
    ("cells", "keys", "stop"), [(8, 8, 80), (8, 4, 80), (7, 3, 60), (3, 1, 20), (1, 1, 10)]
)
def test_pooled_keys_cover_two_cells_each_and_an_odd_last_one_none(cells, keys, stop):
    assert Axis(0, 10 * cells, cells).of_keys(keys) == Axis(0, stop, keys)
    mirrored = Axis(10 * cells, 0, cells).of_keys(keys)
    assert mirrored == Axis(10 * cells, 10 * cells - stop, keys)


def test_visible_cells_are_in_the_image_and_in_its_order():
    assert Axis(0, 64, 4).visible(40).tolist() == [0, 1, 2]
    assert Axis(0, 64, 4).visible(48).tolist() == [0, 1, 2]  # the last one only touches it
    assert Axis(48, -16, 4).visible(48).tolist() == [2, 1, 0]  # mirrored, so is the padding
    assert Axis(40, -24, 4).visible(40).tolist() == [2, 1, 0]
    assert Axis(10, 30, 2).visible(40).tolist() == [0, 1]


@pytest.mark.parametrize(("start", "stop"), [(0, 64), (64, 0)])
def test_span_is_ascending(start, stop):
    axis = Axis(start, stop, 4)
    assert axis.span(axis.visible(30)) == (0, 32)
    assert axis.span(axis.cell_at(50)) == (48, 64)


def test_features_in_a_box():
    features = place(torch.zeros(1, 2, 7, 14), np.array([10.0, 20, 38, 34]))
    assert features.cell_at((10, 20)) == (0, 0)
    assert features.cell_at((23.9, 33)) == (6, 6)
    assert features.cell_box((6, 6)) == (22, 32, 24, 34)
    assert features.area == 28 * 14
    assert [features.contains(p) for p in [(10, 20), (38, 34), (9, 25), (20, 35)]] == [
        *(True, True),
        *(False, False),
    ]


@pytest.mark.parametrize(
    ("size", "grid", "stride"),
    [
        ((800, 1344), (50, 84), 16),
        ((750, 1333), (47, 84), 16),
        ((64, 33), (2, 2), 32),
        ((17, 20), (2, 2), 16),
    ],
)
def test_stride_is_a_power_of_two(size, grid, stride):
    assert grid_stride(size, grid) == stride
