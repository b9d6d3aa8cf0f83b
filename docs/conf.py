# SPDX-License-Identifier: Apache-2.0
"""Build the documentation site of the pages in this folder: `sphinx-build -W --keep-going docs site`."""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import cupy_router  # noqa: E402  # it is found by the path above

project = "cupy_router"
copyright = "the authors of cupy_router, Apache-2.0"
version = release = cupy_router.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = f"cupy_router {version}"
html_copy_source = False
html_static_path, html_css_files = ["_static"], ["wide.css"]
highlight_language = "text"  # of blocks without a language
default_role = "code"  # docstrings write `name`
napoleon_use_ivar = True  # fields of results as a list
napoleon_attr_annotations = False  # and without their types, which are all Any
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # docstrings have dtypes and shapes
myst_heading_anchors = 4

_hook = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["hatch"]["metadata"]["hooks"]["custom"]
REPOSITORY = _hook["repository"]
LINK = re.compile(r"\[([^\]]+)\]\(\.\./([^)]+)\)")


def link_files(app: Any, page: str, text: list[str]) -> None:
    """Let links to files outside of docs/ lead to the repository, or make them plain text while it has no address."""
    text[0] = LINK.sub(rf"[\1]({REPOSITORY}/blob/v{version}/\2)" if REPOSITORY else r"\1", text[0])


def link_pages(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Let the names of pages in docstrings be links."""
    lines[:] = [re.sub(r"\bdocs/(\w+)\.md", r":doc:`\1`", line) for line in lines]


def setup(app: Any) -> None:
    app.connect("autodoc-process-docstring", link_pages)
    app.connect("source-read", link_files)
