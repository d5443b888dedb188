"""Sphinx's settings for the site that `make docs` builds of these pages, README and docstrings."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from nl_detectron import __version__

ROOT = Path(__file__).resolve().parent.parent

project = "nl_detectron"
release = __version__
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"{project} {release}"
myst_heading_anchors = 3
nb_execution_mode = "cache"  # only where the code of a page has changed
nb_execution_show_tb = True
nb_execution_timeout = 600  # seconds, for one cell
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


def link_as_text(app: Any, env: Any, node: Any, content: Any) -> Any:
    """A link to what the repository has, but the site has no page of, becomes its text."""
    target = node.get("reftarget", "")
    is_there = any((folder / target).exists() for folder in (ROOT, ROOT / "docs"))
    return content if node.get("reftype") == "myst" and is_there else None


def setup(app: Any) -> None:
    app.connect("autodoc-process-docstring", escape_docstring, priority=400)  # before napoleon
    app.connect("missing-reference", link_as_text)
