"""The documentation site: `make docs` builds it into build/docs, without a network."""

import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE / "_ext"), str(HERE.parent)]
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is loaded

import xbraid_py  # noqa: E402

project = "xbraid_py"
author = "The authors of xbraid_py"
copyright = author
version = release = xbraid_py.__version__

# Blocks without a language are commands and output.
highlight_language = "none"

extensions = [
    "sphinx.ext.autodoc",
    "numpydoc",
    "myst_parser",
    "sphinx_gallery.gen_gallery",
    "site_math",
    "site_pages",
    "site_reference",
]
root_doc = "index"
exclude_patterns = ["_build", "gallery", "examples", "**/*.ipynb"]
suppress_warnings = [
    "config.cache",  # functions in the configuration of the gallery
    "myst.header",  # results begin with a table, or with a heading of another depth
]

myst_enable_extensions = ["dollarmath", "deflist", "colon_fence"]
smartquotes = False  # "V" is a word to type
myst_heading_anchors = 4
html_math_renderer = "mathml"
default_role = "py:obj"  # `name` in a docstring is a name of Python wherever it is one, and code elsewhere

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # docstrings name the types
numpydoc_show_class_members = False
numpydoc_class_members_toctree = False

sphinx_gallery_conf = {
    "examples_dirs": "gallery",
    "gallery_dirs": "tutorials",
    "filename_pattern": r"\.py$",
    "within_subsection_order": "FileNameSortKey",
    "abort_on_example_error": True,
    "download_all_examples": False,
    "show_memory": False,
    "show_signature": False,
    "write_computation_times": False,
    "remove_config_comments": True,
    "copyfile_regex": r".*\.rst",
    "default_thumb_file": str(HERE / "peaks_classes.png"),
}

html_theme = "pydata_sphinx_theme"
html_title = f"xbraid_py {version}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_copy_source = False
html_theme_options = {
    "navigation_with_keys": False,
    "show_toc_level": 2,
    "header_links_before_dropdown": 7,
    "show_prev_next": True,
    "footer_start": ["copyright"],
    "footer_end": [],
    "pygments_light_style": "tango",
    "pygments_dark_style": "monokai",
}
