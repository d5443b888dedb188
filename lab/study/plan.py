"""What a study compares, read from a YAML file, and the training runs that this takes."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from nl_detectron.config import build_config
from nl_detectron.validation import check_choice

_FILE = (str, "the path of a file")
_SEEDS = "a list of different integers from 0"
_KEYS = {
    "config": _FILE,
    "seeds": (list, _SEEDS),
    "settings": (dict, "a mapping of names to overrides"),
    "groups": (dict, "a mapping of titles to settings"),
    "data": (dict, "a mapping of files to their paths"),
    "compare": (dict, "a mapping with a metric and 'to'"),
}
_REQUIRED_KEYS = ("config", "seeds", "settings", "groups")
_DATA_FILES = ("train_json", "train_images", "val_json", "val_images")  # options of train_net.py
_OWN_KEYS = {"SEED", "OUTPUT_DIR"}  # set for each run
# What a setting may have beside its overrides.
_SETTING_KEYS = {"config": _FILE, "paper": (dict, "a mapping of metrics to numbers")}


@dataclass(frozen=True)
class StudyData:
    """Data in COCO's format that all runs of a study train and evaluate on."""

    files: dict[str, Path]
    source: str  # where to get them
    sha256: dict[str, str]  # of some of the files

    @property
    def options(self) -> list[str]:
        """Those of train_net.py."""
        options = [(f"--{key.replace('_', '-')}", str(file)) for key, file in self.files.items()]
        return [word for option in options for word in option]


@dataclass(frozen=True)
class TrainingRun:
    """One training run: a setting with a seed."""

    setting: str
    seed: int
    folder: Path
    config: str  # all of it except OUTPUT_DIR, as YAML
    data: StudyData | None = field(default=None, hash=False)  # if it is not the config's

    @property
    def iterations(self) -> int:
        """How many it is trained for."""
        return yaml.safe_load(self.config)["SOLVER"]["MAX_ITER"]

    def __str__(self) -> str:
        return f"{self.setting}, seed {self.seed}"


@dataclass(frozen=True)
class StudyPlan:
    """A study; see :func:`load_plan`."""

    config: Path
    seeds: list[int]
    settings: dict[str, dict[str, Any]]
    groups: dict[str, list[str]]
    configs: dict[str, Path] = field(default_factory=dict)
    paper: dict[str, dict[str, float]] = field(default_factory=dict)
    data: StudyData | None = None
    compare: dict[str, str] = field(default_factory=dict)

    def part(
        self, settings: Collection[str] | None = None, seeds: list[int] | None = None
    ) -> StudyPlan:
        """That of these settings and seeds alone, with the groups that have any of them; where
        settings are named, without groups that compare no more than another does."""
        for name in settings or ():
            check_choice("a setting", name, list(self.settings))
        seeds = self.seeds if seeds is None else _checked_seeds(seeds)
        chosen = {k: v for k, v in self.settings.items() if settings is None or k in settings}
        groups = {title: [n for n in names if n in chosen] for title, names in self.groups.items()}
        if settings is not None:
            groups = _largest(groups)
        return replace(self, seeds=seeds, settings=chosen, groups=groups)

    def runs(self, output: Path, overrides: Sequence[str] = ()) -> list[TrainingRun]:
        """
        All runs: every setting with the first seed, then every setting with the second, so that a
        study which is stopped early has compared all. The overrides are for all settings, over
        their own. ValueError: those of a setting do not fit the config.
        """
        return [
            TrainingRun(
                name,
                seed,
                output / name / f"seed_{seed}",
                self._config(name, seed, overrides),
                self.data,
            )
            for seed in self.seeds
            for name in self.settings
        ]

    def _config(self, setting: str, seed: int, overrides: Sequence[str]) -> str:
        own = [word for item in self.settings[setting].items() for word in item]
        try:
            cfg = build_config(self.configs.get(setting, self.config), [*own, *overrides])
        except (ValueError, KeyError) as error:
            raise ValueError(f"settings: {setting}: {error.args[0]}") from error
        cfg.SEED = seed
        cfg.MODEL.WEIGHTS = cfg.MODEL.WEIGHTS.replace("{seed}", str(seed))
        cfg.OUTPUT_DIR = ""
        return cfg.dump()


def _largest(groups: dict[str, list[str]]) -> dict[str, list[str]]:
    """Without those that are empty, or a part of another; of equal ones the first."""
    kept: list[str] = []
    for title in sorted(groups, key=lambda title: -len(groups[title])):
        if groups[title] and not any(set(groups[title]) <= set(groups[k]) for k in kept):
            kept.append(title)
    return {title: names for title, names in groups.items() if title in kept}


def load_plan(path: Path) -> StudyPlan:
    """
    Read a plan from a YAML file such as ::

        config: ../configs/long_range.yaml  # relative to the plan
        seeds: [1, 2, 3]
        settings:  # name to overrides of the config; an empty one (``nl:``) has none
          nl: {}
          nl_dot_product: {MODEL.NONLOCAL.PAIRWISE: dot_product}
          # A setting may have a config of its own, and what a paper reports for it.
          shapes: {config: ../configs/quick_start.yaml, paper: {bbox/AP: 38.0}}
        groups:  # a title to the settings that are compared below it
          Pairwise functions: [nl, nl_dot_product]
        # Optional: data in COCO's format, below $DETECTRON2_DATASETS (default: datasets), instead
        # of the config's; where to get it, and checksums that are compared before anything runs.
        data:
          train_json: mine/train.json
          train_images: mine/train
          val_json: mine/val.json
          val_images: mine/val
          source: https://example.org/mine.zip
          sha256: {train_json: 08da..., val_json: 4885...}
        # Optional: the comparison that counts, of all settings with one.
        compare: {metric: segm/AP, to: nl}

    ``{seed}`` in ``MODEL.WEIGHTS`` stands for the seed of a run, as in
    ``output/studies/long_range/baseline/seed_{seed}/model_final.pth``. ValueError: it is not such a
    plan; the message names the file and the place in it.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeError) as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    try:
        _check(content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    settings = {name: dict(overrides or {}) for name, overrides in content["settings"].items()}
    files, paper = (
        {name: own for name, setting in settings.items() if (own := setting.pop(key, None))}
        for key in _SETTING_KEYS
    )
    for file in (content["config"], *files.values()):
        if not (path.parent / file).is_file():
            raise ValueError(f"{path}: config is {file}, but there is no file {path.parent / file}")
    configs = {name: path.parent / file for name, file in files.items()}
    return StudyPlan(
        path.parent / content["config"],
        content["seeds"],
        settings,
        content["groups"],
        configs,
        paper,
        _study_data(**content["data"]) if content.get("data") else None,
        content.get("compare") or {},
    )


def _study_data(source: str = "", sha256: dict[str, str] | None = None, **files: str) -> StudyData:
    root = Path(os.getenv("DETECTRON2_DATASETS", "datasets")).expanduser()
    return StudyData({key: root / files[key] for key in _DATA_FILES}, source, sha256 or {})


def _check(content: Any) -> None:
    """ValueError: the content of a plan is not as :func:`load_plan` shows it."""
    if not isinstance(content, dict):
        raise ValueError(f"a plan is a mapping with the keys {', '.join(_REQUIRED_KEYS)}")
    for key, value in content.items():
        check_choice("a key", key, _KEYS)
        if value:
            _expect(key, value, *_KEYS[key])
    for key in _REQUIRED_KEYS:
        if not content.get(key):
            raise ValueError(f"it has no {key}")
    _checked_seeds(content["seeds"])
    for name, overrides in content["settings"].items():
        _check_setting(name, {} if overrides is None else overrides)
    names = list(content["settings"])
    for title, group in content["groups"].items():
        if not isinstance(group, list) or not group:
            raise ValueError(f"groups: {title} is {group!r}, not a list of settings")
        for name in group:
            check_choice(f"groups: {title}: a setting", name, names)
    _check_data(content.get("data") or {})
    if compare := content.get("compare"):
        if compare.keys() != {"metric", "to"}:
            raise ValueError(f"compare is {compare!r}, not {_KEYS['compare'][1]}")
        check_choice("compare: to", compare["to"], names)


def _check_setting(name: Any, overrides: Any) -> None:
    # It becomes the name of a folder.
    if not isinstance(name, str) or not name.replace("-", "_").isidentifier():
        raise ValueError(
            f"settings: {name!r} is no name: letters, digits, - and _, not a digit first"
        )
    _expect(f"settings: {name}", overrides, dict, "a mapping of config keys")
    for key in _OWN_KEYS.intersection(overrides):
        raise ValueError(f"settings: {name}: {key} is for the study itself to set")
    for key, (kind, legal) in _SETTING_KEYS.items():
        if overrides.get(key) is not None:
            _expect(f"settings: {name}: {key}", overrides[key], kind, legal)
    for metric, value in (overrides.get("paper") or {}).items():
        _expect(f"settings: {name}: paper: {metric}", value, (int, float), "a number")


def _check_data(data: dict[str, Any]) -> None:
    for key in data:
        check_choice("data: a key", key, (*_DATA_FILES, "source", "sha256"))
    for key in _DATA_FILES if data else ():
        _expect(f"data: {key}", data.get(key), str, "a path")
    for key in data.get("sha256") or ():
        check_choice("data: sha256: a file", key, _DATA_FILES[::2])


def _expect(name: str, value: Any, kind: type | tuple[type, ...], legal: str) -> None:
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"{name} is {value!r}, not {legal}")


def _checked_seeds(seeds: list[Any]) -> list[int]:
    # Detectron2 takes a negative seed for "a random one".
    if not all(type(seed) is int and seed >= 0 for seed in seeds) or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds is {seeds!r}, not {_SEEDS}")
    return seeds
