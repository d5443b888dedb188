import math

import numpy as np
import pytest

from nl_detectron.analysis.attention_map import AttentionMap, AttentionMaps, BlockAttention
from nl_detectron.analysis.partner import attention_at, describe_squares

SQUARE = {"category_id": 1, "bbox": [240, 0, 16, 16], "partner": (8, 9, 7.5)}
QUERY = (248, 8, 256, 16)
OWN, PARTNER, OTHER = (1, 31), (1, 0), (3, 16)


class Planted:
    """An AttentionRecord whose only block gives these weights to every point."""

    def __init__(self, weights):
        extent = (0, 0, 256, 32)
        self.map = AttentionMap(weights, extent, QUERY, outside=0, keys=weights.size)

    def maps(self, points, what):
        blocks = [BlockAttention("res3", "gaussian", [self.map] * len(points))]
        return AttentionMaps(np.zeros((32, 256, 3), np.uint8), points, blocks, what)


def measured(weights):
    ((square,),) = attention_at(Planted(weights), [SQUARE]).values()
    return square


def planted(shares):
    weights = np.zeros((4, 32), np.float32)
    for cell, share in shares.items():
        weights[cell] = share
    return weights


@pytest.mark.parametrize(
    ("shares", "on_partner", "is_right"),
    [
        ({PARTNER: 1}, 1, True),
        ({PARTNER: 0.6, OWN: 0.4}, 0.6, True),
        ({PARTNER: -0.6, OWN: 0.4}, 0.6, True),
        # What counts most is the square itself, and only then the disc.
        ({PARTNER: 0.02, OWN: 0.92, OTHER: 0.06}, 0.02, False),
        ({OTHER: 1}, 0, False),
    ],
)
def test_what_counts_for_a_square(shares, on_partner, is_right):
    square = measured(planted(shares))
    assert square.category_id == 1
    assert square.on_partner == pytest.approx(on_partner)
    assert square.is_strongest_on_partner == is_right
    entropy = -sum(abs(share) * math.log(abs(share)) for share in shares.values())
    assert square.attended_share == pytest.approx(math.exp(entropy) / 128)


def test_even_weights():
    square = measured(np.full((4, 32), 1 / 128, np.float32))
    assert square.on_partner == pytest.approx(square.even)
    assert square.even == 4 / 128  # the centres of four keys lie in the disc
    assert square.attended_share == pytest.approx(1)
    assert not square.is_strongest_on_partner


@pytest.mark.parametrize(
    ("grid", "partner", "expected"),
    [
        ((4, 32), (231, 8.5, 7.5), [(0, 28), (0, 29), (1, 28), (1, 29)]),
        # A grid so coarse that no centre is in the disc: the nearest key.
        ((1, 8), (231, 5, 7.5), [(0, 7)]),
    ],
)
def test_keys_of_a_disc(grid, partner, expected):
    found = []
    for cell in np.ndindex(grid):
        weights = np.zeros(grid, np.float32)
        weights[cell] = 1
        ((square,),) = attention_at(Planted(weights), [{**SQUARE, "partner": partner}]).values()
        found += [cell] * round(square.on_partner)
    assert found == expected


def test_sentence():
    right, wrong = (measured(planted({cell: 1})) for cell in (PARTNER, OTHER))
    assert describe_squares([right, right, right, wrong]) == (
        "A square attends to 0.78 % of the places, the strongest on the disc that tells its class "
        "in 75% of 4 cases; on that disc is 75% of the attention."
    )
    nothing = measured(planted({}))
    assert not nothing.is_strongest_on_partner
    assert describe_squares([nothing]) == "A square attends to nothing."
    assert "in 50% of 2 cases; on that disc is 100%" in describe_squares([nothing, right])


def test_squares_that_a_block_does_not_see_are_left_out():
    record = Planted(planted({PARTNER: 1}))
    record.map = None
    assert attention_at(record, [SQUARE]) == {"res3": []}
