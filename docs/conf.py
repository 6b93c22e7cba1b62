"""Settings of Sphinx: `sphinx-build -W docs docs/_build`."""

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

project = "podlift"
# Links such as page.md#a-heading.
myst_heading_anchors = 2
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
exclude_patterns = ["_build"]
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
napoleon_attr_annotations = False  # signatures have the types already


def shorten(app, what, name, obj, options, signature, returns):
    """Leaves out of a signature what Flax adds to all modules and Python to protocols."""
    if not signature:
        return None
    if getattr(obj, "_is_protocol", False):
        return "", returns
    signature = re.sub(r", parent: .*\)$", ")", signature, flags=re.S)
    return signature.replace("<factory>", "{}"), returns


def setup(app):
    app.connect("autodoc-process-signature", shorten)
