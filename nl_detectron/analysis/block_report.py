"""What non-local blocks have learnt: their weights, what they change, what they attend to."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from detectron2.engine import DefaultPredictor
from detectron2.evaluation import inference_context
from torch import Tensor, nn

from nl_detectron.analysis.recording import record_calls
from nl_detectron.data.coco_format import Record
from nl_detectron.engine.predictor import image_mapper
from nl_detectron.layers import ATTENTION, AttentionBlock
from nl_detectron.layers.norm import inference_scale
from nl_detectron.modeling import mean_abs_gamma, nonlocal_blocks, out_weight_norm
from nl_detectron.modeling.blocks import norm_after_out, out_weight

# Where the sentences of a BlockReport change.
MIN_CHANGE = 1e-3
MAX_ENTROPY = 0.95
MIN_QUERY_DEPENDENCE = 0.05

_MAX_QUERIES = 64
_MEASURED = ("relative_change", "attention_entropy", "attended_share", "query_dependence")


@dataclass(frozen=True)
class BlockReport:
    """What one block has learnt. None is what the block has not, or what could not be measured."""

    block: str
    """Its full name in the model."""
    pairwise: str
    """The kind of its weights in :data:`nl_detectron.layers.ATTENTION`."""
    out_weight_norm: float | None
    """||W_z||, the Frobenius norm; of a global context block, ||W_2||."""
    mean_abs_gamma: float | None
    """The mean of |gamma|, the scale of the norm after W_z; None without one."""
    effective_norm: float | None
    """||diag(gamma / sigma) W_z||: W_z with batch norm folded in, as it acts in inference. None for
    norms that depend on the input."""
    relative_change: float | None
    """||z - x|| / ||x||, over the whole of an input x; mean of all inputs."""
    attention_entropy: float | None
    """-sum_j p_j log p_j / log N_k of the attention p of a query to N_k keys, from 0 (one key) to 1
    (all alike); mean of a sample of queries. None if the weights are no distribution, as those of
    the dot product and the concatenation are not (those of a disentangled block sum to 2, and are
    halved), or if there is one key only."""
    attended_share: float | None
    """exp(-sum_j p_j log p_j) / N_k: the share of the keys that it attends to, counted as if it did
    so evenly; mean of the queries. None as for the entropy."""
    query_dependence: float | None
    """The mean of (1 - cos(p, q)) / 2 over all pairs of attention maps p, q of different sampled
    queries in the same input: 0 if all queries attend to the same places. This is the cosine
    distance of Table 1 of GCNet (https://arxiv.org/abs/1904.11492). Maps of zeros, which the
    concatenation may have, are left out."""

    def sentence(self) -> str:
        """What the measurements mean, in plain words."""
        if self.relative_change is None:
            return (
                "It was given nothing, so only its weights are known; a head is given what is "
                "detected: try other images."
            )
        if self.relative_change < MIN_CHANGE:
            return (
                f"It changes its input by less than {100 * MIN_CHANGE:g} %: it has learnt next to "
                "nothing."
            )
        parts = [f"It changes its input by {100 * self.relative_change:.1f} %"]
        if self.attention_entropy is None:
            parts.append("its weights are no distribution, so they have no entropy")
        elif self.attention_entropy > MAX_ENTROPY:
            parts.append("it attends to everything nearly alike")
        else:
            parts.append(f"it attends to {in_places(self.attended_share or 1)}")
        if self.pairwise == "global_context":
            parts.append("all queries attend to the same places, as it is made to")
        elif self.query_dependence is not None and self.query_dependence < MIN_QUERY_DEPENDENCE:
            parts.append(
                "all queries attend to the same places: a global context block would do (GCNet)"
            )
        elif self.query_dependence is not None:
            parts.append("different queries attend to different places")
        return "; ".join(parts) + "."


def in_places(attended_share: float) -> str:
    """A share of the keys in words: "1.6 % of the places"."""
    return f"{float(f'{100 * attended_share:.2g}'):g} % of the places"


def inspect_blocks(model: nn.Module, batches: Iterable[Any]) -> list[BlockReport]:
    """
    Run a model in evaluation mode on each of the batches, which for a detector are lists of dicts,
    and report on each :class:`AttentionBlock` in it, in the model's order.
    """
    blocks = nonlocal_blocks(model, AttentionBlock)
    measured: dict[str, list[dict[str, float]]] = {name: [] for name in blocks}
    with inference_context(model), torch.no_grad():
        for batch in batches:
            with record_calls(blocks) as calls:
                model(batch)
            for name, inputs in calls.items():
                measured[name] += [_measure_input(blocks[name], x) for (x,) in inputs if x.numel()]
    return [
        BlockReport(
            block=name,
            pairwise=block.pairwise,
            out_weight_norm=out_weight_norm(block),
            mean_abs_gamma=mean_abs_gamma(block),
            effective_norm=_effective_norm(block),
            **{field: _mean(m[field] for m in measured[name]) for field in _MEASURED},
        )
        for name, block in blocks.items()
    ]


def inspect_records(predictor: DefaultPredictor, records: Iterable[Record]) -> list[BlockReport]:
    """:func:`inspect_blocks` of a predictor's model, on records of a dataset."""
    mapper = image_mapper(predictor.cfg)
    return inspect_blocks(predictor.model, ([mapper(record)] for record in records))


def _effective_norm(block: AttentionBlock) -> float | None:
    if (norm := norm_after_out(block)) is None:
        return out_weight_norm(block)
    weight, scale = out_weight(block), inference_scale(norm)
    return None if weight is None or scale is None else (weight * scale.detach()).norm().item()


def _measure_input(block: AttentionBlock, x: Tensor) -> dict[str, float]:
    """The ``_MEASURED`` of one input; NaN is what is not defined for it."""
    positions = torch.randperm(x[0, 0].numel(), generator=torch.Generator().manual_seed(0))
    weights = block.attention(x, positions[:_MAX_QUERIES]).flatten(2).double()
    entropy, keys = torch.tensor(math.nan), weights.shape[2]
    if (weight_sum := ATTENTION[block.pairwise].weight_sum) and keys > 1:
        entropy = torch.special.entr(weights / weight_sum).sum(2)
    change = (block(x) - x).float().norm() / x.float().norm()
    share, evenness = entropy.exp().mean() / keys, entropy.mean() / math.log(max(keys, 2))
    values = (change.item(), evenness.item(), share.item(), _mean_cosine_distance(weights))
    return dict(zip(_MEASURED, values))


def _mean_cosine_distance(maps: Tensor) -> float:
    """(B, Q, N_k) to the mean over the pairs of each of the batch, and over the batch."""
    unit = nn.functional.normalize(maps, dim=2)
    count = maps.any(2).sum(1)
    # The sum over all pairs is the square of the sum, less that of each map with itself.
    pairs = count * (count - 1)
    cosine = (unit.sum(1).square().sum(1) - count) / pairs
    return ((1 - cosine[pairs > 0]) / 2).mean().item()


def _mean(values: Iterable[float]) -> float | None:
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else None
