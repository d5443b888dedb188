"""How the cost of the operation grows with the number of positions N."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from nl_detectron.benchmark.cases import Case
from nl_detectron.benchmark.contestants import OURS, TEXTBOOK, make_block, make_contestant
from nl_detectron.benchmark.measure import FORWARD_BACKWARD, MEASURED, Outcome, Trial, measure

POSITIONS = tuple(2**power for power in range(10, 19))  # 1k ... 256k
QUICK_POSITIONS = tuple(2**power for power in range(7, 12))
# The softmax takes O(N^2) time, whoever computes it.
MAX_SOFTMAX_POSITIONS = 2**15
# At small N the cost is that of calling functions, not of computing.
FITTED_POINTS = 4


@dataclass(frozen=True)
class Point:
    """One implementation of the operation at one N, forward + backward, 128 channels."""

    pairwise: str
    implementation: str
    positions: int
    outcome: Outcome

    def as_dict(self) -> dict[str, Any]:
        """All of it on one level, for JSON."""
        point = asdict(self)
        return {**point, **point.pop("outcome")}


@dataclass(frozen=True)
class Growth:
    """The exponents p of cost ~ N^p; None where there are too few points."""

    pairwise: str
    implementation: str
    time_exponent: float | None
    memory_exponent: float | None


def positions_for(pairwise: str, positions: Sequence[int]) -> list[int]:
    """Those N at which a pairwise function is measured."""
    is_softmax = pairwise in ("gaussian", "embedded_gaussian")
    return [n for n in positions if not is_softmax or n <= MAX_SOFTMAX_POSITIONS]


def measure_at(pairwise: str, positions: int, device: torch.device, budget: float) -> list[Point]:
    """Our operation and the textbook form on random embeddings (1, N, 128)."""
    block = make_block(Case("res2", pairwise)).to(device)
    embeddings = tuple(torch.randn(1, positions, 128, device=device) for _ in range(4))
    inputs, cotangent = tuple(t.requires_grad_() for t in embeddings[:3]), embeddings[3]
    trials = {}
    for name in (OURS, TEXTBOOK):
        operation = make_contestant(name, block).operation
        assert operation is not None
        trials[name] = Trial(operation, inputs, cotangent)
    outcomes = measure(trials, FORWARD_BACKWARD, device, budget)
    return [Point(pairwise, name, positions, outcome) for name, outcome in outcomes.items()]


def fit_growth(points: Sequence[Point]) -> list[Growth]:
    """The slopes of log cost over log N, at the ``FITTED_POINTS`` largest N of each series."""
    series: dict[tuple[str, str], list[Point]] = {}
    for point in points:
        measured = series.setdefault((point.pairwise, point.implementation), [])
        if point.outcome.status == MEASURED:
            measured.append(point)
    growths = []
    for (pairwise, implementation), measured in series.items():
        largest = sorted(measured, key=lambda point: point.positions)[-FITTED_POINTS:]
        n = [point.positions for point in largest]
        growths.append(
            Growth(
                pairwise,
                implementation,
                _slope(n, [point.outcome.seconds for point in largest]),
                _slope(n, [point.outcome.memory_bytes for point in largest]),
            )
        )
    return growths


def _slope(n: list[int], cost: Sequence[float | None]) -> float | None:
    if len(n) < 2:
        return None
    return float(np.polyfit(np.log(n), np.log(np.array(cost, dtype=float)), 1)[0])
