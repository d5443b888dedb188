"""The blocks of Asymmetric Non-local Networks: MendelXu/ANN's and mmsegmentation's."""

from __future__ import annotations

from nl_detectron.weights.family import Family

FAMILY = Family(
    title="ANN",
    modules={
        "theta": "f_query.0",
        "phi": "f_key.0",
        "g": "f_value",
        "out": "W",
        "theta mmsegmentation": "query_project.conv",
        "phi mmsegmentation": "key_project.conv",
        "g mmsegmentation": "value_project",
        "out mmsegmentation": "out_project",
    },
    scales={},
    needs=(frozenset({"theta", "phi", "g", "out"}),),
    refusal=(
        "ANN's theta and phi end in batch norm and a ReLU, and its result is concatenated to x, "
        "not added, so that our block cannot compute the same"
    ),
)
