"""Other people's code, whose models a config describes."""

from __future__ import annotations

import re
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

from detectron2.config import defaults

_ADDS_KEYS = re.compile(r"add_(\w+_)?config")


def use_project(project: str) -> None:
    """
    Import a module, and add its config keys to the defaults that Detectron2's ``get_cfg()`` copies.

    A module adds keys by functions of one argument, the config, with a name such as ``add_config``
    or ``add_pointrend_config``: all that it has, of its own or imported, are called in their order;
    or by changing the defaults when it is imported. From then on config files may have keys that
    nobody declared. It is named by its name, and may be in the working directory; or by its file or
    a package's folder. ValueError: it cannot be found or imported; the message says why.
    """
    try:
        for name, value in vars(_import(project)).items():
            if _ADDS_KEYS.fullmatch(name) and callable(value):
                value(defaults._C)
    except Exception as error:  # of any kind: the code is another's
        kind = "" if isinstance(error, ImportError) else f"{type(error).__name__}: "
        raise ValueError(f"{project} cannot be imported: {kind}{error}") from error
    defaults._C.set_new_allowed(True)


def _import(project: str) -> ModuleType:
    path = Path(project)
    if not (path.suffix == ".py" or path.is_dir()):
        sys.path.append(str(Path.cwd()))
        return import_module(project)
    if not path.exists():
        raise ImportError("the file does not exist")
    sys.path.insert(0, str(path.resolve().parent))
    module = import_module(path.stem)
    if not (module.__file__ and Path(module.__file__).resolve().is_relative_to(path.resolve())):
        raise ImportError(f"there is another module {path.stem}, {module.__file__}")
    return module
