"""How Sphinx makes the site: ``make docs``."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import auxkern

project = "auxkern"
version = release = auxkern.__version__
extensions = ["myst_parser"]
exclude_patterns = ["_*"]
highlight_language = "text"
myst_heading_anchors = 3  # a heading is reached as on GitHub: small letters with hyphens

html_theme = "pydata_sphinx_theme"
html_title = "auxkern"
html_show_sourcelink = html_copy_source = False
html_theme_options = {
    "navbar_align": "left",
    "secondary_sidebar_items": ["page-toc"],
    "footer_start": [],
    "footer_end": [],
}
