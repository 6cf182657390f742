"""Markdown pages, pictures and docstrings -> the web pages of the documentation, with Sphinx; built and read without a network."""

from __future__ import annotations

import re
from typing import Any

from streamprior import __version__

project = "streamprior"
release = version = __version__
author = "the streamprior developers"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_heading_anchors = 3
highlight_language = "none"  # an indented block may be YAML, shell, Python or a drawing

autodoc_typehints = "none"  # the docstrings say shape, dtype and unit, which the hints cannot
autodoc_member_order = "bysource"
# The device and the suspender are described from their source wherever Bluesky is not installed.
autodoc_mock_imports = ["bluesky", "event_model", "ophyd_async"]
napoleon_google_docstring = False
napoleon_use_ivar = True

default_role = "code"

html_theme = "pydata_sphinx_theme"
html_title = f"streamprior {release}"
html_show_sphinx = False
html_copy_source = False
html_show_sourcelink = False
html_theme_options = {
    "show_toc_level": 2,
    "footer_start": ["copyright"],
    "footer_end": [],
    "secondary_sidebar_items": ["page-toc"],
}
html_sidebars = {page: [] for page in ("index", "tutorial", "gallery", "changes")}  # they stand alone: nothing to list beside them
copyright = "the streamprior developers, BSD-3-Clause"

_NAMED = re.compile(r"^([A-Za-z_][\w, :]*?) : (.*)$")


def plain_text_to_restructured(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Docstrings are written for who reads the source: give Sphinx lists where they have `name : meaning`, and take | and * as they are.

    Runs before napoleon, to which the sections from the first underlined heading on are left.
    """
    body = next((i - 1 for i, line in enumerate(lines) if i and line and set(line) == {"-"}), len(lines))
    made: list[str] = []
    listing = False
    for line in lines[:body]:
        named = _NAMED.match(line)
        if named:
            made += [] if listing else [""]
            made.append(f"* ``{named[1]}``: {named[2]}")
        else:
            made.append(f"  {line.strip()}" if listing and line else line)
        listing = bool(line) and (listing or bool(named))
    lines[:] = [re.sub(r"(?<!^)\*(?!$)|\|", r"\\\g<0>", line) for line in [*made, *lines[body:]]]


def setup(app: Any) -> None:
    app.connect("autodoc-process-docstring", plain_text_to_restructured, priority=400)
