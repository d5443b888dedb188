"""Sphinx's settings for the site that `make docs` builds of these pages, README and docstrings."""

from __future__ import annotations

import os
import re
from typing import Any

from nl_detectron import __version__

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
    ("myst", r"(.*/)?(configs|lab|nl_detectron)/.*|LICENSE|(CHANGELOG|CONTRIBUTING)\.md")
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


def setup(app: Any) -> None:
    app.connect("autodoc-process-docstring", escape_docstring, priority=400)  # before napoleon
