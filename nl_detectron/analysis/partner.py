"""Whether the squares of ``long_range_match`` attend to the discs that tell their classes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from detectron2.data.detection_utils import read_image
from detectron2.engine import DefaultPredictor

from nl_detectron.analysis.attention import AttentionRecord, attention_of
from nl_detectron.analysis.attention_map import AttentionMap
from nl_detectron.analysis.block_report import in_places
from nl_detectron.analysis.placement import Point
from nl_detectron.data.coco_format import Record


@dataclass(frozen=True)
class SquareAttention:
    """
    What counts for the centre of a square in one block. Values are taken by magnitude; shares of
    values that are all 0, as those of the concatenation may be, are NaN.

    Attributes:
        on_partner: the share of the values, 0 to 1, on its partner: on the keys whose centres lie
            in the disc, and the nearest to the disc's centre.
        even: the share that would be there if all keys counted alike.
        is_strongest_on_partner: whether the strongest of all keys, its own included, and any as
            strong, is one of the partner's.
        attended_share: exp(-sum_j p_j log p_j) / N_k of the shares p of the N_k keys: the share of
            the keys that it attends to, counted as if it did so evenly.
    """

    category_id: int
    on_partner: float
    even: float
    is_strongest_on_partner: bool
    attended_share: float


def inspect_squares(
    predictor: DefaultPredictor, records: Iterable[Record], what: str = "weights"
) -> dict[str, list[SquareAttention]]:
    """Block to what counts for each square that it sees; those without "partner" are left out."""
    found: dict[str, list[SquareAttention]] = {}
    for record in records:
        if squares := [a for a in record.get("annotations", ()) if "partner" in a]:
            attention = attention_of(predictor, read_image(record["file_name"], "BGR"))
            for block, of_squares in attention_at(attention, squares, what).items():
                found.setdefault(block, []).extend(of_squares)
    return found


def attention_at(
    attention: AttentionRecord, squares: Sequence[Record], what: str = "weights"
) -> dict[str, list[SquareAttention]]:
    """Block to what counts for each of the squares, annotations of the image, that it sees."""
    maps = attention.maps([center_of(square) for square in squares], what)
    return {
        block.name: [
            _measure_square(m, square) for m, square in zip(block.maps, squares) if m is not None
        ]
        for block in maps.blocks
    }


def center_of(square: Record) -> Point:
    """x and y of the centre of an annotation's box, in pixels."""
    x, y, width, height = square["bbox"]
    return x + width / 2, y + height / 2


def describe_squares(squares: Sequence[SquareAttention]) -> str:
    """What that means, of at least one square and in one block, in plain words."""
    weighted = [square for square in squares if square.attended_share > 0]
    if not weighted:
        return "A square attends to nothing."
    attended = in_places(float(np.mean([square.attended_share for square in weighted])))
    share = np.mean([square.on_partner for square in weighted])
    is_right = np.mean([square.is_strongest_on_partner for square in squares])
    return (
        f"A square attends to {attended}, the strongest on the disc that tells its "
        f"class in {is_right:.0%} of {len(squares)} cases; on that disc is {share:.0%} of the "
        "attention."
    )


def _measure_square(attention_map: AttentionMap, square: Record) -> SquareAttention:
    magnitudes = torch.from_numpy(attention_map.values).abs().double()
    shares = magnitudes / magnitudes.sum()
    centers = torch.from_numpy(attention_map.centers)
    *partner, radius = square["partner"]
    distance = (centers - torch.tensor(partner)).norm(dim=2)
    is_partner = (distance <= radius) | (distance == distance.min())
    is_strongest = (magnitudes == magnitudes.max()) & (magnitudes > 0)
    return SquareAttention(
        category_id=square["category_id"],
        on_partner=shares[is_partner].sum().item(),
        even=is_partner.double().mean().item(),
        is_strongest_on_partner=bool(is_strongest.any() and is_partner[is_strongest].all()),
        attended_share=torch.special.entr(shares).sum().exp().item() / shares.numel(),
    )
