"""Sphinx's settings for the site that `make docs` builds of these pages, README and docstrings."""

from __future__ import annotations

import inspect
import os
import re
from pathlib import Path
from typing import Any

from nl_detectron import __version__, add_nonlocal_config

# isort: split
from detectron2.config import get_cfg

from nl_detectron.config import walk

os.environ["NO_COLOR"] = "1"  # the tutorial is printed in pieces, which cut colour codes in two

project = "nl_detectron"
release = __version__
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"{project} {release}"
myst_heading_anchors = 3
# Of what is not in this folder the site has no page: such links become text.
nitpick_ignore_regex = [
    (
        "myst",
        r"(.*/)?(configs|lab|nl_detectron)/.*|LICENSE|train_net\.py|"
        r"(CHANGELOG|CONTRIBUTING)\.md(#.*)?",
    )
]
nb_execution_mode = "cache"  # only where the code of a page has changed
nb_execution_show_tb = True
nb_merge_streams = True
nb_execution_timeout = 1800  # seconds, for one cell
autoclass_content = "both"  # the docstrings of a class and of its __init__
autodoc_member_order = "bysource"
autodoc_typehints = "description"


def escape_docstring(*arguments: Any) -> None:
    """Our docstrings have no emphasis: `*grid` and `|gamma|` mean what they look like."""
    lines = arguments[-1]
    pattern = re.compile(r"``.+?``|\||\*(?=[*\w])")
    lines[:] = [
        pattern.sub(lambda m: m[0] if m[0].startswith("`") else f"\\{m[0]}", line) for line in lines
    ]


def config_page() -> str:
    """CONFIG.md: the keys that nl_detectron/config.py adds, their defaults, and its comments."""
    cfg = get_cfg()
    add_nonlocal_config(cfg)
    values = dict(walk(cfg))
    rows: dict[str, list[str]] = {}  # comment to keys
    comment, is_over = "", True
    for line in map(str.strip, inspect.getsource(add_nonlocal_config).splitlines()):
        declared = re.match(r'node\.(\w+) = |_add_missing\(cfg\.(\w+), \{"(\w+)": ', line)
        if line.startswith("# "):
            comment, is_over = ("" if is_over else f"{comment} ") + line[2:], False
        elif declared and comment:
            ours, node, key = declared.groups()
            name = f"MODEL.NONLOCAL.{ours}" if ours else f"{node}.{key}"
            children = [key for key in values if key.startswith(f"{name}.")]
            rows.setdefault(comment, []).extend(children or [name])
            is_over = True
        elif not line:
            comment = ""
    table = ["| key | default | what it does |", "|---|---|---|"]
    for text, keys in rows.items():
        text = re.sub(r"docs/(\w+)\.md", r"[\1](\1.md)", text.replace("*", r"\*"))
        cells = [f"`{key}`" for key in keys], [f"`{values[key]!r}`" for key in keys]
        table.append(f"| {' | '.join(map('<br>'.join, cells))} | {text} |")
    return CONFIG_PAGE.format("\n".join(table))


CONFIG_PAGE = """# Every key of the config

`docs/conf.py` makes this page from [`nl_detectron/config.py`](../nl_detectron/config.py), where
each key is declared with its sentence.

{}

All others are [Detectron2's](https://detectron2.readthedocs.io/modules/config.html#yaml-config-references).
"""


def setup(app: Any) -> None:
    Path(__file__).with_name("CONFIG.md").write_text(config_page(), encoding="utf-8")
    app.connect("autodoc-process-docstring", escape_docstring, priority=400)  # before napoleon
