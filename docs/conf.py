"""Sphinx: `make docs` builds the site from the same markdown that GitHub shows."""

from __future__ import annotations

import re
from typing import Any

from tripletkit import __version__

project = "tripletkit"
author = "tripletkit developers"
release = version = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc"]
exclude_patterns = ["images"]
myst_heading_anchors = 4  # links to headings as on GitHub
myst_links_external_new_tab = True

highlight_language = "none"  # blocks without a language are output, or formulas
pygments_style = "tango"
pygments_dark_style = "github-dark"

html_theme = "furo"
html_title = f"tripletkit {__version__}"
html_short_title = "tripletkit"
html_copy_source = False
html_use_index = False
html_show_sphinx = False
html_show_copyright = False
html_static_path = ["static"]
html_css_files = ["site.css"]
html_theme_options = {"navigation_with_keys": True, "top_of_page_buttons": []}

# Docstrings are plain words with `code` in single backticks.
default_role = "code"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True  # else the page shows the environment of whoever builds it
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_class_signature = "mixed"
add_module_names = False
toc_object_entries_show_parents = "hide"
python_use_unqualified_type_names = True
maximum_signature_line_length = 80

nitpicky = True
# Other projects' types are not linked: their inventories would have to be downloaded.
nitpick_ignore_regex = [("py:.*", r"(numpy|torch|pyarrow|pathlib|collections|typing)\..*|Path")]
# Of no use to a script.
nitpick_ignore = [
    ("py:class", "tripletkit.train.resident.Resident"),
    ("py:class", "tripletkit.train.group.Group"),
]


def with_toctree(_app: Any, docname: str, source: list[str]) -> None:
    """Make the sidebar from the lists of the index: a section is a caption, its links the pages.

    So the index stays a page that GitHub shows as it is.
    """
    if docname != "index":
        return
    for title, body in re.findall(r"^## (.+)\n((?:(?!## ).*\n?)*)", source[0], re.MULTILINE):
        links = re.findall(r"^- \[([^\]]+)\]\(([^)\s]+)\.md\)", body, re.MULTILINE)
        pages = [f"{text} <{name}>" for text, name in links]
        if pages:
            options = [":hidden:", f":caption: {title}"]
            source[0] += "\n".join(["\n```{toctree}", *options, "", *pages, "```\n"])


def without_fields(_app: Any, _what: str, _name: str, obj: Any, *_: Any) -> tuple[str, str] | None:
    """No signature for a section of the configuration: its fields have their own page."""
    return ("", "") if hasattr(obj, "model_fields") else None


def setup(app: Any) -> None:
    """Called by Sphinx."""
    app.connect("autodoc-process-signature", without_fields)
    app.connect("source-read", with_toctree)
