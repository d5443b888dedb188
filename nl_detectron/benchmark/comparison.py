"""A case, measured for all implementations: the whole block, and the operation alone."""

from __future__ import annotations

import warnings
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from nl_detectron.benchmark.cases import Case
from nl_detectron.benchmark.contestants import (
    CONTESTANTS,
    Contestant,
    UnavailableError,
    make_block,
    make_contestant,
    make_input,
)
from nl_detectron.benchmark.measure import (
    FORWARD_BACKWARD,
    PASSES,
    UNAVAILABLE,
    Outcome,
    Trial,
    measure,
)
from nl_detectron.benchmark.textbook import embed
from nl_detectron.layers import NonLocalBlock

BLOCK = "block"
OPERATION = "operation"
# What is measured of each.
PASSES_OF = {BLOCK: PASSES, OPERATION: (FORWARD_BACKWARD,)}


@dataclass(frozen=True)
class Row:
    """
    One implementation in one case.

    Attributes:
        level: "block", the whole of it with its 1x1 convolutions and batch norm; or "operation",
            y alone from theta, phi and g.
        which: one of ``PASSES``.
    """

    case: Case
    implementation: str
    level: str
    which: str
    outcome: Outcome

    def as_dict(self) -> dict[str, Any]:
        """All of it on one level, for JSON; sizes in bytes, times in seconds."""
        return {
            **asdict(self.case),
            "channels": self.case.channels,
            "queries": self.case.grid[0] * self.case.grid[1],
            "keys": self.case.key_grid[0] * self.case.key_grid[1],
            "implementation": self.implementation,
            "level": self.level,
            "pass": self.which,
            **asdict(self.outcome),
        }


def compare(case: Case, device: torch.device, budget: float) -> list[Row]:
    """
    Measure all implementations.

    Args:
        case: what they compute.
        device: where.
        budget: as for :func:`measure`, for each level and pass.

    Returns:
        A row for every implementation, level and pass. Those whose operation cannot be taken out
        of the block have none for the operation.
    """
    warnings.simplefilter("ignore")  # what other packages deprecate among themselves
    block = make_block(case).to(device)
    contestants, unavailable = _contestants(block)
    rows = []
    for level, passes in PASSES_OF.items():
        x = make_input(case).to(device)
        trials = _trials(block, x, level, contestants)
        for which in passes:
            outcomes = measure(trials, which, device, budget)
            if level == BLOCK:
                outcomes.update(unavailable)
            rows += [Row(case, name, level, which, outcome) for name, outcome in outcomes.items()]
    return rows


def _contestants(block: NonLocalBlock) -> tuple[dict[str, Contestant], dict[str, Outcome]]:
    """Those that can take part, and why the others cannot."""
    contestants: dict[str, Contestant] = {}
    unavailable: dict[str, Outcome] = {}
    for name in CONTESTANTS:
        try:
            contestants[name] = make_contestant(name, block)
        except UnavailableError as error:
            unavailable[name] = Outcome(UNAVAILABLE, note=str(error))
    return contestants, unavailable


def _trials(
    block: NonLocalBlock, x: Tensor, level: str, contestants: dict[str, Contestant]
) -> dict[str, Trial]:
    if level == BLOCK:
        x.requires_grad_()
        cotangent = torch.randn_like(x)
        return {
            name: Trial(contestant.block, (x,), cotangent, tuple(contestant.block.parameters()))
            for name, contestant in contestants.items()
        }
    with torch.no_grad():
        theta, phi, g = embed(block, x)
    cotangent = torch.randn_like(theta[..., : g.shape[2]])
    inputs = tuple(t.detach().requires_grad_() for t in (theta, phi, g))
    return {
        name: Trial(contestant.operation, inputs, cotangent)
        for name, contestant in contestants.items()
        if contestant.operation is not None
    }
