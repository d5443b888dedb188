"""Whether what a study reads is there, asked before anything is run."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.utils.file_io import PathManager

from lab.study.plan import StudyData, TrainingRun
from nl_detectron.data import register_built_in
from nl_detectron.engine.setup import missing_download
from nl_detectron.validation import did_you_mean


def check_inputs(runs: Sequence[TrainingRun]) -> None:
    """Check the data and the weights of all runs. Weights with a URL are downloaded: the nodes of a
    cluster often have no network. FileNotFoundError: a line for each thing that is missing."""
    of_setting = {run.setting: run for run in runs}
    names, weights = set(), set()
    for run in of_setting.values():
        cfg = CfgNode.load_cfg(run.config)
        names |= set() if run.data else {*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST}
        weights |= {cfg.MODEL.WEIGHTS} - {""}
    problems = [*map(_missing_data, sorted(names)), *map(_missing_weights, sorted(weights))]
    if runs and runs[0].data:  # one for all
        problems += _missing_files(runs[0].data)
    if lines := [problem for problem in problems if problem]:
        raise FileNotFoundError("\n".join(lines))


def _missing_data(name: str) -> str | None:
    register_built_in([name])
    if name not in DatasetCatalog.list():
        return f"the dataset {name} is not registered{did_you_mean(name, DatasetCatalog.list())}"
    problem = missing_download(name)
    return f"the dataset {name} is not there: {problem}" if problem else None


def _missing_files(data: StudyData) -> list[str]:
    problems = []
    for key, file in data.files.items():
        if not file.exists():
            problems.append(f"data: {key} is {file}, which does not exist")
        elif key in data.sha256 and sha256(file.read_bytes()).hexdigest() != data.sha256[key]:
            problems.append(f"data: {key} is {file}, whose SHA-256 is not {data.sha256[key]}")
    return [*problems, f"data: where to get it: {data.source}"] if problems else []


def _missing_weights(weights: str) -> str | None:
    try:
        path = Path(PathManager.get_local_path(weights))
        return None if path.is_file() else f"MODEL.WEIGHTS is {weights}, a file that does not exist"
    # A handler of URLs may fail with anything.
    except Exception as error:
        reason = " ".join(str(error).split())
        return f"MODEL.WEIGHTS is {weights}, which cannot be had: {type(error).__name__}: {reason}"
