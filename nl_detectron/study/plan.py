"""What a study compares, read from a YAML file, and the training runs that this takes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from nl_detectron.config import build_config
from nl_detectron.validation import check_choice

_KEYS = {
    "config": (str, "the path of a file"),
    "seeds": (list, "a list of different integers from 0"),
    "settings": (dict, "a mapping of names to overrides"),
    "groups": (dict, "a mapping of titles to settings"),
}
_OWN_KEYS = {"SEED", "OUTPUT_DIR"}  # set for each run


@dataclass(frozen=True)
class Run:
    """One training run: a setting with a seed."""

    setting: str
    seed: int
    folder: Path
    config: str  # all of it except OUTPUT_DIR, as YAML

    def __str__(self) -> str:
        return f"{self.setting}, seed {self.seed}"


@dataclass(frozen=True)
class Plan:
    """A study; see :func:`load_plan`."""

    config: Path
    seeds: list[int]
    settings: dict[str, dict[str, Any]]
    groups: dict[str, list[str]]

    def runs(self, output: Path) -> list[Run]:
        """
        Args:
            output: the study's folder.

        Returns:
            All runs, each with a folder of its own in ``output``: every setting with the first
            seed, then every setting with the second, so that a study which is stopped early has
            compared all settings with fewer seeds.

        Raises:
            ValueError: a setting's overrides do not fit the config; the message names it.
        """
        return [
            Run(setting, seed, output / setting / f"seed_{seed}", self._config(setting, seed))
            for seed in self.seeds
            for setting in self.settings
        ]

    def _config(self, setting: str, seed: int) -> str:
        overrides = [word for item in self.settings[setting].items() for word in item]
        try:
            cfg = build_config(self.config, overrides)
        except (ValueError, KeyError) as error:
            raise ValueError(f"settings: {setting}: {error.args[0]}") from error
        cfg.SEED = seed
        cfg.OUTPUT_DIR = ""
        return cfg.dump()


def load_plan(path: Path) -> Plan:
    """
    Args:
        path: a YAML file such as ::

            config: ../configs/long_range.yaml  # relative to the plan
            seeds: [1, 2, 3]
            settings:  # name to overrides of the config
              nl: {}
              nl_dot_product: {MODEL.NONLOCAL.PAIRWISE: dot_product}
            groups:  # a title to the settings that are compared below it
              Pairwise functions: [nl, nl_dot_product]

    Returns:
        The plan; an empty setting (``nl:``) is the config as it is.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not such a plan; the message names the file and the place in it.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeError) as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    try:
        _check(content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    config = path.parent / content["config"]
    if not config.is_file():
        raise ValueError(f"{path}: config is {content['config']}, but there is no file {config}")
    settings = {name: overrides or {} for name, overrides in content["settings"].items()}
    return Plan(config, content["seeds"], settings, content["groups"])


def _check(content: Any) -> None:
    """
    Raises:
        ValueError: the content of a plan is not as :func:`load_plan` shows it.
    """
    if not isinstance(content, dict):
        raise ValueError(f"a plan is a mapping with the keys {', '.join(_KEYS)}")
    for key in content:
        check_choice("a key", key, _KEYS)
    for key, (kind, legal) in _KEYS.items():
        if not content.get(key):
            raise ValueError(f"it has no {key}")
        if not isinstance(content[key], kind):
            raise ValueError(f"{key} is {content[key]!r}, not {legal}")
    seeds = content["seeds"]
    # Detectron2 takes a negative seed for "a random one".
    if not all(type(seed) is int and seed >= 0 for seed in seeds) or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds is {seeds!r}, not {_KEYS['seeds'][1]}")
    for name, overrides in content["settings"].items():
        # It becomes the name of a folder.
        if not isinstance(name, str) or not name.replace("-", "_").isidentifier():
            raise ValueError(
                f"settings: {name!r} is no name: letters, digits, - and _, not a digit first"
            )
        if not isinstance(overrides, (dict, type(None))):
            raise ValueError(f"settings: {name} is {overrides!r}, not a mapping of config keys")
        for key in _OWN_KEYS.intersection(overrides or {}):
            raise ValueError(f"settings: {name}: {key} is for the study itself to set")
    for title, names in content["groups"].items():
        if not isinstance(names, list) or not names:
            raise ValueError(f"groups: {title} is {names!r}, not a list of settings")
        for name in names:
            check_choice(f"groups: {title}: a setting", name, list(content["settings"]))
