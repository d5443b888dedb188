"""Whether what a study reads is there, asked before anything is run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.utils.file_io import PathManager

from lab.study.plan import TrainingRun
from nl_detectron.data import register_built_in
from nl_detectron.engine.setup import missing_download
from nl_detectron.validation import did_you_mean


def check_inputs(runs: Sequence[TrainingRun]) -> None:
    """Check the datasets and the weights of all runs. Weights with a URL are downloaded: the nodes
    of a cluster often have no network. FileNotFoundError: a line for each thing that is missing."""
    configs = [
        CfgNode.load_cfg(text) for text in {run.setting: run.config for run in runs}.values()
    ]
    names = {name for cfg in configs for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)}
    weights = {cfg.MODEL.WEIGHTS for cfg in configs} - {""}
    problems = [*map(_missing_data, sorted(names)), *map(_missing_weights, sorted(weights))]
    if lines := [problem for problem in problems if problem]:
        raise FileNotFoundError("\n".join(lines))


def _missing_data(name: str) -> str | None:
    register_built_in([name])
    if name not in DatasetCatalog.list():
        return f"the dataset {name} is not registered{did_you_mean(name, DatasetCatalog.list())}"
    problem = missing_download(name)
    return f"the dataset {name} is not there: {problem}" if problem else None


def _missing_weights(weights: str) -> str | None:
    try:
        path = Path(PathManager.get_local_path(weights))
        return None if path.is_file() else f"MODEL.WEIGHTS is {weights}, a file that does not exist"
    # A handler of URLs may fail with anything.
    except Exception as error:
        reason = " ".join(str(error).split())
        return f"MODEL.WEIGHTS is {weights}, which cannot be had: {type(error).__name__}: {reason}"
