"""AlexHex7/Non-local_pytorch."""

from __future__ import annotations

from nl_detectron.weights.family import NO_SOFTMAX, Family

# The pairwise function is the file that the class was imported from, so there is no usual one.
FAMILY = Family(
    title="AlexHex7/Non-local_pytorch",
    modules={
        "theta": "theta",
        "phi": "phi",
        "phi pooled": "phi.0",
        "g": "g",
        "g pooled": "g.0",
        "out": "W.0",
        "out alone": "W",
        "norm": "W.1",
        "concat": "concat_project.0",
    },
    scales={"gaussian": (False,), "embedded_gaussian": (False,), **NO_SOFTMAX},
    subsample=("none", "embeddings"),
)
