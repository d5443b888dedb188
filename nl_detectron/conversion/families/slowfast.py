"""SlowFast's ``nonlocal_helper.py``."""

from __future__ import annotations

import re
from collections.abc import Sequence

from nl_detectron.conversion.family import NO_SOFTMAX, Family


def is_slowfast(names: Sequence[str]) -> bool:
    """Whether they are SlowFast's: PyTorchVideo names but the norm and the block otherwise."""
    return any(re.search(r"(^|\.)pathway\d+_nonlocal\d+\.|(^|\.)bn\.", name) for name in names)


CONVS = {"theta": "conv_theta", "phi": "conv_phi", "g": "conv_g", "out": "conv_out"}
SCALES = {"embedded_gaussian": (True,), "dot_product": NO_SOFTMAX}

FAMILY = Family(
    title="SlowFast",
    modules={**CONVS, "norm": "bn", "norm renamed": "norm"},
    scales=SCALES,
    subsample=("input", "none"),
    place=(r"(?:.*\.)?s(\d)\.pathway0_nonlocal(\d+)", r"res\1.nonlocal\2"),
    recognises=is_slowfast,
    usual={"pairwise": "dot_product", "subsample": "input"},
)
