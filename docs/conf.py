"""Sphinx's settings for the site that `make docs` builds of these pages, README and docstrings."""

from __future__ import annotations

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
nb_execution_raise_on_error = True
nb_execution_timeout = 600  # seconds, for one cell
autoclass_content = "both"  # the docstrings of a class and of its __init__
autodoc_member_order = "bysource"
autodoc_typehints = "description"
