"""How Sphinx makes the site: ``make docs``."""

from __future__ import annotations

import sys
from importlib.metadata import version as version_of
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE / "_ext")]

project = "auxkern"
version = release = version_of(project)
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "docstrings", "commands"]
exclude_patterns = ["_*"]
highlight_language = "text"
myst_heading_anchors = 3  # a heading is reached as on GitHub: small letters with hyphens

smartquotes = False  # two hyphens are an option's

autodoc_member_order = "bysource"
napoleon_use_rtype = False
napoleon_use_ivar = True
maximum_signature_line_length = 88
toc_object_entries_show_parents = "hide"

WIDE = ("bench-generation", "bench-loss", "bench-sampling", "gpu-model", "h100")  # of their tables

html_theme = "pydata_sphinx_theme"
html_title = "auxkern"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = html_copy_source = False
html_theme_options = {
    "navbar_align": "left",
    "secondary_sidebar_items": {"**": ["page-toc"], **{name: [] for name in WIDE}},
    "pygments_light_style": "github-light",
    "pygments_dark_style": "github-dark",
    "footer_start": [],
    "footer_end": [],
}
